"""Root-mean-square norm over the last dimension, with the residual's addition fused in; forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ic_model.ops.dispatch import Implementation, dispatch, kernel_refuses
from ic_model.ops.rms_norm import reference

__all__ = ["rms_norm"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# a row of the kernel is held in registers
MAX_KERNEL_DIM = 16384


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    epsilon: float,
    residual: torch.Tensor | None = None,
    implementation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Norm rows to a root mean square of 1, times a weight (arXiv 1910.07467, eq. 4).

        h   = x + residual                                   rounded to x's dtype
        out = weight * round(h / sqrt(mean(h ** 2) + epsilon))

    Statistics are float32. The normed value is rounded to x's dtype before it meets the weight, as in
    transformers' DeepSeek-V3 and Llama modules and in `ic_model.attention.ICRMSNorm`. Gradients flow to x,
    residual and weight; they have the same bits in every run on one device.

    Args:
        x: `[..., D]` float32, float16 or bfloat16. Rows may be apart; numbers of a row that are apart are copied.
        weight: `[D]` in x's dtype or float32.
        epsilon: added to the mean square, not negative.
        residual: like x, or None.
        implementation: "triton" or "reference"; None to choose.

    Returns:
        out `[..., D]` in the wider dtype of x and weight; with a residual, out and h, h in x's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or epsilon do not fit.
    """
    _check(x, weight, epsilon, residual)
    return dispatch(
        "rms_norm", _IMPLEMENTATIONS, implementation, x, weight, epsilon=epsilon, residual=residual
    )


def _check(x: torch.Tensor, weight: torch.Tensor, epsilon: float, residual: torch.Tensor | None) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; accepted: float32, float16, bfloat16")
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"x has shape {list(x.shape)}; accepted: at least one dimension, the last not empty")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {list(weight.shape)}; accepted: [{x.shape[-1]}], as x has rows")
    if weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"weight is {weight.dtype}; accepted: {x.dtype} as x, or torch.float32")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"residual is {residual.dtype} of shape {list(residual.shape)}; accepted: {x.dtype} of shape "
            f"{list(x.shape)}, as x"
        )
    for name, part in (("weight", weight), ("residual", residual)):
        if part is not None and part.device != x.device:
            raise ValueError(f"{name} is on {part.device} and x on {x.device}; accepted: one device")
    if not 0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon is {epsilon}; accepted: numbers from 0 on")


def _load_kernel() -> Callable[..., Any]:
    from ic_model.ops.rms_norm import kernel

    return kernel.rms_norm


def _kernel_refuses(
    x: torch.Tensor, weight: torch.Tensor, *, residual: torch.Tensor | None = None, **_: Any
) -> str | None:
    if x.shape[-1] > MAX_KERNEL_DIM:
        return f"rows have {x.shape[-1]} numbers, the kernel takes up to {MAX_KERNEL_DIM}"
    return kernel_refuses(x, weight) if residual is None else kernel_refuses(x, weight, residual)


_IMPLEMENTATIONS = (
    Implementation("triton", _load_kernel, _kernel_refuses),
    Implementation("reference", lambda: reference.rms_norm, lambda *_, **__: None),
)
