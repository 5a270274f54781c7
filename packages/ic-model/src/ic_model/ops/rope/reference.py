"""Rotary embedding of interleaved pairs from its formula in float32; gradients are PyTorch's own."""

from __future__ import annotations

import torch


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Rotate the pairs `(x[2i], x[2i + 1])`; see `rope` of the package.

    Args:
        x: `[..., heads, R]`.
        cos: `[..., R / 2]` float32.
        sin: like cos.
        out: where the result goes, or None.
    """
    # the tables broadcast over heads
    cos, sin = cos[..., None, :], sin[..., None, :]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
    return rotated if out is None else out.copy_(rotated)
