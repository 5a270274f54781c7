"""Norm, rotation, quantisation and paged write of latent rows in one Triton kernel, and its launch."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ic_model.ops.launch import launch_parameters
from ic_model.ops.rope.kernel import rotate_pairs

# what changes from batch to batch: otherwise each would compile anew for a number that 16 divides, and for 1
UNSPECIALIZED = ("tokens",)

# chips from here on convert to float8 e4m3 by an instruction
FP8_CAPABILITY = 89

# as tuning files and benchmarks call them
DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float8_e4m3fn: "fp8_e4m3",
}

# how numbers are stored: as they are, or in float8 e4m3 by integer arithmetic or by the instruction
AS_IT_IS, FP8_COMPUTED, FP8_CONVERTED = 0, 1, 2


@triton.jit
def e4m3_bits(x):
    """The bits of a float32 in float8 e4m3 (fn), in integer arithmetic.

    Rounded to nearest even; beyond +-448 becomes that; NaN stays NaN.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # 448 in float32
    bounded = tl.minimum(magnitude, 0x43E00000)
    # 20 of the 23 bits go: add half of the last one that stays, less one bit where that one is even. A carry moves
    # on into the exponent, whose bias changes from 127 to 7
    normal = ((bounded + 0x7FFFF + ((bounded >> 20) & 1)) >> 20) - (120 << 3)
    # below 2 ** -6 steps are 2 ** -9 wide, as those of float32 are from 2 ** 14 on: the addition rounds
    subnormal = (bounded.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(bounded < 0x3C800000, subnormal, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def stored(x, inverse_scale, STORAGE: tl.constexpr):
    """What the cache holds for a value in the latent's dtype."""
    if STORAGE == 0:
        result = x
    elif STORAGE == 1:
        result = e4m3_bits(x.to(tl.float32) * inverse_scale)
    else:
        result = (x.to(tl.float32) * inverse_scale).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return result


@triton.jit(do_not_specialize=["tokens"])
def latent_cache_kernel(
    latent_ptr, k_rope_ptr, weight_ptr, cos_ptr, sin_ptr, cache_ptr, slot_ptr, normed_ptr, rotated_ptr, tokens,
    epsilon, inverse_scale, latent_stride, k_rope_stride, cos_stride, sin_stride, page_stride, row_stride, pages,
    PAGE_TOKENS: tl.constexpr, RANK: tl.constexpr, ROTARY: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr, BLOCK_PAIRS: tl.constexpr, STORAGE: tl.constexpr,
):  # fmt: skip
    """The rows of some tokens. Slots outside the cache are not written."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS).to(tl.int64)[:, None]
    real = token < tokens
    slot = tl.load(slot_ptr + token, mask=real, other=-1)
    page = slot // PAGE_TOKENS
    written = real & (slot >= 0) & (page < pages)
    row = cache_ptr + page * page_stride + (slot % PAGE_TOKENS) * row_stride

    # padding is loaded too: else the rows would wait for the slots, one memory latency after the other
    column = tl.arange(0, BLOCK_RANK)[None, :]
    inside = column < RANK
    normed = tl.load(latent_ptr + token * latent_stride + column, mask=real & inside, other=0.0)
    angle = tl.arange(0, 2 * BLOCK_PAIRS)[None, :]
    key = tl.load(k_rope_ptr + token * k_rope_stride + angle, mask=real & (angle < ROTARY), other=0.0)
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    pair_mask = real & (pair < ROTARY // 2)
    cos = tl.load(cos_ptr + token * cos_stride + pair, mask=pair_mask, other=0.0)
    sin = tl.load(sin_ptr + token * sin_stride + pair, mask=pair_mask, other=0.0)

    if weight_ptr is not None:
        # as a tile, so that it lies in the registers where the tile of latents does
        same = tl.zeros([BLOCK_TOKENS, 1], tl.int32)
        weight = tl.load(weight_ptr + same + column, mask=inside, other=0.0).to(tl.float32)
        wide = normed.to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(wide * wide, axis=1) / RANK + epsilon)
        rounded = (wide * inverse_rms[:, None]).to(normed.dtype).to(tl.float32)
        normed = (rounded * weight).to(normed.dtype)
    tl.store(row + column, stored(normed, inverse_scale, STORAGE), mask=written & inside)
    rotated = rotate_pairs(key.to(tl.float32)[:, None, :], cos[:, None, :], sin[:, None, :], BLOCK_PAIRS)
    rotated = rotated.reshape([BLOCK_TOKENS, 2 * BLOCK_PAIRS]).to(key.dtype)
    tl.store(row + RANK + angle, stored(rotated, inverse_scale, STORAGE), mask=written & (angle < ROTARY))
    if normed_ptr is not None:
        tl.store(normed_ptr + token * RANK + column, normed, mask=real & inside)
        tl.store(rotated_ptr + token * ROTARY + angle, rotated, mask=real & (angle < ROTARY))


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
        latent: `[T, C]`, C at most 4,096.
        k_rope: `[T, R]`, R at most 512.
        norm_weight: see there, as what follows.
        epsilon: see there.
        cos: see there.
        sin: see there.
        kv_cache: see there.
        slot_mapping: see there.
        kv_scale: see there.
        return_rows: see there.
    """
    tokens, rank = latent.shape
    rotary = k_rope.shape[1]
    latent, k_rope, cos, sin = (_adjacent(part) for part in (latent, k_rope, cos, sin))
    normed = rotated = None
    if return_rows:
        normed, rotated = (
            torch.empty_like(part, memory_format=torch.contiguous_format) for part in (latent, k_rope)
        )
    if tokens:
        storage = AS_IT_IS
        if kv_cache.dtype == torch.float8_e4m3fn:
            storage = FP8_CONVERTED if converts_fp8(kv_cache.device) else FP8_COMPUTED
        # rounded up, so that a server's ever new numbers of tokens find the same few answers
        parameters = launch_parameters(
            "latent_cache", latent.device, row_dim=rank + rotary, tokens=triton.next_power_of_2(tokens),
            kv_dtype=DTYPE_NAMES[kv_cache.dtype],
        )  # fmt: skip
        cache = kv_cache.view(torch.uint8) if storage else kv_cache
        latent_cache_kernel[(triton.cdiv(tokens, parameters["block_tokens"]),)](
            latent, k_rope, None if norm_weight is None else norm_weight.contiguous(), cos, sin, cache,
            slot_mapping.contiguous(), normed, rotated, tokens, epsilon, 1.0 / kv_scale, latent.stride(0),
            k_rope.stride(0), cos.stride(0), sin.stride(0), cache.stride(0), cache.stride(1), cache.shape[0],
            PAGE_TOKENS=cache.shape[1], RANK=rank, ROTARY=rotary, STORAGE=storage,
            **constants(parameters, rank, rotary),
        )  # fmt: skip
    return None if normed is None or rotated is None else (normed, rotated)


def constants(parameters: dict[str, int], rank: int, rotary: int) -> dict[str, int]:
    """Sizes of the kernel's blocks, and warps.

    Args:
        parameters: from the tuning file.
        rank: C.
        rotary: R.
    """
    return {
        "BLOCK_TOKENS": parameters["block_tokens"],
        "BLOCK_RANK": triton.next_power_of_2(rank),
        "BLOCK_PAIRS": triton.next_power_of_2(rotary // 2),
        "num_warps": parameters["num_warps"],
    }


@lru_cache(maxsize=64)
def converts_fp8(device: torch.device) -> bool:
    """Whether the device has an instruction for it; the interpreter has not.

    Args:
        device: where the cache is.
    """
    if device.type != "cuda":
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor >= FP8_CAPABILITY


def _adjacent(part: torch.Tensor) -> torch.Tensor:
    """Itself, or a copy where the numbers of a row are apart."""
    return part if part.stride(1) == 1 else part.contiguous()
