"""Our kernels as operators of PyTorch, which torch.compile keeps in the graph of what is around them.

A function that the compiler must not look into ends its graph, and what crosses the border is written to memory
as it is: views of queries, keys and values, and their gradients once more. An operator is a node of the graph, and
strides cross it as they are. What runs is chosen at each call, as without the compiler.
"""

from __future__ import annotations

from typing import Any

import torch

from ic_model.ops.dispatch import kernel_refuses
from ic_model.ops.mla_prefill import _implementations, mla_prefill, mla_prefill_dense

__all__ = ["compiled_attention", "takes_compiled"]

OURS = ("gluon", "triton")

# the kernels read strided inputs: values are a slice of what the up-projection gave, and are not to be copied
_TAGS = (torch.Tag.needs_exact_strides,)
_FORWARD_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, float softmax_scale, str? implementation)"
    " -> (Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? cu_seqlens, "
    "float softmax_scale, str? implementation) -> (Tensor, Tensor, Tensor)"
)


def compiled_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float,
    cu_seqlens: torch.Tensor | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """Causal attention as one node of a compiled graph; formula and gradients are those of `mla_prefill`.

    Args:
        q: `[B, T, N, QK]`, last dimension contiguous.
        k: `[B, T, N_kv, QK]`, likewise.
        v: `[B, T, N_kv, V]`, likewise.
        softmax_scale: positive factor on the scores.
        cu_seqlens: `[sequences + 1]` int32 where the batch, its B T tokens one after the other, is made of
            packed sequences; None where every row of the batch is one.
        implementation: "gluon", "triton" or None, of which `takes_compiled` said that it takes these tensors.

    Returns:
        out `[B, T, N, V]` in q's dtype, contiguous.

    Raises:
        ValueError: when it runs: as `mla_prefill`.
    """
    if cu_seqlens is None:
        return _forward(q, k, v, None, softmax_scale, implementation)[0]
    packed = (part.flatten(0, 1)[None] for part in (q, k, v))
    return _forward(*packed, cu_seqlens, softmax_scale, implementation)[0].view(*q.shape[:3], v.shape[3])


@torch.compiler.assume_constant_result
def takes_compiled(
    device: torch.device, dtype: torch.dtype, qk_dim: int, v_dim: int, implementation: str | None
) -> bool:
    """Whether `mla_prefill_dense` would give tensors like these to one of our kernels.

    The compiler calls it while it traces, and takes the answer for a constant.

    Args:
        device: of all tensors.
        dtype: of q, k and v.
        qk_dim: of a query.
        v_dim: of a value.
        implementation: of `mla_prefill`.
    """
    # a whole tile: cuDNN is asked, too
    q, v = (torch.empty(1, 64, 1, dim, dtype=dtype, device=device) for dim in (qk_dim, v_dim))
    if kernel_refuses(q) is not None:
        return False
    for candidate in _implementations("mla_prefill_dense", q, implementation):
        if implementation not in (None, candidate.name):
            continue
        if candidate.refuses(q, q, v, softmax_scale=1.0, causal=True, return_lse=False) is None:
            return candidate.name in OURS
    return False


@torch.library.custom_op("ic_model::mla_prefill", mutates_args=(), schema=_FORWARD_SCHEMA, tags=_TAGS)
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    softmax_scale: float,
    implementation: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out `[B, T, N, V]` and lse `[B, N, T]`; packed sequences come in a batch of 1."""
    # with lse the op has no kernels but ours, and what it falls back to where they do not compile
    options: dict[str, Any] = {
        "softmax_scale": softmax_scale, "return_lse": True, "implementation": implementation
    }  # fmt: skip
    if cu_seqlens is None:
        out, lse = mla_prefill_dense(*(part.transpose(1, 2) for part in _batched(q, k, v)), **options)
        return out.transpose(1, 2).contiguous(), lse.contiguous()
    longest = q.shape[1]
    out, lse = mla_prefill(
        q[0], k[0], v[0], cu_seqlens_q=cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest, **options
    )
    return out.contiguous()[None], lse.contiguous()[None]


@_forward.register_fake
def _forward_shapes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, heads, _qk = q.shape
    out = q.new_empty(batch, tokens, heads, v.shape[3])
    return out, q.new_empty(batch, heads, tokens, dtype=torch.float32)


@torch.library.custom_op(
    "ic_model::mla_prefill_backward", mutates_args=(), schema=_BACKWARD_SCHEMA, tags=_TAGS
)
def _backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    softmax_scale: float,
    implementation: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, each contiguous, by the kernel that the forward pass chose."""
    # Triton may be missing where this module is imported
    from ic_model.ops.mla_prefill import launch
    from ic_model.ops.mla_prefill.hopper_launch import gluon_refuses
    from ic_model.ops.mla_prefill.problem import Problem

    q, k, v = _batched(q, k, v)
    gluon = implementation != "triton" and gluon_refuses(q, k, v) is None
    problem = Problem(
        cu_q=cu_seqlens, cu_k=cu_seqlens, softmax_scale=softmax_scale, causal=True, gluon=gluon,
        by_name=implementation == "gluon",
    )  # fmt: skip
    return launch.gradients(d_out, q, k, v, out, lse, problem)


@_backward.register_fake
def _backward_shapes(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, ...]:
    return tuple(part.new_empty(part.shape) for part in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_seqlens, softmax_scale, implementation = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
    ctx.softmax_scale, ctx.implementation = softmax_scale, implementation
    ctx.mark_non_differentiable(lse)


def _gradients(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *tensors, cu_seqlens = ctx.saved_tensors
    gradients = _backward(grad_outputs[0], *tensors, cu_seqlens, ctx.softmax_scale, ctx.implementation)
    return *gradients, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


def _batched(*parts: torch.Tensor) -> list[torch.Tensor]:
    """The same tensors; a batch of 1 may come with any stride, and the kernel for Hopper looks at it."""
    return [part[0][None] if part.shape[0] == 1 else part for part in parts]
