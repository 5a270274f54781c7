"""RMS norm from its formula in float32, in plain PyTorch; gradients are PyTorch's own."""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, epsilon: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Norm rows, after adding a residual where there is one; see `rms_norm` of the package.

    Args:
        x: `[..., D]`.
        weight: `[D]`.
        epsilon: added to the mean square.
        residual: like x, or None.
    """
    total = x if residual is None else x + residual
    wide = total.float()
    inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    # rounded before the weight, as DeepSeek-V3's and Llama's modules do
    out = (wide * inverse_rms).to(total.dtype) * weight
    return out if residual is None else (out, total)
