"""Rotary position embedding on interleaved pairs, and YaRN with DeepSeek-V3's two uses of mscale.

Sources: RoFormer (arXiv 2104.09864, eq. 34); YaRN (arXiv 2309.00071, section 3.2 for the ramp and
section 3.4 for the temperature); DeepSeek-V3's release for where mscale enters: the ratio of two
mscales multiplies cos and sin, the square of `mscale_all_dim`'s multiplies the softmax scale.
Letters: B batch, T tokens, R rotary dimensions.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch

from ic_model.configuration import ICConfig


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature `0.1 * mscale * ln(factor) + 1`, and 1 where nothing is extended."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: ICConfig) -> float:
    """Scale of the attention scores: `(P + R) ** -0.5`, times `yarn_mscale(factor, mscale_all_dim) ** 2`."""
    scale = config.qk_head_dim**-0.5
    rope = _rope_parameters(config)
    if rope["rope_type"] == "yarn":
        scale *= yarn_mscale(rope["factor"], rope.get("mscale_all_dim") or 0.0) ** 2
    return scale


def cos_sin_scale(config: ICConfig) -> float:
    """Factor on cos and sin: `m(factor, mscale) / m(factor, mscale_all_dim)` for YaRN, else 1."""
    rope = _rope_parameters(config)
    if rope["rope_type"] != "yarn":
        return 1.0
    mscale = rope.get("mscale")
    numerator = yarn_mscale(rope["factor"], 1.0 if mscale is None else mscale)
    return numerator / yarn_mscale(rope["factor"], rope.get("mscale_all_dim") or 0.0)


def inverse_frequencies(config: ICConfig) -> torch.Tensor:
    """Angle per position of each rotary pair.

    Returns:
        `[R / 2]` float32 on the CPU, in radians per token. Computed in float32 on purpose, as
        transformers and vLLM do: at position 1,000,000 a last-bit difference in a frequency is a
        visible angle, and all three have to agree.
    """
    return _inverse_frequencies(_rope_parameters(config), config.qk_rope_head_dim)


def rope_tables(config: ICConfig, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for the given positions.

    Args:
        position_ids: `[B, T]` integer positions in tokens; they need not be contiguous.

    Returns:
        cos and sin, each `[B, T, R / 2]` float32, on the device of `position_ids`.
    """
    rope = _rope_parameters(config)
    key = tuple(
        sorted(
            (name, tuple(value) if isinstance(value, list) else value)
            for name, value in rope.items()
            if value is not None
        )
    )
    table = _frequencies_on(key, config.qk_rope_head_dim, position_ids.device)
    angles = position_ids[..., None].to(torch.float32) * table
    scale = cos_sin_scale(config)
    return angles.cos() * scale, angles.sin() * scale


def apply_interleaved_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs `(x[2i], x[2i + 1])` by the i-th angle, in float32.

    Args:
        x: `[..., R]`, any float dtype.
        cos: `[..., R / 2]` float32, broadcastable to x without its last dimension.
        sin: like cos.

    Returns:
        The shape and dtype of x, in the same interleaved order.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def _rope_parameters(config: ICConfig) -> dict[str, Any]:
    assert config.rope_parameters is not None, "ICConfig completes rope_parameters"
    return config.rope_parameters


@lru_cache(maxsize=16)
def _frequencies_on(rope: tuple[tuple[str, Any], ...], dim: int, device: torch.device) -> torch.Tensor:
    # a device gets its table once, not once per forward pass; it must outlive an inference-mode caller
    with torch.inference_mode(False):
        return _inverse_frequencies(dict(rope), dim).to(device)


def _inverse_frequencies(rope: dict[str, Any], dim: int) -> torch.Tensor:
    if rope["rope_type"] == "explicit":
        return torch.tensor(rope["inverse_frequencies"], dtype=torch.float32, device="cpu")
    frequencies = rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    extrapolated = 1.0 / frequencies
    if rope["rope_type"] != "yarn":
        return extrapolated
    interpolated = 1.0 / (rope["factor"] * frequencies)
    kept = 1.0 - _yarn_ramp(rope, dim)
    return interpolated * (1.0 - kept) + extrapolated * kept


def _yarn_ramp(rope: dict[str, Any], dim: int) -> torch.Tensor:
    """0 where a pair turns often enough to keep its frequency, 1 where it is fully interpolated."""

    def pair_with_rotations(rotations: float) -> float:
        wavelength_ratio = rope["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return dim * math.log(wavelength_ratio) / (2 * math.log(rope["rope_theta"]))

    low = max(math.floor(pair_with_rotations(rope.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair_with_rotations(rope.get("beta_slow") or 1)), dim - 1)
    # the same guard as DeepSeek-V3's release against a division by zero
    width = (high - low) or 0.001
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / width
    return ramp.clamp(0, 1)
