"""Launches of the Triton kernels, and their autograd function."""

from __future__ import annotations

from typing import Any

import torch
import triton

from ic_model.ops.dispatch import REFERENCE, Implementation, dispatch
from ic_model.ops.mla_prefill.backward import delta_kernel, keys_kernel, queries_kernel
from ic_model.ops.mla_prefill.blocks import LOG2_E
from ic_model.ops.mla_prefill.hopper_launch import backward_gluon, forward_gluon
from ic_model.ops.mla_prefill.kernel import forward_kernel
from ic_model.ops.mla_prefill.problem import Problem, kernel_parameters, precision, widths


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = (forward_gluon if problem.gluon else forward)(q, k, v, problem)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.problem = problem
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return *gradients(grad_outputs[0], q, k, v, out, lse, ctx.problem), None


def mla_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool = True,
    return_lse: bool = False,
    gluon: bool = False,
    by_name: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend within each packed sequence; see `mla_prefill` of the package.

    Args:
        q, k, v, cu_seqlens_q, cu_seqlens_k: see there.
        max_seqlen_q, max_seqlen_k: unused: the grid follows from the numbers of tokens and sequences.
        softmax_scale, causal, return_lse: see there.
        gluon, by_name: see `Problem`.
    """
    problem = Problem(
        cu_q=cu_seqlens_q, cu_k=cu_seqlens_k, softmax_scale=softmax_scale, causal=causal, gluon=gluon,
        by_name=by_name,
    )  # fmt: skip
    out, lse = attention(q[None], k[None], v[None], problem)
    return (out[0], lse[0]) if return_lse else out[0]


def mla_prefill_dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    return_lse: bool = False,
    gluon: bool = False,
    by_name: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend in a batch `[B, T, N, dim]`; see `mla_prefill_dense` of the package, but for the layout.

    Args:
        q, k, v, softmax_scale, causal, return_lse: see there.
        gluon, by_name: see `Problem`.
    """
    problem = Problem(
        cu_q=None, cu_k=None, softmax_scale=softmax_scale, causal=causal, gluon=gluon, by_name=by_name
    )
    out, lse = attention(q, k, v, problem)
    return (out, lse) if return_lse else out


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out `[batch, tokens_q, N, V]` and lse `[batch, N, tokens_q]`; gradients flow through out alone.

    Args:
        q: `[batch, tokens_q, N, QK]`, last dimension contiguous.
        k: `[batch, tokens_k, N_kv, QK]`, likewise.
        v: `[batch, tokens_k, N_kv, V]`, likewise.
        problem: the rest.
    """
    return _Attention.apply(q, k, v, problem)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attention`, without autograd."""
    batch, tokens, heads, _ = q.shape
    out = torch.empty(batch, tokens, heads, v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    if not q.numel():
        return out, lse
    parameters = kernel_parameters("forward", q, v)
    block_queries, block_keys = parameters["block_queries"], parameters["block_keys"]
    constants = widths(q.shape[3], v.shape[3])
    descriptors = _descriptors(k, v, block_keys, constants, parameters)
    grid = (problem.blocks(batch, tokens, block_queries), heads)
    forward_kernel[grid](
        q, k, v, *descriptors, out, lse, problem.cu_q, problem.cu_k,
        problem.softmax_scale * LOG2_E.value, problem.num_seqs(batch), tokens, k.shape[1],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *lse.stride()[:2],
        GROUP=heads // k.shape[2], **constants, BLOCK_QUERIES=block_queries, BLOCK_KEYS=block_keys,
        CAUSAL=problem.causal, PACKED=problem.packed, DESCRIPTORS=descriptors[0] is not None,
        WARP_SPECIALIZE=bool(parameters["warp_specialize"]), PRECISION=precision(q.dtype),
        num_warps=parameters["num_warps"], num_stages=parameters["num_stages"],
    )  # fmt: skip
    return out, lse


def gradients(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    problem: Problem,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `backward`, by the kernel for Hopper where the problem names it and determinism is not asked for.

    Where that kernel does not compile or launch, `backward` stands in, unless it was asked for by name.

    Args:
        d_out, q, k, v, out, lse, problem: of `backward`.
    """
    # that kernel adds in any order
    fast = problem.gluon and not torch.are_deterministic_algorithms_enabled()
    ways = [Implementation("gluon", lambda: backward_gluon, _takes_all)] if fast else []
    ways.append(Implementation(REFERENCE, lambda: backward, _takes_all))
    wanted = "gluon" if fast and problem.by_name else None
    return dispatch("mla_prefill_backward", ways, wanted, d_out, q, k, v, out, lse, problem)


def _takes_all(*_: Any) -> None:
    """Refuses nothing: what the forward pass took, the backward pass takes."""


def backward(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    problem: Problem,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of q, k and v, each in its dtype and contiguous; deterministic.

    Args:
        d_out: gradient of out.
        q, k, v, problem: as in `attention`.
        out, lse: what it returned.
    """
    batch, tokens, heads, _ = q.shape
    if d_out.stride(3) != 1:
        d_out = d_out.contiguous()
    d_q, d_k, d_v = (torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (q, k, v))
    if not q.numel() or not k.numel():
        return d_q.zero_(), d_k.zero_(), d_v.zero_()
    delta = torch.empty_like(lse)
    constants = widths(q.shape[3], v.shape[3])
    value_constants = {name: constants[name] for name in ("V_DIM", "BLOCK_V")}
    block = 64
    delta_kernel[(triton.cdiv(tokens, block), heads, batch)](
        out, d_out, delta, tokens, *out.stride()[:3], *d_out.stride()[:3], *lse.stride()[:2], **value_constants,
        BLOCK_QUERIES=block,
    )  # fmt: skip
    sizes = (problem.num_seqs(batch), tokens, k.shape[1])
    scales = (problem.softmax_scale * LOG2_E.value, problem.softmax_scale)
    inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3])
    constants |= {
        "GROUP": heads // k.shape[2], "CAUSAL": problem.causal, "PACKED": problem.packed,
        "PRECISION": precision(q.dtype),
    }  # fmt: skip
    parameters = kernel_parameters("backward_keys", q, v)
    block_queries, block_keys = parameters["block_queries"], parameters["block_keys"]
    descriptors = _descriptors(q, d_out, block_queries, constants, parameters)
    keys_kernel[(problem.blocks(batch, k.shape[1], block_keys), k.shape[2])](
        q, k, v, d_out, *descriptors, lse, delta, d_k, d_v, problem.cu_q, problem.cu_k, *scales, *sizes, *inputs,
        *d_k.stride()[:3], *d_v.stride()[:3], *lse.stride()[:2], **constants,
        BLOCK_QUERIES=block_queries, BLOCK_KEYS=block_keys, DESCRIPTORS=descriptors[0] is not None,
        num_warps=parameters["num_warps"], num_stages=parameters["num_stages"],
    )  # fmt: skip
    parameters = kernel_parameters("backward_queries", q, v)
    block_queries, block_keys = parameters["block_queries"], parameters["block_keys"]
    descriptors = _descriptors(k, v, block_keys, constants, parameters)
    queries_kernel[(problem.blocks(batch, tokens, block_queries), heads)](
        q, k, v, d_out, *descriptors, lse, delta, d_q, problem.cu_q, problem.cu_k, *scales, *sizes, *inputs,
        *d_q.stride()[:3], *lse.stride()[:2], **constants,
        BLOCK_QUERIES=block_queries, BLOCK_KEYS=block_keys, DESCRIPTORS=descriptors[0] is not None,
        num_warps=parameters["num_warps"], num_stages=parameters["num_stages"],
    )  # fmt: skip
    return d_q, d_k, d_v


def _descriptors(
    wide: torch.Tensor, value: torch.Tensor, block: int, constants: dict[str, Any], parameters: dict[str, int]
) -> list[Any]:
    """Of both pieces of queries or keys, and of values; None where the parameters or the tensors forbid it.

    The tensor memory accelerator wants everything aligned to 16 bytes.
    """
    parts = ((wide, constants["BLOCK_QK_0"]), (wide, constants["BLOCK_QK_1"]), (value, constants["BLOCK_V"]))
    aligned = all(
        part.data_ptr() % 16 == 0 and all(stride * part.itemsize % 16 == 0 for stride in part.stride()[:3])
        for part in (wide, value)
    )
    if not parameters["tma"] or not aligned or not wide.numel():
        return [None] * len(parts)
    from triton.tools.tensor_descriptor import TensorDescriptor

    return [
        TensorDescriptor(part, list(part.shape), list(part.stride()), [1, block, 1, width]) if width else None
        for part, width in parts
    ]
