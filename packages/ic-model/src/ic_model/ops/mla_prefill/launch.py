"""Launches of the Triton kernels, and their autograd function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from ic_model.ops.launch import launch_parameters
from ic_model.ops.mla_prefill.backward import delta_kernel, keys_kernel, queries_kernel
from ic_model.ops.mla_prefill.blocks import LOG2_E
from ic_model.ops.mla_prefill.kernel import forward_kernel

# query or key, value: what the kernel for Hopper is written for
GLUON_DIMS = (192, 128)
GLUON_PIECES = (128, 64)
# queries of a block of its backward pass; keys are twice as many
GLUON_SIDE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What is attended to, beside the tensors, which are `[batch, tokens, heads, dim]`.

    Args:
        cu_q: `[sequences + 1]` integer where the sequences are packed into a batch of 1; None in a dense batch.
        cu_k: the same of the keys.
        softmax_scale: factor on the scores.
        causal: bottom-right aligned.
        gluon: whether the forward pass is the kernel for Hopper.
    """

    cu_q: torch.Tensor | None
    cu_k: torch.Tensor | None
    softmax_scale: float
    causal: bool
    gluon: bool = False

    @property
    def packed(self) -> bool:
        """Whether `cu_q` says where sequences begin."""
        return self.cu_q is not None

    def num_seqs(self, batch: int) -> int:
        """Sequences in all."""
        return batch if self.cu_q is None else self.cu_q.shape[0] - 1

    def blocks(self, batch: int, tokens: int, block_tokens: int) -> int:
        """Blocks that hold all sequences of `tokens` tokens in all, wherever they begin; see `locate`."""
        if self.cu_q is None:
            return batch * triton.cdiv(tokens, block_tokens)
        return tokens // block_tokens + self.num_seqs(batch)


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
        # that kernel adds in any order
        fast = ctx.problem.gluon and not torch.are_deterministic_algorithms_enabled()
        return *(backward_gluon if fast else backward)(grad_outputs[0], q, k, v, out, lse, ctx.problem), None


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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend within each packed sequence; see `mla_prefill` of the package.

    Args:
        q, k, v, cu_seqlens_q, cu_seqlens_k: see there.
        max_seqlen_q, max_seqlen_k: unused: the grid follows from the numbers of tokens and sequences.
        softmax_scale, causal, return_lse: see there.
        gluon: see `Problem`.
    """
    problem = Problem(
        cu_q=cu_seqlens_q, cu_k=cu_seqlens_k, softmax_scale=softmax_scale, causal=causal, gluon=gluon
    )
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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend in a batch `[B, T, N, dim]`; see `mla_prefill_dense` of the package, but for the layout.

    Args:
        q, k, v, softmax_scale, causal, return_lse: see there.
        gluon: see `Problem`.
    """
    problem = Problem(cu_q=None, cu_k=None, softmax_scale=softmax_scale, causal=causal, gluon=gluon)
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


def forward_gluon(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `forward`, by the kernel for Hopper; what it takes says `gluon_refuses`."""
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


def backward_gluon(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    problem: Problem,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `backward`, by the kernel for Hopper: not deterministic.

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


def kernel_parameters(kernel: str, q: torch.Tensor, v: torch.Tensor) -> dict[str, int]:
    """Launch parameters of "forward", "gluon", "gluon_backward", "backward_keys" or "backward_queries".

    Args:
        kernel: which.
        q: for its dimension, dtype and device.
        v: for its dimension.
    """
    return launch_parameters(
        "mla_prefill",
        q.device,
        kernel=kernel,
        qk_dim=q.shape[-1],
        v_dim=v.shape[-1],
        element_bytes=q.itemsize,
    )


def widths(qk_dim: int, v_dim: int) -> dict[str, int]:
    """The constants of the kernels that say how wide tiles are.

    Args:
        qk_dim: of a query; taken as its largest power of two, and the rest rounded up to one.
        v_dim: of a value.
    """
    first = 1 << (qk_dim.bit_length() - 1)
    rest = qk_dim - first
    return {
        "QK_DIM": qk_dim,
        "BLOCK_QK_0": first,
        "BLOCK_QK_1": triton.next_power_of_2(rest) if rest else 0,
        "V_DIM": v_dim,
        "BLOCK_V": triton.next_power_of_2(v_dim),
    }


def precision(element: torch.dtype | str) -> str:
    """How `tl.dot` multiplies: float32 as it is, since whoever passes it wants it exact.

    Args:
        element: of the inputs, as PyTorch's or Triton's type.
    """
    return "ieee" if element in (torch.float32, "fp32") else "tf32"


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
