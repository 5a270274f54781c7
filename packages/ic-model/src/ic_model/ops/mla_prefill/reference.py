"""Exact attention over packed sequences, written from the formula in float32.

    score[n, i, j] = scale * q[i, n] . k[j, n]        out[i, n] = sum_j softmax_j(score[n, i, :])[j] * v[j, n]

Letters: N heads, QK and V the dimensions of a query or key and of a value (192 and 128 in DeepSeek-V3, arXiv
2412.19437, eqs. 9 and 10).
"""

from __future__ import annotations

from itertools import pairwise

import torch

# bounds the float32 scores: 2**26 of them are 256 MiB
BLOCK_SCORES = 2**26


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
    """Attend within each sequence; reads the lengths on the host, and autograd differentiates it.

    Args:
        q: `[tokens_q, N, QK]`.
        k: `[tokens_k, N_kv, QK]`, N a multiple of N_kv.
        v: `[tokens_k, N_kv, V]`.
        cu_seqlens_q: `[sequences + 1]` integer, where each sequence's queries begin; the last is their end.
        cu_seqlens_k: the same of the keys.
        max_seqlen_q: longest sequence of queries in tokens; unused, part of the signature.
        max_seqlen_k: the same of the keys.
        softmax_scale: factor on the scores.
        causal: whether query i of Lq sees only the first i + 1 + Lk - Lq of Lk keys.
        return_lse: whether the log-sum-exp of the scores is returned as well.

    Returns:
        out `[tokens_q, N, V]` in q's dtype, and lse `[N, tokens_q]` in float32 where asked for. A query that sees
        nothing, or belongs to no sequence, gets zeros and minus infinity.
    """
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs: list[torch.Tensor] = []
    lses: list[torch.Tensor] = []
    for index, (start_q, end_q) in enumerate(pairwise(starts_q)):
        keys = slice(starts_k[index], starts_k[index + 1])
        out, lse = _attend(q[start_q:end_q], k[keys], v[keys], softmax_scale, causal)
        outs.append(out)
        lses.append(lse)
    spare = q.shape[0] - starts_q[-1]
    outs.append(q.new_zeros(spare, q.shape[1], v.shape[2]))
    out = torch.cat(outs)
    if not return_lse:
        return out
    lses.append(torch.full((q.shape[1], spare), -torch.inf, device=q.device))
    return out, torch.cat(lses, dim=1).detach()


def mla_prefill_dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend in a batch of sequences of equal length.

    Args:
        q: `[B, T, N, QK]`.
        k: `[B, S, N_kv, QK]`.
        v: `[B, S, N_kv, V]`.
        softmax_scale: see `mla_prefill`, as all that follows.
        causal: see there.
        return_lse: see there.

    Returns:
        out `[B, T, N, V]`, and lse `[B, N, T]` where asked for.
    """
    pairs = [_attend(*parts, softmax_scale, causal) for parts in zip(q, k, v, strict=True)]
    out, lse = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    return (out, lse.detach()) if return_lse else out


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out `[Lq, N, V]` and lse `[N, Lq]` of one sequence, a block of queries at a time."""
    queries, heads, _ = q.shape
    keys = k.shape[0]
    group = heads // k.shape[1]
    key = k.float().repeat_interleave(group, dim=1).permute(1, 2, 0)
    value = v.float().repeat_interleave(group, dim=1).transpose(0, 1)
    block = max(1, BLOCK_SCORES // max(1, heads * keys))
    outs, lses = [], []
    for first in range(0, queries, block):
        scores = q[first : first + block].float().transpose(0, 1) @ key * softmax_scale
        if causal:
            last_seen = torch.arange(first, min(first + block, queries), device=q.device) + keys - queries
            hidden = torch.arange(keys, device=q.device) > last_seen[:, None]
            scores = scores.masked_fill(hidden, -torch.inf)
        lse = scores.logsumexp(dim=-1)
        # what sees nothing has -inf everywhere; subtracting 0 instead avoids inf - inf
        anchor = torch.where(lse.isinf(), 0.0, lse)
        outs.append(((scores - anchor[..., None]).exp() @ value).transpose(0, 1).to(q.dtype))
        lses.append(lse)
    if not outs:
        return q.new_zeros(0, heads, v.shape[2]), q.new_zeros(heads, 0, dtype=torch.float32)
    return torch.cat(outs), torch.cat(lses, dim=1)


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention over two disjoint sets of keys into attention over both, in float32.

    With w_a = e^(lse_a - max(lse_a, lse_b)) and w_b alike, out = (w_a out_a + w_b out_b) / (w_a + w_b)
    (arXiv 2501.01005, section 2.2). A side whose log-sum-exp is minus infinity saw nothing, and its out is not
    read: it may be anything.

    Args:
        out_a: `[tokens, N, V]`.
        lse_a: `[N, tokens]` float32, natural logarithm.
        out_b: as out_a.
        lse_b: as lse_a.

    Returns:
        out in out_a's dtype and lse; zeros and minus infinity where neither side saw anything.

    Raises:
        ValueError: the shapes do not belong together.
    """
    tokens, heads, _ = out_a.shape
    if out_b.shape != out_a.shape or lse_a.shape != (heads, tokens) or lse_b.shape != (heads, tokens):
        raise ValueError(
            f"out_a has shape {list(out_a.shape)}, out_b {list(out_b.shape)}, lse_a {list(lse_a.shape)} and lse_b "
            f"{list(lse_b.shape)}; accepted: [tokens, N, V] twice and [N, tokens] twice"
        )
    largest = torch.maximum(lse_a, lse_b)
    anchor = torch.where(largest == -torch.inf, 0.0, largest)
    weight_a, weight_b = ((lse.float() - anchor).exp() for lse in (lse_a, lse_b))
    total = weight_a + weight_b
    factor = 1.0 / torch.where(total > 0, total, 1.0)
    out = sum(
        # not only times 0: what saw nothing may be NaN
        torch.where((weight > 0).T[..., None], part.float(), 0.0) * (weight * factor).T[..., None]
        for part, weight in ((out_a, weight_a), (out_b, weight_b))
    )
    assert isinstance(out, torch.Tensor)
    return out.to(out_a.dtype), anchor + torch.where(total > 0, total.log(), -torch.inf)


def merge_attention_(out: torch.Tensor, lse: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor) -> None:
    """As `merge_attention`, in place and in fewer operations: every query must have seen a key on both sides.

    The weights of the two sides are then w and 1 - w with w = sigmoid(lse_b - lse).

    Args:
        out: `[tokens, N, V]` float32; overwritten.
        lse: `[N, tokens]` float32, natural logarithm, finite; overwritten.
        out_b: `[tokens, N, V]`.
        lse_b: as lse.

    Raises:
        RuntimeError: from PyTorch: the shapes do not belong together, or out is not float32.
    """
    weight = torch.sigmoid(lse_b - lse)
    out.lerp_(out_b.float(), weight.T[..., None])
    torch.logaddexp(lse, lse_b, out=lse)
