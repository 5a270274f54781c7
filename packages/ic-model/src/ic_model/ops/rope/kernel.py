"""Rotary embedding in Triton: the kernel, its launch, and its autograd function."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ic_model.ops.launch import launch_parameters

# what changes from batch to batch: otherwise each would compile anew for a number that 16 divides, and for 1
UNSPECIALIZED = ("tokens",)


@triton.jit
def rotate_pairs(x, cos, sin, PAIRS: tl.constexpr):
    """Rotate float32 `[A, B, 2 * PAIRS]` by tables that broadcast to `[A, B, PAIRS]`.

    A thread that holds a pair keeps it: nothing moves between threads.
    """
    even, odd = tl.split(x.reshape([x.shape[0], x.shape[1], PAIRS, 2]))
    rotated = tl.join(even * cos - odd * sin, odd * cos + even * sin)
    return rotated.reshape([x.shape[0], x.shape[1], 2 * PAIRS])


@triton.jit(do_not_specialize=["tokens"])
def rope_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, tokens, x_stride_b, x_stride_t, x_stride_n, out_stride_b, out_stride_t,
    out_stride_n, table_stride_b, table_stride_t, HEADS: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Some heads of some tokens of one batch entry; the angles are loaded once for all of the heads."""
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS).to(tl.int64)[:, None, None]
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[None, :, None]
    column = tl.arange(0, 2 * BLOCK_PAIRS)[None, None, :]
    pair = tl.arange(0, BLOCK_PAIRS)[None, None, :]
    mask = (token < tokens) & (head < HEADS) & (column < ROTARY)
    table_mask = (token < tokens) & (pair < ROTARY // 2)
    table = batch * table_stride_b + token * table_stride_t + pair
    x = tl.load(
        x_ptr + batch * x_stride_b + token * x_stride_t + head.to(tl.int64) * x_stride_n + column,
        mask=mask, other=0.0,
    )  # fmt: skip
    cos = tl.load(cos_ptr + table, mask=table_mask, other=0.0)
    sin = tl.load(sin_ptr + table, mask=table_mask, other=0.0)
    if BACK:
        sin = -sin
    rotated = rotate_pairs(x.to(tl.float32), cos, sin, BLOCK_PAIRS)
    tl.store(
        out_ptr + batch * out_stride_b + token * out_stride_t + head.to(tl.int64) * out_stride_n + column,
        rotated.to(out_ptr.dtype.element_ty), mask=mask,
    )  # fmt: skip


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  (the decorator's type hides the name of ctx)
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return rotate(d_out, *ctx.saved_tensors, back=True), None, None


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Rotate the pairs of x; see `rope` of the package.

    Args:
        x: `[..., heads, R]`.
        cos: `[..., R / 2]`.
        sin: like cos.
        out: where the result goes, or None.
    """
    if out is None and x.requires_grad and torch.is_grad_enabled():
        return _Rope.apply(x, cos, sin)
    return rotate(x, cos, sin, out=out)


def rotate(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    back: bool = False,
) -> torch.Tensor:
    """As `rope`, without autograd.

    Args:
        x: see there, as what follows.
        cos: see there.
        sin: see there.
        out: see there.
        back: whether to apply the transposed map, which is the gradient's.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out
    shaped_x, shaped_out, cos, sin = _batched(x, out, cos, sin)
    batch, tokens, heads, dim = shaped_x.shape
    # rounded up, so that a server's ever new numbers of tokens find the same few answers
    parameters = launch_parameters(
        "rope", x.device, row_dim=dim, heads=heads, tokens=triton.next_power_of_2(batch * tokens)
    )
    options = constants(parameters, heads, dim)
    grid = (triton.cdiv(tokens, options["BLOCK_TOKENS"]), triton.cdiv(heads, options["BLOCK_HEADS"]), batch)
    rope_kernel[grid](
        shaped_x, cos, sin, shaped_out, tokens, *shaped_x.stride()[:3], *shaped_out.stride()[:3],
        *cos.stride()[:2], HEADS=heads, ROTARY=dim, BACK=back, **options,
    )  # fmt: skip
    return out


def constants(parameters: dict[str, int], heads: int, dim: int) -> dict[str, int]:
    """Sizes of the kernel's blocks, and warps.

    Args:
        parameters: from the tuning file.
        heads: of a token.
        dim: numbers of a head.
    """
    return {
        "BLOCK_TOKENS": parameters["block_tokens"],
        "BLOCK_HEADS": min(parameters["block_heads"], triton.next_power_of_2(heads)),
        "BLOCK_PAIRS": triton.next_power_of_2(dim // 2),
        "num_warps": parameters["num_warps"],
    }


def _batched(
    x: torch.Tensor, out: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """X and out `[B, T, heads, R]`, tables `[B, T, R / 2]` of equal strides; B is 1 wherever strides allow."""
    lead = x.shape[:-2]
    cos, sin = (table.expand(*lead, table.shape[-1]) for table in (cos, sin))
    if x.stride(-1) != 1:
        x = x.contiguous()
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    parts = [x, out, cos, sin]
    if all(_is_flat(part, len(lead)) for part in parts):
        lead = (1, lead.numel())
    elif len(lead) != 2:
        # a batch of several dimensions that cannot be seen as one is copied; out never has it
        lead = (lead[:-1].numel(), lead[-1])
    x, out = (part.reshape(*lead, *x.shape[-2:]) for part in (x, out))
    cos, sin = (table.reshape(*lead, table.shape[-1]) for table in (cos, sin))
    return x, out, cos, sin


def _is_flat(part: torch.Tensor, dims: int) -> bool:
    """Whether the first dimensions can be seen as one."""
    # the stride of a single element means nothing
    steps = [step for step in zip(part.shape[:dims], part.stride()[:dims], strict=True) if step[0] != 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(steps))
