"""Norm, rotation and the write into the paged latent cache from their formulas, in plain PyTorch.

Nothing waits for the device and no shape depends on data, so that it can be captured and compiled.
"""

from __future__ import annotations

import torch

from ic_model.ops.rms_norm.reference import rms_norm
from ic_model.ops.rope.reference import rope

# largest number of float8 e4m3: 1.75 * 2 ** 8
FP8_MAX = 448.0


def latent_cache(
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None,
    epsilon: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_scale: float = 1.0,
    return_rows: bool = False,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Write tokens' rows into the cache; see `latent_cache` of the package.

    Args:
        latent: `[T, C]`.
        k_rope: `[T, R]`.
        norm_weight: `[C]`, or None where the latent is not normed.
        epsilon: see there, as what follows.
        cos: see there.
        sin: see there.
        kv_cache: see there.
        slot_mapping: see there.
        kv_scale: see there.
        return_rows: see there.
    """
    if norm_weight is None:
        normed = latent
    else:
        normed = rms_norm(latent, norm_weight, epsilon=epsilon)
        assert isinstance(normed, torch.Tensor)
        normed = normed.to(latent.dtype)
    rotated = rope(k_rope[:, None], cos, sin)[:, 0]
    rows, stored = torch.cat((normed, rotated), dim=-1), kv_cache
    if kv_cache.dtype == torch.float8_e4m3fn:
        rows = quantize(rows, kv_scale).view(torch.uint8)
        # PyTorch indexes bytes everywhere, float8 not
        stored = kv_cache.view(torch.uint8)
    if rows.shape[0]:
        _write(stored, rows, slot_mapping)
    return (normed.contiguous(), rotated) if return_rows else None


def quantize(values: torch.Tensor, kv_scale: float) -> torch.Tensor:
    """`values / kv_scale` in float8 e4m3, rounded to nearest even, beyond its largest number that number.

    Args:
        values: any shape and float dtype; NaN stays NaN.
        kv_scale: positive. What is computed is the product with its float32 reciprocal.
    """
    scaled = values.float() * (1.0 / kv_scale)
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _write(cache: torch.Tensor, rows: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Write rows to their slots.

    Padding writes what the token of the highest slot writes, to that slot; where all is padding, the first slot
    keeps its content. A selection of the other tokens would have a shape that depends on data.
    """
    own = torch.arange(rows.shape[0], device=rows.device)
    source = torch.where(slot_mapping < 0, slot_mapping.argmax(), own)
    slots = slot_mapping[source]
    content = torch.where((slots < 0)[:, None], cache[0, 0], rows[source])
    slots = slots.clamp(min=0)
    cache[slots // cache.shape[1], slots % cache.shape[1]] = content
