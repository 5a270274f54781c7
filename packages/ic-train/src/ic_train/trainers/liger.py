"""Whether Liger's kernels run here: they need a GPU and the package."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import util

import torch


def choose(
    key: str, wanted: str, accepted: Sequence[str], device: torch.device, *, otherwise: str, wins: bool = True
) -> str:
    """One of several implementations, of which "liger" is Liger's and "auto" asks for the choice.

    Args:
        key: of the recipe, for messages.
        wanted: its value.
        accepted: its values.
        device: that trains.
        otherwise: what "auto" is where Liger's cannot run.
        wins: whether "auto" is Liger's where it can.

    Raises:
        ValueError: the value is not accepted, or Liger's cannot run here.
    """
    if wanted not in accepted:
        raise ValueError(f"{key} is {wanted!r}; accepted: {', '.join(accepted)}")
    installed, on_gpu = util.find_spec("liger_kernel") is not None, device.type == "cuda"
    if wanted == "auto":
        return "liger" if installed and on_gpu and wins else otherwise
    if wanted == "liger" and not (installed and on_gpu):
        missing = "a GPU" if installed else "the package liger-kernel (ic-train[gpu])"
        here = ", ".join(name for name in accepted if name not in ("auto", "liger"))
        raise ValueError(f"{key} is 'liger', which needs {missing}; accepted here: {here}")
    return wanted
