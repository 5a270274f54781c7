"""Attention in the latent space, written from the formula in float32.

With the key up-projection absorbed into the query and the value up-projection left to the caller
(DeepSeek-V2, arXiv 2405.04434, section 2.1.2), all heads attend to one shared row per token:

    score[t, n, s] = scale * (q_latent[t, n] . c[s] + q_rope[t, n] . k_rope[s])
    out[t, n]      = sum_s softmax_s(score[t, n])[s] * c[s]

Letters: B batch, T query tokens, S cached tokens, N heads, C kv_lora_rank, R qk_rope_head_dim.
"""

from __future__ import annotations

import torch

# bounds the float32 copies of the cache: 65,536 rows of 320 numbers are 80 MiB
BLOCK_TOKENS = 65536


def latent_attention(
    q: torch.Tensor,
    latent: torch.Tensor,
    *,
    kv_lora_rank: int,
    softmax_scale: float,
    mask: torch.Tensor | None = None,
    block_tokens: int = BLOCK_TOKENS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to dense latent rows.

    Args:
        q: `[B, T, N, C + R]`, the absorbed query followed by the rotated query.
        latent: `[B, S, C + R]`, latent rows: the normed latent followed by the rotated shared key.
        kv_lora_rank: C.
        softmax_scale: factor on the scores.
        mask: boolean, `[B, T, S]` or `[1, T, S]`, True where a query sees a row; None where it sees all.
        block_tokens: rows worked on at a time; bounds the scratch memory, not the result.

    Returns:
        out `[B, T, N, C]` in q's dtype, and the log-sum-exp of the scores `[B, T, N]` in float32. A query
        that sees nothing gets zeros and minus infinity.

    Raises:
        ValueError: the last dimensions of q and latent differ, or are smaller than kv_lora_rank.
    """
    if q.shape[-1] != latent.shape[-1] or q.shape[-1] < kv_lora_rank:
        raise ValueError(
            f"q has rows of {q.shape[-1]} and latent rows of {latent.shape[-1]}; both must be "
            f"kv_lora_rank ({kv_lora_rank}) + qk_rope_head_dim"
        )
    batch, queries, heads, _ = q.shape
    scaled_q = q.float().mul(softmax_scale).flatten(1, 2)
    largest = scaled_q.new_full((batch, queries * heads, 1), -torch.inf)
    total = torch.zeros_like(largest)
    out = scaled_q.new_zeros(batch, queries * heads, kv_lora_rank)
    for start in range(0, latent.shape[1], block_tokens):
        rows = latent[:, start : start + block_tokens].float()
        scores = scaled_q @ rows.transpose(1, 2)
        if mask is not None:
            visible = mask[:, :, None, start : start + block_tokens].expand(batch, -1, heads, -1)
            scores = scores.masked_fill(~visible.flatten(1, 2), -torch.inf)
        new_largest = torch.maximum(largest, scores.amax(-1, keepdim=True))
        # rows that nobody has seen yet keep -inf; subtracting 0 instead avoids inf - inf
        anchor = torch.where(new_largest.isinf(), 0.0, new_largest)
        weights = (scores - anchor).exp()
        decay = (largest - anchor).exp()
        total = total * decay + weights.sum(-1, keepdim=True)
        out = out * decay + weights @ rows[..., :kv_lora_rank]
        largest = new_largest
    out = out / torch.where(total > 0, total, 1.0)
    lse = (largest + total.log()).reshape(batch, queries, heads)
    return out.reshape(batch, queries, heads, kv_lora_rank).to(q.dtype), lse


def mla_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    *,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    kv_lora_rank: int,
    softmax_scale: float,
    kv_scale: float = 1.0,
    q_rope: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to paged latent rows; the last T rows of a sequence are those of its T queries, causally.

    Args:
        q: `[B, T, N, C + R]`, the absorbed query followed by the rotated query; or without that.
        kv_cache: `[pages, page_tokens, C + R]`, the pages of all sequences.
        block_table: `[B, max_pages]` integer, the pages of each sequence in order. Entries past a
            sequence's last page are never read.
        seq_lens: `[B]` integer, cached tokens of each sequence, its T queries included; 0 gives zeros.
        kv_lora_rank: C.
        softmax_scale: factor on the scores.
        kv_scale: what a number in kv_cache is multiplied by.
        q_rope: `[B, T, N, R]`, the rotated query where q lacks it.

    Returns:
        out `[B, T, N, C]` in q's dtype, and the log-sum-exp of the scores `[B, T, N]` in float32.
    """
    q = joined(q, q_rope)
    batch, queries, heads, _ = q.shape
    page_tokens = kv_cache.shape[1]
    out = q.new_zeros(batch, queries, heads, kv_lora_rank)
    lse = torch.full((batch, queries, heads), -torch.inf, dtype=torch.float32, device=q.device)
    for index, tokens in enumerate(seq_lens.tolist()):
        if tokens == 0:
            continue
        pages = block_table[index, : -(-tokens // page_tokens)].long()
        rows = _pages(kv_cache, pages).flatten(0, 1)[:tokens]
        if kv_cache.dtype == torch.float8_e4m3fn or kv_scale != 1.0:
            rows = rows.float() * kv_scale
        last_seen = torch.arange(tokens - queries, tokens, device=q.device)
        mask = torch.arange(tokens, device=q.device) <= last_seen[:, None]
        out[index], lse[index] = (
            part[0]
            for part in latent_attention(
                q[index : index + 1],
                rows[None],
                kv_lora_rank=kv_lora_rank,
                softmax_scale=softmax_scale,
                mask=None if queries == 1 else mask[None],
            )
        )
    return out, lse


def joined(q: torch.Tensor, q_rope: torch.Tensor | None) -> torch.Tensor:
    """`[B, T, N, C + R]`, where q may lack the last R.

    Args:
        q: `[B, T, N, C + R]`, or `[B, T, N, C]`.
        q_rope: `[B, T, N, R]`; None where q has it.
    """
    return q if q_rope is None else torch.cat((q, q_rope), dim=-1)


def _pages(kv_cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Some pages; PyTorch cannot index every 8-bit float on every device."""
    if kv_cache.element_size() > 1:
        return kv_cache[pages]
    return kv_cache.view(torch.uint8)[pages].view(kv_cache.dtype)
