"""The loss without all logits at once is the plain one, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from ic_model import ICForCausalLM
from ic_model.testing import assert_close
from torch.nn import functional as F
from training_runs import toy_config

from ic_train.context_parallel import SequenceLayout, register_attention
from ic_train.trainers.linear_loss import IGNORED, LossHead, add_loss_head, choose_loss

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["chunked", "full"])
def test_losses_and_gradients_are_the_plain_ones(kind: str) -> None:
    torch.manual_seed(0)
    # more columns than are multiplied at once, and an odd number of rows
    head = LossHead(24, 9001, bias=False)
    head.kind = kind
    states = torch.randn(3, 7, 24, requires_grad=True)
    labels = torch.randint(9001, (3, 7))
    labels[0, :3] = IGNORED
    expected = F.cross_entropy(
        (states @ head.weight.T).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    wanted = torch.autograd.grad(expected * 3, (states, head.weight))
    found = head(states, labels)
    assert found.dtype == torch.float32
    assert_close(found, expected, "fp32_peer")
    for one, other in zip(torch.autograd.grad(found * 3, (states, head.weight)), wanted, strict=True):
        assert_close(one, other, "fp32_peer")
    assert head(states).shape == (3, 7, 9001)


def test_a_model_with_a_loss_head_keeps_its_parameters_and_its_tie() -> None:
    register_attention()
    model = ICForCausalLM(toy_config())
    names = list(model.state_dict())
    ids = torch.randint(256, (1, 33))
    expected = model(input_ids=ids[:, :-1], labels=None, use_cache=False).logits
    trained = add_loss_head(model, "chunked")
    assert list(trained.state_dict()) == names
    assert trained.lm_head.weight is trained.model.embed_tokens.weight
    total = trained(input_ids=ids[:, :-1], labels=ids[:, 1:], layout=SequenceLayout(32))
    assert_close(total, F.cross_entropy(expected[0], ids[0, 1:], reduction="sum"), "fp32_peer")


def test_without_any_label_the_loss_is_zero() -> None:
    head = LossHead(8, 16, bias=False)
    states = torch.randn(1, 5, 8, requires_grad=True)
    loss = head(states, torch.full((1, 5), IGNORED))
    loss.backward()
    assert loss.item() == 0 and not states.grad.any()


def test_what_cannot_run_here_is_refused() -> None:
    assert choose_loss("auto", CPU) == "chunked"
    assert choose_loss("full", CPU) == "full"
    with pytest.raises(ValueError, match="linear_loss is 'fused'; accepted: auto, liger, chunked, full"):
        choose_loss("fused", CPU)
    with pytest.raises(ValueError, match="linear_loss is 'liger', which needs"):
        choose_loss("liger", CPU)
