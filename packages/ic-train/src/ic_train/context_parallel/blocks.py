"""Attention between two runs of tokens, and its gradient when the softmax covers more than these keys.

    score[n, i, j] = scale * q[i, n] . k[j, n]      p = exp(score - lse)      out[i, n] = sum_j p[n, i, j] v[j, n]

With the log-sum-exp and the output over ALL keys, which other blocks have contributed to, the gradients of one
block are exact (FlashAttention-2, arXiv 2307.08691, algorithm 2, whose loop over key blocks this is one turn of):

    delta = sum_v d_out out           d_v = p^T d_out
    d_s = p (d_out v^T - delta) scale    d_q = d_s k    d_k = d_s^T q

Letters: N heads, QK and V the dimensions of a query or key and of a value.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from ic_model.ops.dispatch import kernel_refuses
from ic_model.ops.mla_prefill import mla_prefill

# bounds the float32 scores of the formula above: 2**26 of them are 256 MiB
BLOCK_SCORES = 2**26


def block_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, lengths: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of these queries to these keys alone.

    Args:
        q: `[Lq, N, QK]`.
        k: `[Lk, N, QK]`.
        v: `[Lk, N, V]`.
        softmax_scale: factor on the scores.
        lengths: of the documents, in tokens, if queries and keys are the same tokens under a causal mask.

    Returns:
        out `[Lq, N, V]` in q's dtype and lse `[N, Lq]` float32.
    """
    starts_q, starts_k = _starts(q, k, lengths)
    out, lse = mla_prefill(
        q,
        k,
        v,
        cu_seqlens_q=starts_q,
        cu_seqlens_k=starts_k,
        max_seqlen_q=max(lengths, default=q.shape[0]),
        max_seqlen_k=max(lengths, default=k.shape[0]),
        softmax_scale=softmax_scale,
        causal=bool(lengths),
        return_lse=True,
    )
    return out, lse


def block_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    softmax_scale: float,
    lengths: tuple[int, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v through this block.

    Args:
        d_out: `[Lq, N, V]`, gradient of the output over all keys.
        q, k, v, softmax_scale, lengths: of `block_forward`.
        out: `[Lq, N, V]`, the output over all keys.
        lse: `[N, Lq]`, the log-sum-exp over all keys.

    Returns:
        d_q, d_k and d_v, shaped as q, k and v.
    """
    if kernel_refuses(q, k, v) is None:
        return _kernel_backward(d_out, q, k, v, out, lse, softmax_scale, lengths)
    return _formula_backward(d_out, q, k, v, out, lse, softmax_scale, lengths)


def _kernel_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    lengths: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # these take out and lse as arguments; the public op computes its own
    from ic_model.ops.mla_prefill.hopper_launch import gluon_refuses
    from ic_model.ops.mla_prefill.launch import gradients
    from ic_model.ops.mla_prefill.problem import Problem

    starts_q, starts_k = _starts(q, k, lengths)
    q, k, v = q[None], k[None], v[None]
    problem = Problem(
        cu_q=starts_q,
        cu_k=starts_k,
        softmax_scale=softmax_scale,
        causal=bool(lengths),
        gluon=gluon_refuses(q, k, v) is None,
    )
    d_q, d_k, d_v = gradients(
        d_out.to(q.dtype)[None], q, k, v, out.to(q.dtype)[None], lse.contiguous()[None], problem
    )
    return d_q[0], d_k[0], d_v[0]


def _formula_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    lengths: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    key, value = k.float().permute(1, 0, 2), v.float().permute(1, 0, 2)
    documents = None if not lengths else torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    d_q = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    d_k, d_v = torch.zeros_like(key), torch.zeros_like(value)
    block = max(1, BLOCK_SCORES // max(1, q.shape[1] * k.shape[0]))
    for first in range(0, q.shape[0], block):
        rows = slice(first, min(first + block, q.shape[0]))
        query, wanted = q[rows].float().permute(1, 0, 2), d_out[rows].float().permute(1, 0, 2)
        scores = query @ key.transpose(1, 2) * softmax_scale
        if documents is not None:
            places = torch.arange(k.shape[0], device=q.device)
            own = documents.to(q.device)
            hidden = (places > places[rows, None]) | (own != own[rows, None])
            scores = scores.masked_fill(hidden, -torch.inf)
        weights = (scores - lse[:, rows, None]).exp()
        delta = (wanted * out[rows].float().permute(1, 0, 2)).sum(-1, keepdim=True)
        d_scores = weights * (wanted @ value.transpose(1, 2) - delta) * softmax_scale
        d_v += weights.transpose(1, 2) @ wanted
        d_k += d_scores.transpose(1, 2) @ query
        d_q[rows] = (d_scores @ key).permute(1, 0, 2)
    return d_q, d_k.permute(1, 0, 2), d_v.permute(1, 0, 2)


def _starts(q: torch.Tensor, k: torch.Tensor, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    if lengths:
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(q.device, non_blocking=True)
        return starts, starts
    ends = ((0, part.shape[0]) for part in (q, k))
    first, second = (torch.tensor(end, dtype=torch.int32).to(q.device, non_blocking=True) for end in ends)
    return first, second
