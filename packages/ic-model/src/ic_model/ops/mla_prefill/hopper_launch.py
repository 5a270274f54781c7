"""Launches of the kernels for Hopper."""

from __future__ import annotations

from typing import Any

import torch

from ic_model.ops.mla_prefill.blocks import LOG2_E
from ic_model.ops.mla_prefill.problem import Problem, kernel_parameters

# query or key, value: what the kernel for Hopper is written for
GLUON_DIMS = (192, 128)
GLUON_PIECES = (128, 64)
# queries of a block of its backward pass; keys are twice as many
GLUON_SIDE = 64


def forward_gluon(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `launch.forward`, by the kernel for Hopper; what it takes says `gluon_refuses`."""
    from ic_model.ops.mla_prefill.hopper import forward_hopper_kernel

    batch, tokens, heads, _ = q.shape
    out = torch.empty(batch, tokens, heads, v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    if not q.numel() or not k.numel():
        # the copy engine cannot describe what is empty
        return out.zero_(), lse.fill_(-torch.inf)
    parameters = kernel_parameters("gluon", q, v)
    consumers, block_queries = parameters["consumers"], parameters["block_queries"]
    grid = (problem.blocks(batch, tokens, block_queries), heads)
    forward_hopper_kernel[grid](
        *_matrices(q, k, v, block_queries // consumers, parameters["block_keys"]), out, lse,
        problem.cu_q, problem.cu_k, problem.softmax_scale * LOG2_E.value, problem.num_seqs(batch), tokens,
        k.shape[1], *(part.stride(0) // part.stride(1) for part in (q, k, v)),
        *(part.stride(2) for part in (q, k, v)), *out.stride()[:3], *lse.stride()[:2],
        GROUP=heads // k.shape[2], CONSUMERS=consumers, SLOTS=parameters["slots"],
        CAUSAL=problem.causal, PACKED=problem.packed, TURNS=bool(parameters["turns"]) and consumers == 2,
        num_warps=parameters["num_warps"],
    )  # fmt: skip
    return out, lse


def gluon_refuses(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Say why the kernel for Hopper cannot take these tensors, which Triton can; or None.

    Args:
        q, k, v: of `mla_prefill` or, `[B, T, N, dim]`, of `mla_prefill_dense`.
    """
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) != (9, 0):
        return "it is for compute capability 9.0"
    if q.dtype == torch.float32 or (q.shape[-1], v.shape[-1]) != GLUON_DIMS:
        return (
            f"q is {q.dtype} with rows of {q.shape[-1]}, v of {v.shape[-1]}; accepted: 16 bits, {GLUON_DIMS}"
        )
    for name, part in (("q", q), ("k", k), ("v", v)):
        if part.numel() and _not_whole_tokens(part):
            return f"{name} has strides {list(part.stride())}; accepted: whole tokens of 16 bytes each"
    return None


def _not_whole_tokens(part: torch.Tensor) -> bool:
    """Whether the heads of a token lie elsewhere than in a row of a matrix that the copy engine can read."""
    token, head = part.stride()[-3:-1]
    aligned = part.data_ptr() % 16 == 0 and token % 8 == 0 and head % 8 == 0
    row = (part.shape[-2] - 1) * head + part.shape[-1]
    return not (aligned and row <= token and (part.ndim == 3 or part.stride(0) % token == 0))


def backward_gluon(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    problem: Problem,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `launch.backward`, by the kernel for Hopper: not deterministic.

    Args:
        d_out, q, k, v, out, lse, problem: see there.
    """
    from ic_model.ops.mla_prefill.hopper_backward import backward_hopper_kernel
    from ic_model.ops.mla_prefill.hopper_sums import finish_kernel, prepare_kernel

    batch, tokens, heads, _ = q.shape
    d_q, d_k, d_v = (torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (q, k, v))
    if not q.numel() or not k.numel():
        return d_q.zero_(), d_k.zero_(), d_v.zero_()
    if d_out.stride(3) != 1 or _not_whole_tokens(d_out):
        d_out = d_out.contiguous()
    parameters = kernel_parameters("gluon_backward", q, v)
    q_blocks = problem.blocks(batch, tokens, GLUON_SIDE)
    sums = torch.empty(heads * q_blocks * 2, GLUON_SIDE, dtype=torch.float32, device=q.device)
    d_q_sum = torch.empty(heads * q_blocks * GLUON_SIDE * q.shape[3], dtype=torch.float32, device=q.device)
    sizes = (problem.num_seqs(batch), tokens)
    prepare_kernel[(q_blocks, heads)](
        out, d_out, lse, sums, d_q_sum, problem.cu_q, problem.softmax_scale, *sizes, q_blocks, *out.stride()[:3],
        *d_out.stride()[:3], *lse.stride()[:2], V_DIM=v.shape[3], PACKED=problem.packed,
    )  # fmt: skip
    inputs = (q, k, v, d_out)
    backward_hopper_kernel[(problem.blocks(batch, k.shape[1], 2 * GLUON_SIDE), k.shape[2])](
        *_matrices(q, k, v, GLUON_SIDE, GLUON_SIDE), *_matrix(d_out, GLUON_SIDE, (v.shape[3],)),
        _sums_matrix(sums), d_q_sum, d_k, d_v, problem.cu_q, problem.cu_k,
        problem.softmax_scale * LOG2_E.value, problem.softmax_scale,
        *sizes, k.shape[1], q_blocks, *(part.stride(0) // part.stride(1) for part in inputs),
        *(part.stride(2) for part in inputs), *d_k.stride()[:3], *d_v.stride()[:3], GROUP=heads // k.shape[2],
        SLOTS=parameters["slots"], CAUSAL=problem.causal, PACKED=problem.packed, num_warps=parameters["num_warps"],
    )  # fmt: skip
    finish_kernel[(q_blocks, heads)](
        d_q_sum, d_q, problem.cu_q, problem.softmax_scale, *sizes, q_blocks, *d_q.stride()[:3],
        PACKED=problem.packed,
    )  # fmt: skip
    return d_q, d_k, d_v


def _matrices(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows_of_queries: int, rows_of_keys: int
) -> list[Any]:
    """Both pieces of queries and of keys, and values: all tokens as one matrix's rows, for the copy engine."""
    return [
        *_matrix(q, rows_of_queries, GLUON_PIECES),
        *_matrix(k, rows_of_keys, GLUON_PIECES),
        *_matrix(v, rows_of_keys, (v.shape[3],)),
    ]


def _matrix(part: torch.Tensor, block_rows: int, pieces: tuple[int, ...]) -> list[Any]:
    """One tensor in blocks of as many columns as each piece has."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    batch, tokens, heads, dim = part.shape
    batch_stride, token_stride, head_stride, _ = part.stride()
    shape = [(batch - 1) * (batch_stride // token_stride) + tokens, (heads - 1) * head_stride + dim]
    matrix = part.as_strided(shape, (token_stride, 1))
    return [
        TensorDescriptor(matrix, shape, [token_stride, 1], [block_rows, width], layout) for width in pieces
    ]


def _sums_matrix(sums: torch.Tensor) -> Any:
    """The row sums of the backward pass, both rows of a block at a time."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(sums, list(sums.shape), list(sums.stride()), [2, sums.shape[1]], layout)
