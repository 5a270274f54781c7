"""From the projection to the paged cache in one: norm, rotation, quantisation and write of tokens' latent rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ic_model.ops.dispatch import Implementation, dispatch, kernel_refuses
from ic_model.ops.latent_cache import reference

__all__ = ["latent_cache"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# a row of the kernel is held in registers
MAX_KERNEL_RANK = 4096
MAX_KERNEL_ROTARY = 512


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
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Norm tokens' latents, rotate their shared keys, and write both as rows of C + R numbers into the cache.

    DeepSeek-V3 (arXiv 2412.19437, section 2.1.1, eqs. 1 to 4): the norm is `rms_norm`'s, the rotation `rope`'s,
    both rounded to the latent's dtype. Slot s is row `s % page_tokens` of page `s // page_tokens`. Nothing waits
    for the host, so that it can be captured in a CUDA graph. There are no gradients.

    Args:
        latent: `[T, C]` float32, float16 or bfloat16. It and k_rope may be views of one projection's `[T, C + R]`.
        k_rope: `[T, R]` in latent's dtype, interleaved pairs, before the rotation.
        norm_weight: `[C]` in latent's dtype or float32; None: the latent is not normed, as in checkpoints that
            were converted from attention without it.
        epsilon: added to the mean square.
        cos: `[T, R / 2]` float32 of the tokens' positions.
        sin: like cos.
        kv_cache: `[pages, page_tokens, C + R]` in latent's dtype or float8_e4m3fn, written in place. Pages and
            rows may be apart, the numbers of a row not.
        slot_mapping: `[T]` int64, where each token's row goes. Negative: nowhere, the token is padding. The others
            are below pages * page_tokens, each at most once.
        kv_scale: a float8 cache holds `value / kv_scale`, rounded to nearest even; what is beyond +-448 becomes
            that, and NaN stays NaN. Must be 1 for other caches.
        return_rows: whether to return what was computed, padding included, before it was quantised.
        implementation: "triton" or "reference"; None to choose.

    Returns:
        the normed latent `[T, C]` and the rotated key `[T, R]` in latent's dtype, or None.

    Raises:
        ValueError: shapes, dtypes, strides, devices or numbers do not fit, or a gradient is needed.
    """
    _check_rows(latent, k_rope, norm_weight, cos, sin)
    _check_cache(latent, k_rope, kv_cache, slot_mapping)
    _check_numbers(kv_cache, epsilon, kv_scale)
    parts = [
        latent,
        k_rope,
        cos,
        sin,
        kv_cache,
        slot_mapping,
        *([] if norm_weight is None else [norm_weight]),
    ]
    if any(part.device != latent.device for part in parts):
        found = ", ".join(sorted({str(part.device) for part in parts}))
        raise ValueError(f"the tensors are on {found}; accepted: one device")
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        raise ValueError(
            "an argument needs a gradient, which latent_cache has not; accepted: torch.no_grad()"
        )
    return dispatch(
        "latent_cache",
        _IMPLEMENTATIONS,
        implementation,
        latent,
        k_rope,
        norm_weight=norm_weight,
        epsilon=epsilon,
        cos=cos,
        sin=sin,
        kv_cache=kv_cache,
        slot_mapping=slot_mapping,
        kv_scale=kv_scale,
        return_rows=return_rows,
    )


def _check_rows(
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    norm_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> None:
    if latent.ndim != 2 or not latent.shape[1] or latent.dtype not in DTYPES:
        raise ValueError(
            f"latent is {latent.dtype} of shape {list(latent.shape)}; accepted: [T, C] float32, float16, bfloat16"
        )
    tokens, rank = latent.shape
    if k_rope.ndim != 2 or k_rope.shape[0] != tokens or k_rope.shape[1] % 2 or not k_rope.shape[1]:
        raise ValueError(
            f"k_rope has shape {list(k_rope.shape)}; accepted: [{tokens}, R] with an even R, as latent has "
            f"{tokens} tokens"
        )
    if k_rope.dtype != latent.dtype:
        raise ValueError(f"k_rope is {k_rope.dtype}; accepted: {latent.dtype} as latent")
    if norm_weight is not None and (
        norm_weight.shape != (rank,) or norm_weight.dtype not in (latent.dtype, torch.float32)
    ):
        raise ValueError(
            f"norm_weight is {norm_weight.dtype} of shape {list(norm_weight.shape)}; accepted: [{rank}] in "
            f"{latent.dtype} or float32"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        wanted = [tokens, k_rope.shape[1] // 2]
        if list(table.shape) != wanted or table.dtype != torch.float32:
            raise ValueError(
                f"{name} is {table.dtype} of shape {list(table.shape)}; accepted: {wanted} float32"
            )


def _check_cache(
    latent: torch.Tensor, k_rope: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    row_dim = latent.shape[1] + k_rope.shape[1]
    if kv_cache.ndim != 3 or kv_cache.shape[2] != row_dim or not kv_cache.numel():
        raise ValueError(
            f"kv_cache has shape {list(kv_cache.shape)}; accepted: [pages, page_tokens, {row_dim}] with "
            f"C {latent.shape[1]} and R {k_rope.shape[1]}"
        )
    if kv_cache.stride(2) != 1:
        raise ValueError(f"kv_cache has stride {kv_cache.stride(2)} in its last dimension; accepted: 1")
    if kv_cache.dtype not in (latent.dtype, torch.float8_e4m3fn):
        raise ValueError(
            f"kv_cache is {kv_cache.dtype}; accepted: {latent.dtype} as latent, or float8_e4m3fn"
        )
    if slot_mapping.shape != latent.shape[:1] or slot_mapping.dtype != torch.int64:
        raise ValueError(
            f"slot_mapping is {slot_mapping.dtype} of shape {list(slot_mapping.shape)}; accepted: "
            f"[{latent.shape[0]}] int64"
        )


def _check_numbers(kv_cache: torch.Tensor, epsilon: float, kv_scale: float) -> None:
    if not 0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon is {epsilon}; accepted: numbers from 0 on")
    if not 0 < kv_scale < float("inf"):
        raise ValueError(f"kv_scale is {kv_scale}; accepted: positive numbers")
    if kv_scale != 1.0 and kv_cache.dtype != torch.float8_e4m3fn:
        raise ValueError(
            f"kv_scale is {kv_scale} and kv_cache {kv_cache.dtype}; accepted: 1 but for float8_e4m3fn"
        )


def _load_kernel() -> Callable[..., Any]:
    from ic_model.ops.latent_cache import kernel

    return kernel.latent_cache


def _kernel_refuses(
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None,
    kv_cache: torch.Tensor,
    **_: Any,
) -> str | None:
    if latent.shape[1] > MAX_KERNEL_RANK or k_rope.shape[1] > MAX_KERNEL_ROTARY:
        return (
            f"rows have {latent.shape[1]} + {k_rope.shape[1]} numbers, the kernel takes up to "
            f"{MAX_KERNEL_RANK} + {MAX_KERNEL_ROTARY}"
        )
    return kernel_refuses(*[part for part in (latent, norm_weight, kv_cache) if part is not None])


_IMPLEMENTATIONS = (
    Implementation("triton", _load_kernel, _kernel_refuses),
    Implementation("reference", lambda: reference.latent_cache, lambda *_, **__: None),
)
