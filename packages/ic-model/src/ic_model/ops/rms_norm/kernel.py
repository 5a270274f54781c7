"""RMS norm in Triton: kernels, their launches, and their autograd function.

A tile is a few whole rows, held in registers: each is read once and reduced once. The weight stays in registers
while a program walks over its tiles. The weight's gradient is summed per program and those sums by a second
kernel, always in the same order: no atomics.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ic_model.ops.launch import launch_parameters

# what changes from batch to batch: otherwise each would compile anew for a number that 16 divides, and for 1
UNSPECIALIZED = ("rows", "programs")

# the interpreter runs programs one after the other: enough that their sums differ from one program's
INTERPRETED_PROCESSORS = 2


@triton.jit
def load_weight(weight_ptr, columns, inside, BLOCK_ROWS: tl.constexpr):
    """The weight once per row of a tile, in float32.

    Loaded like a tile it lies in the registers where the tile does; loaded as one row it would pass through shared
    memory, and the first tile would be loaded only after that.
    """
    same = tl.zeros([BLOCK_ROWS, 1], tl.int32)
    return tl.load(weight_ptr + same + columns[None, :], mask=inside[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, inverse_rms_ptr, x_stride, residual_stride, rows, epsilon,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Out, h where there is a residual, and the inverse root mean squares where a backward pass follows."""
    columns = tl.arange(0, BLOCK_DIM)
    inside = columns < DIM
    weight = load_weight(weight_ptr, columns, inside, BLOCK_ROWS)
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=NUM_STAGES
    ):
        index = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        mask = (index < rows)[:, None] & inside[None, :]
        total = tl.load(x_ptr + index[:, None] * x_stride + columns[None, :], mask=mask, other=0.0)
        here = index[:, None] * DIM + columns[None, :]
        if residual_ptr is not None:
            residual = tl.load(
                residual_ptr + index[:, None] * residual_stride + columns[None, :], mask=mask, other=0.0
            )
            total = (total.to(tl.float32) + residual.to(tl.float32)).to(total.dtype)
            tl.store(total_ptr + here, total, mask=mask)
        wide = total.to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(wide * wide, axis=1) / DIM + epsilon)
        normed = (wide * inverse_rms[:, None]).to(total.dtype).to(tl.float32)
        out = normed * weight
        tl.store(out_ptr + here, out.to(out_ptr.dtype.element_ty), mask=mask)
        if inverse_rms_ptr is not None:
            tl.store(inverse_rms_ptr + index, inverse_rms, mask=index < rows)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    d_out_ptr, d_total_ptr, total_ptr, weight_ptr, inverse_rms_ptr, d_x_ptr, partial_ptr, d_out_stride,
    d_total_stride, total_stride, rows, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of h, and this program's share of the weight's gradient.

    With n = h / rms and d_n = weight * d_out: d_h = (d_n - n * mean(n * d_n)) / rms, plus what reaches h itself.
    """
    columns = tl.arange(0, BLOCK_DIM)
    inside = columns < DIM
    weight = load_weight(weight_ptr, columns, inside, BLOCK_ROWS)
    d_weight = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=NUM_STAGES
    ):
        index = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        mask = (index < rows)[:, None] & inside[None, :]
        total = tl.load(total_ptr + index[:, None] * total_stride + columns[None, :], mask=mask, other=0.0)
        d_out = tl.load(d_out_ptr + index[:, None] * d_out_stride + columns[None, :], mask=mask, other=0.0)
        d_out = d_out.to(tl.float32)
        inverse_rms = tl.load(inverse_rms_ptr + index, mask=index < rows, other=0.0)[:, None]
        normed = total.to(tl.float32) * inverse_rms
        d_normed = d_out * weight
        projection = tl.sum(normed * d_normed, axis=1)[:, None] / DIM
        d_x = inverse_rms * (d_normed - normed * projection)
        if d_total_ptr is not None:
            d_total = tl.load(
                d_total_ptr + index[:, None] * d_total_stride + columns[None, :], mask=mask, other=0.0
            )
            d_x += d_total.to(tl.float32)
        here = index[:, None] * DIM + columns[None, :]
        tl.store(d_x_ptr + here, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            # the weight was multiplied with the rounded value
            d_weight += d_out * normed.to(total.dtype).to(tl.float32)
    if partial_ptr is not None:
        share = tl.sum(d_weight, axis=0)
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * DIM + columns, share, mask=inside)


@triton.jit(do_not_specialize=["programs"])
def weight_kernel(
    partial_ptr, d_weight_ptr, programs, DIM: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Sum of the programs' shares, for some columns."""
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = columns < DIM
    total = tl.zeros([BLOCK_PROGRAMS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, programs, BLOCK_PROGRAMS):
        index = start + tl.arange(0, BLOCK_PROGRAMS).to(tl.int64)
        mask = (index < programs)[:, None] & inside[None, :]
        total += tl.load(partial_ptr + index[:, None] * DIM + columns[None, :], mask=mask, other=0.0)
    tl.store(d_weight_ptr + columns, tl.sum(total, axis=0).to(d_weight_ptr.dtype.element_ty), mask=inside)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, total, inverse_rms = forward(x, weight, residual, epsilon, keep_rms=True)
        ctx.save_for_backward(x if total is None else total, weight, inverse_rms)
        ctx.set_materialize_grads(False)
        return out, total

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  (the decorator's type hides the name of ctx)
    def backward(
        ctx: Any, d_out: torch.Tensor | None, d_total: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if d_out is None:
            return d_total, None, d_total if ctx.needs_input_grad[2] else None, None
        needs_weight = ctx.needs_input_grad[1]
        d_x, d_weight = backward(d_out, d_total, *ctx.saved_tensors, weight_gradient=needs_weight)
        return d_x, d_weight, d_x if ctx.needs_input_grad[2] else None, None


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, epsilon: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Norm rows; see `rms_norm` of the package.

    Args:
        x: `[..., D]`, D at most 16,384.
        weight: `[D]`.
        epsilon: see there.
        residual: see there.
    """
    inputs = [x, weight] if residual is None else [x, weight, residual]
    total: torch.Tensor | None
    if torch.is_grad_enabled() and any(part.requires_grad for part in inputs):
        out, total = _RMSNorm.apply(x, weight, residual, epsilon)
    else:
        out, total, _ = forward(x, weight, residual, epsilon, keep_rms=False)
    return out if total is None else (out, total)


def forward(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, epsilon: float, *, keep_rms: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Out, h where there is a residual, and `[rows]` float32 inverse root mean squares where they are kept.

    Args:
        x: see `rms_norm`, as weight, residual and epsilon.
        weight: see there.
        residual: see there.
        epsilon: see there.
        keep_rms: whether a backward pass follows.
    """
    dim, shape = x.shape[-1], x.shape
    x, residual = _rows(x), None if residual is None else _rows(residual)
    rows = x.shape[0]
    out = torch.empty(shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    total = None if residual is None else torch.empty(shape, dtype=x.dtype, device=x.device)
    inverse_rms = torch.empty(rows, dtype=torch.float32, device=x.device) if keep_rms else None
    if rows:
        tiles, options = _options("forward", x)
        forward_kernel[(tiles,)](
            x, residual, weight.contiguous(), out, total, inverse_rms, x.stride(0),
            0 if residual is None else residual.stride(0), rows, epsilon, DIM=dim, **options,
        )  # fmt: skip
    return out, total, inverse_rms


def backward(
    d_out: torch.Tensor, d_total: torch.Tensor | None, total: torch.Tensor, weight: torch.Tensor,
    inverse_rms: torch.Tensor, *, weight_gradient: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Gradients of h `[..., D]` in its dtype and of the weight, the latter where it is wanted.

    Args:
        d_out: gradient of out.
        d_total: gradient of h as an output, or None.
        total: h.
        weight: as in `rms_norm`.
        inverse_rms: what `forward` kept.
        weight_gradient: whether it is wanted.
    """
    dim, shape = total.shape[-1], total.shape
    d_x = torch.empty(shape, dtype=total.dtype, device=total.device)
    total, d_out = _rows(total), _rows(d_out)
    d_total = None if d_total is None else _rows(d_total)
    rows = total.shape[0]
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if weight_gradient else None
    if not rows:
        return d_x, None if d_weight is None else d_weight.zero_()
    tiles, options = _options("backward", total)
    partial = None
    if weight_gradient:
        partial = torch.empty(tiles, dim, dtype=torch.float32, device=total.device)
    backward_kernel[(tiles,)](
        d_out, d_total, total, weight.contiguous(), inverse_rms, d_x, partial, d_out.stride(0),
        0 if d_total is None else d_total.stride(0), total.stride(0), rows, DIM=dim, **options,
    )  # fmt: skip
    if d_weight is not None:
        parameters = launch_parameters("rms_norm", total.device, kernel="weight", row_dim=dim)
        weight_kernel[(triton.cdiv(dim, parameters["block_columns"]),)](
            partial, d_weight, tiles, DIM=dim, BLOCK_COLUMNS=parameters["block_columns"],
            BLOCK_PROGRAMS=parameters["block_programs"], num_warps=parameters["num_warps"],
        )  # fmt: skip
    return d_x, d_weight


def constants(parameters: dict[str, int], dim: int) -> dict[str, int]:
    """Constants of the forward and backward kernels, and warps.

    Args:
        parameters: from the tuning file.
        dim: width of a row.
    """
    return {
        "BLOCK_DIM": triton.next_power_of_2(dim),
        "BLOCK_ROWS": parameters["block_rows"],
        "NUM_STAGES": parameters["num_stages"],
        "num_warps": parameters["num_warps"],
    }


def _options(kernel: str, rows: torch.Tensor) -> tuple[int, dict[str, int]]:
    """Number of programs, and what else "forward" or "backward" is launched with, for `[rows, D]`."""
    tokens, dim = rows.shape
    # rounded up, so that a server's ever new numbers of tokens find the same few answers
    parameters = launch_parameters(
        "rms_norm", rows.device, kernel=kernel, row_dim=dim, tokens=triton.next_power_of_2(tokens)
    )
    tiles = triton.cdiv(tokens, parameters["block_rows"])
    if parameters["programs_per_processor"]:
        tiles = min(tiles, parameters["programs_per_processor"] * _processors(rows.device))
    return tiles, constants(parameters, dim)


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _rows(x: torch.Tensor) -> torch.Tensor:
    """`[rows, D]` with adjacent numbers; a view wherever there is one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
