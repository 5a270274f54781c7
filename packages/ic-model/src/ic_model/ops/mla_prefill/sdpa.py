"""PyTorch's own attention kernels, memory-efficient (CUTLASS) and cuDNN's; nothing waits for the host.

The memory-efficient kernel, "torch", takes packed sequences, keys and values of different width and a causal mask
aligned bottom right, and uses the tensor cores of every chip from Volta on, Turing included.

cuDNN's, "cudnn", is the fastest on Hopper and takes least: sequences of one length, a causal mask only where there
are as many queries as keys (PyTorch aligns it top left), no log-sum-exp (`_scaled_dot_product_cudnn_attention` has
one, whose layout PyTorch does not document), and what PyTorch says that the installed cuDNN takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.backends import cuda
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# _efficient_attention_forward's custom_mask_type
_NO_MASK, _CAUSAL_BOTTOM_RIGHT = 0, 2


def refuses(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: object) -> str | None:
    """Say why the memory-efficient kernel cannot take the tensors, or None.

    Args:
        q, k, v: of `mla_prefill` or `mla_prefill_dense`.
    """
    if q.device.type != "cuda" or torch.version.hip is not None:
        return f"the tensors are on {q.device}, which is no NVIDIA GPU"
    if q.dtype == torch.bfloat16 and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "the device has no bfloat16"
    for name, part in (("q", q), ("k", k), ("v", v)):
        if part.data_ptr() % 16 or any(stride * part.itemsize % 16 for stride in part.stride()[:-1]):
            return f"{name} is not aligned to 16 bytes: strides {list(part.stride())}"
    return None


def cudnn_refuses(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    return_lse: bool,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
) -> str | None:
    """Say why cuDNN cannot take these arguments, or None.

    Args:
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: of `mla_prefill` or `mla_prefill_dense`.
        softmax_scale, causal, return_lse: of both.
    """
    del softmax_scale
    if q.device.type != "cuda" or torch.version.hip is not None:
        return f"the tensors are on {q.device}, which is no NVIDIA GPU"
    if return_lse:
        return "it returns no log-sum-exp"
    if cu_seqlens_q is not None:
        if cu_seqlens_q.shape[0] != 2:
            return f"there are {cu_seqlens_q.shape[0] - 1} packed sequences; accepted: 1"
        # the lengths are on the device; that they are those of the tensors is what the caller says by these
        if cu_seqlens_k is not cu_seqlens_q or not max_seqlen_q == max_seqlen_k == q.shape[0] == k.shape[0]:
            return "the sequence may be shorter than the tensors, or have other keys than queries"
        if torch.cuda.is_current_stream_capturing():
            return "the length may be another one when the graph is replayed"
        q, k, v = q[None], k[None], v[None]
    if not q.numel() or not k.numel():
        return "there is nothing to attend to"
    if causal and q.shape[1] != k.shape[1]:
        return f"causal, there are {q.shape[1]} queries and {k.shape[1]} keys; accepted: as many"
    # grouped heads come expanded; of the parts only shapes, strides and dtypes are looked at
    query, key, value = (
        part.transpose(1, 2) for part in (q, *(x[:, :, :1].expand(-1, -1, q.shape[2], -1) for x in (k, v)))
    )
    if not cuda.can_use_cudnn_attention(cuda.SDPAParams(query, key, value, None, 0.0, causal, False)):
        return f"PyTorch has no cuDNN kernel for {q.dtype}, rows of {q.shape[-1]} and {v.shape[-1]} on this device"
    return None


def mla_prefill_cudnn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    **_: object,
) -> torch.Tensor:
    """Attend within the one sequence that there is; see `mla_prefill` of the package.

    Args:
        q, k, v, softmax_scale, causal: see there; what else it takes, `cudnn_refuses` has looked at.
    """
    return mla_prefill_dense_cudnn(q[None], k[None], v[None], softmax_scale=softmax_scale, causal=causal)[0]


def mla_prefill_dense_cudnn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    **_: object,
) -> torch.Tensor:
    """Attend in a batch `[B, T, N, dim]`; see `mla_prefill_dense` of the package, but for the layout.

    Args:
        q, k, v, softmax_scale, causal: see there.
    """
    query, key, value = (part.transpose(1, 2) for part in (q, *_expand(k, v, q.shape[2])))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=softmax_scale)
    return out.transpose(1, 2)


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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend within each packed sequence; see `mla_prefill` of the package.

    Args:
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: see there.
        softmax_scale, causal, return_lse: see there.
    """
    lens_q, lens_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    tokens, seq, place = _places(cu_seqlens_q, q.shape[0])
    # the first query of each sequence that sees a key
    first = (lens_q - lens_k).clamp(min=0) if causal else torch.where(lens_k > 0, 0, lens_q)
    seen = (tokens < cu_seqlens_q[-1]) & (place >= first[seq])
    keys, seq_k, _ = _places(cu_seqlens_k, k.shape[0])
    key, value = _expand(k, v, q.shape[1])
    out, lse = _Efficient.apply(
        q[None],
        key[None],
        value[None],
        seen[None, :, None, None],
        first[:, None, None],
        ((keys < cu_seqlens_k[-1]) & (lens_q[seq_k] > 0))[None, :, None, None],
        (cu_seqlens_q.int(), cu_seqlens_k.int(), max_seqlen_q, max_seqlen_k),
        causal,
        softmax_scale,
        return_lse,
    )
    if not return_lse:
        return out[0]
    # [sequences, N, longest, rounded up]
    rows = lse[seq, :, place.clamp(max=max(lse.shape[2] - 1, 0))]
    return out[0], torch.where(seen[:, None], rows, -torch.inf).T.contiguous()


def mla_prefill_dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend in a batch `[B, T, N, dim]`; see `mla_prefill_dense` of the package, but for the layout.

    Args:
        q, k, v, softmax_scale, causal, return_lse: see there.
    """
    key, value = _expand(k, v, q.shape[2])
    queries, keys = q.shape[1], k.shape[1]
    blind = max(0, queries - keys) if causal else queries * (keys == 0)
    seen = torch.arange(queries, device=q.device) >= blind
    out, lse = _Efficient.apply(
        q,
        key,
        value,
        seen[None, :, None, None],
        torch.full((q.shape[0], 1, 1), blind, device=q.device),
        torch.full((), queries > 0, device=q.device),
        (None, None, None, None),
        causal,
        softmax_scale,
        return_lse,
    )
    return (out, torch.where(seen, lse[..., :queries], -torch.inf)) if return_lse else out


class _Efficient(torch.autograd.Function):
    """The memory-efficient kernel and its backward pass, kept from what they leave undefined.

    Of a query that sees no key the kernel's output and log-sum-exp may be anything, and they would enter the
    gradients of all; of a key without queries, and of what lies beyond the last sequence, nothing is written.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        seen: torch.Tensor,
        first: torch.Tensor,
        asked: torch.Tensor,
        lengths: tuple[torch.Tensor | None, torch.Tensor | None, int | None, int | None],
        causal: bool,
        softmax_scale: float,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend.

        Args:
            q, k, v: `[B, T, N, dim]`, B 1 where sequences are packed.
            seen: which queries see a key, broadcastable to the output.
            first: first query of each sequence that does, `[sequences, 1, 1]`.
            asked: which keys have a query, broadcastable to k.
            lengths: cu_seqlens and max_seqlen of queries and keys; None where nothing is packed.
        """
        cu_q, cu_k, max_q, max_k = lengths
        mask = _CAUSAL_BOTTOM_RIGHT if causal else _NO_MASK
        wanted = return_lse or any(ctx.needs_input_grad[:3])
        out, lse, seed, offset, longest_q, longest_k = torch.ops.aten._efficient_attention_forward(
            q, k, v, None, cu_q, cu_k, max_q, max_k, 0.0, mask, wanted, scale=softmax_scale
        )
        out = torch.where(seen, out, 0.0)
        if wanted:
            # the exponential of its difference to a score is then 0
            lse = torch.where(torch.arange(lse.shape[-1], device=q.device) < first, torch.inf, lse)
        ctx.save_for_backward(q, k, v, out, lse, seed, offset, seen, asked, cu_q, cu_k)
        ctx.longest, ctx.mask, ctx.scale = (longest_q, longest_k), mask, softmax_scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k and v from that of the output."""
        q, k, v, out, lse, seed, offset, seen, asked, cu_q, cu_k = ctx.saved_tensors
        dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
            grad_outputs[0].contiguous(), q, k, v, None, out, cu_q, cu_k, *ctx.longest, lse, 0.0, seed, offset,
            ctx.mask, False, scale=ctx.scale,
        )  # fmt: skip
        where = torch.where
        return where(seen, dq, 0.0), where(asked, dk, 0.0), where(asked, dv, 0.0), *(None,) * 7


def _places(cu_seqlens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers of the tokens, the sequence of each (the last one's for what lies beyond), and its place there."""
    tokens = torch.arange(count, device=cu_seqlens.device)
    last = cu_seqlens.shape[0] - 2
    seq = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True).clamp(max=last)
    return tokens, seq, tokens - cu_seqlens[seq]


def _expand(k: torch.Tensor, v: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of every query head: these kernels know no groups."""
    group = heads // k.shape[-2]
    if group == 1:
        return k, v
    return k.repeat_interleave(group, dim=-2), v.repeat_interleave(group, dim=-2)
