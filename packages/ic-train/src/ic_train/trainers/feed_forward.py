"""The activation of the feed-forward blocks in one kernel: Liger's, on a GPU.

PyTorch's own writes `silu(gate)` to memory, reads it again and keeps it for the backward pass: at 16,384 tokens
and a width of 5,632 those are 176 MiB per layer in bfloat16.
"""

from __future__ import annotations

from importlib import import_module

import torch
from ic_model import ICForCausalLM
from ic_model.modeling import ICMLP

from ic_train.trainers import liger

FEED_FORWARDS = ("auto", "liger", "plain")


class LigerMLP(ICMLP):
    """An ICMLP that computes `silu(gate) * up` by Liger's kernel; made of one by `fuse_feed_forward`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, T, D]` to `[B, T, D]`, on a GPU."""
        activate = import_module("liger_kernel.transformers.functional").liger_swiglu
        # in the backward pass it overwrites both, which nothing else reads
        return self.down_proj(activate(self.gate_proj(x), self.up_proj(x)))


def choose_feed_forward(wanted: str, device: torch.device, *, compiled: bool = False) -> str:
    """Which feed-forward block runs on a device, "liger" or "plain": "auto" is Liger's where it can.

    Args:
        wanted: "auto", "liger" or "plain".
        device: that trains.
        compiled: whether torch.compile is on, which fuses PyTorch's own with what is around it.

    Raises:
        ValueError: the name is unknown, or that block cannot run here.
    """
    return liger.choose("feed_forward", wanted, FEED_FORWARDS, device, otherwise="plain", wins=not compiled)


def fuse_feed_forward(model: ICForCausalLM, kind: str) -> ICForCausalLM:
    """Have a model's feed-forward blocks run as chosen; in place, and its parameters stay what they are.

    Args:
        model: with or without a loss of its own.
        kind: "liger" or "plain".
    """
    assert kind in FEED_FORWARDS[1:], kind
    for module in model.modules():
        if isinstance(module, ICMLP):
            module.__class__ = LigerMLP if kind == "liger" else ICMLP
    return model
