"""Which feed-forward block runs where, and that a model stays what it is."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from ic_model import ICForCausalLM
from ic_model.testing import assert_close
from torch.nn import functional as F
from training_runs import toy_config

from ic_train.trainers import liger
from ic_train.trainers.feed_forward import LigerMLP, choose_feed_forward, fuse_feed_forward

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_what_cannot_run_here_is_refused() -> None:
    assert choose_feed_forward("auto", CPU) == choose_feed_forward("plain", CPU) == "plain"
    with pytest.raises(ValueError, match="feed_forward is 'fused'; accepted: auto, liger, plain"):
        choose_feed_forward("fused", CPU)
    with pytest.raises(ValueError, match="feed_forward is 'liger', which needs"):
        choose_feed_forward("liger", CPU)


def test_a_gpu_has_ligers_unless_the_compiler_fuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger.util, "find_spec", lambda _: object())
    assert choose_feed_forward("auto", GPU) == choose_feed_forward("liger", GPU) == "liger"
    assert choose_feed_forward("auto", GPU, compiled=True) == choose_feed_forward("plain", GPU) == "plain"
    assert choose_feed_forward("auto", CPU) == "plain"
    with pytest.raises(ValueError, match="feed_forward is 'liger', which needs a GPU; accepted here: plain"):
        choose_feed_forward("liger", CPU)
    monkeypatch.setattr(liger.util, "find_spec", lambda _: None)
    assert choose_feed_forward("auto", GPU) == "plain"
    with pytest.raises(ValueError, match=r"needs the package liger-kernel \(ic-train\[gpu\]\)"):
        choose_feed_forward("liger", GPU)


def test_gate_and_up_are_not_swapped_and_the_model_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's function by its formula: its kernel needs a GPU, where test_training_gpu.py runs it."""
    functional = ModuleType("liger_kernel.transformers.functional")
    functional.liger_swiglu = lambda gate, up: F.silu(gate) * up  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    model, ids = ICForCausalLM(toy_config()).eval(), torch.randint(256, (1, 9))
    names, expected = list(model.state_dict()), model(ids).logits
    assert fuse_feed_forward(model, "liger") is model
    blocks = [layer.mlp for layer in model.model.layers]
    assert all(type(block) is LigerMLP for block in blocks) and list(model.state_dict()) == names
    assert_close(model(ids).logits, expected, "fp32_peer")
    fuse_feed_forward(model, "plain")
    assert not any(isinstance(block, LigerMLP) for block in blocks)
