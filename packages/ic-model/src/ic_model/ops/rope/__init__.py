"""Rotary position embedding of interleaved pairs, all heads of a token at once; forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ic_model.ops.dispatch import Implementation, dispatch, kernel_refuses
from ic_model.ops.rope import reference

__all__ = ["rope"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# of a CUDA grid
MAX_KERNEL_BATCH = 65535
# a head's numbers are held in registers
MAX_KERNEL_DIM = 1024


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """Rotate the pairs `(x[2i], x[2i + 1])` by the i-th angle, in float32 (arXiv 2104.09864, eq. 34).

        out[2i]     = x[2i] cos[i] - x[2i + 1] sin[i]
        out[2i + 1] = x[2i + 1] cos[i] + x[2i] sin[i]

    The meaning of `ic_model.rope.apply_interleaved_rope`; YaRN and its mscale are in the tables alone. The
    gradient of x is the transposed map: the rotation back, with the tables' scale once more. The tables get none.

    Args:
        x: `[..., heads, R]` float32, float16 or bfloat16, R even. It may be a view of wider rows, such as the
            last R of a query's P + R numbers; nothing is copied for that.
        cos: `[..., R / 2]` float32; its other dimensions broadcast to those of x before heads: `[tokens, R / 2]`
            for x `[tokens, heads, R]` or `[batch, tokens, heads, R]`.
        sin: like cos.
        out: where the result goes, in x's shape and dtype; x itself rotates it in place. It may not overlap x in
            any other way, and there are no gradients then.
        implementation: "triton" or "reference"; None to choose.

    Returns:
        out, or a new contiguous tensor in x's shape and dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or out is given where a gradient is needed.
    """
    _check_x(x)
    _check_tables(x, cos, sin)
    if out is not None:
        _check_out(x, out)
    return dispatch("rope", _IMPLEMENTATIONS, implementation, x, cos, sin, out=out)


def _check_x(x: torch.Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; accepted: float32, float16, bfloat16")
    if x.ndim < 3 or not x.shape[-1] or x.shape[-1] % 2:
        raise ValueError(f"x has shape {list(x.shape)}; accepted: [..., tokens, heads, R] with an even R")


def _check_tables(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    lead, pairs = x.shape[:-2], x.shape[-1] // 2
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32:
            raise ValueError(f"{name} is {table.dtype}; accepted: float32")
        if table.device != x.device:
            raise ValueError(f"{name} is on {table.device} and x on {x.device}; accepted: one device")
        # broadcasting, without asking PyTorch: it is called once per layer and step
        own = table.shape[:-1]
        fits = table.ndim >= 1 and table.shape[-1] == pairs and len(own) <= len(lead)
        if not fits or any(
            have not in (1, want) for have, want in zip(reversed(own), reversed(lead), strict=False)
        ):
            raise ValueError(
                f"{name} has shape {list(table.shape)}; accepted: [..., {pairs}], broadcasting to "
                f"{[*lead, pairs]} for x of shape {list(x.shape)}"
            )
    if cos.shape != sin.shape:
        raise ValueError(f"cos has shape {list(cos.shape)} and sin {list(sin.shape)}; accepted: one shape")


def _check_out(x: torch.Tensor, out: torch.Tensor) -> None:
    if (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"out is {out.dtype} of shape {list(out.shape)} on {out.device}; accepted: {x.dtype} of shape "
            f"{list(x.shape)} on {x.device}, as x"
        )
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError("out is given and a gradient is needed; accepted: out within torch.no_grad()")


def _load_kernel() -> Callable[..., Any]:
    from ic_model.ops.rope import kernel

    return kernel.rope


def _kernel_refuses(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, out: torch.Tensor | None = None
) -> str | None:
    if x.shape[-1] > MAX_KERNEL_DIM:
        return f"heads have {x.shape[-1]} numbers, the kernel takes up to {MAX_KERNEL_DIM}"
    if x.shape[:-3].numel() > MAX_KERNEL_BATCH:
        return f"the batch is {x.shape[:-3].numel()}, the kernel takes up to {MAX_KERNEL_BATCH}"
    if out is not None and out.stride(-1) != 1:
        return f"out has stride {out.stride(-1)} in its last dimension, the kernel takes 1"
    if out is not None and x.ndim > 4 and not out.is_contiguous():
        return f"out has {out.ndim} dimensions and is not contiguous, which the kernel takes up to 4"
    return kernel_refuses(x, cos, sin)


_IMPLEMENTATIONS = (
    Implementation("triton", _load_kernel, _kernel_refuses),
    Implementation("reference", lambda: reference.rope, lambda *_, **__: None),
)
