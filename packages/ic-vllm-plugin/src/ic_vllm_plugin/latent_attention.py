"""Attention over a paged latent cache on the CPU, for any latent size, in bounded memory.

Plain PyTorch, no vLLM: a request's cached rows are read page by page, attended with PyTorch's CPU
flash attention, and the partial results are merged by their log-sum-exp, which is exact. So no score
matrix and no expanded key or value of the whole context ever exists.

Letters: T query tokens, S cached tokens, N heads, C latent rank, R rotary dimensions, P dimensions
without position, V value dimensions. A latent row is C + R numbers: the (normed) latent, then the
rotated key that all heads share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad

# what one step of a loop below may hold beside its inputs. Large enough that the matrix products
# dominate, small enough that a million cached tokens and an 8 GB machine go together.
SCRATCH_BYTES = 64 * 1024 * 1024
# decode reads every row once: below this length splitting it over threads costs more than it saves
MIN_ROWS_PER_SPLIT = 512


@dataclass(frozen=True, slots=True)
class PagedRequest:
    """Where one request's query tokens and cached rows are.

    Args:
        query: its rows of the batch's query tensor.
        cached_tokens: S, tokens in the cache, this step's included.
        block_ids: its pages in order; page i holds tokens `[i * block, (i + 1) * block)`.
        runs: maximal runs of neighbouring pages as `(first page, number of pages)`, derived. A run is
            read in place, without a copy.
    """

    query: slice
    cached_tokens: int
    block_ids: torch.Tensor
    runs: list[tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", _neighbouring_runs(self.block_ids.tolist()))

    @property
    def query_tokens(self) -> int:
        """T, the number of query tokens of this request in this step."""
        return self.query.stop - self.query.start

    @property
    def context_tokens(self) -> int:
        """Cached tokens before this step's: every query token sees all of them."""
        return self.cached_tokens - self.query_tokens


class PartialAttention:
    """Attention over part of the keys, extended part by part (FlashAttention, arXiv 2205.14135, section 3.1).

    With outputs `o_i` and log-sum-exps `l_i` over disjoint sets of keys, attention over their union is
    `sum_i exp(l_i - l) o_i` with `l = log sum_i exp(l_i)`.
    """

    def __init__(self) -> None:
        self._output: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None

    def add(self, output: torch.Tensor, lse: torch.Tensor) -> None:
        """Merge one more part: output `[..., T, V]` in any float dtype, lse `[..., T]` float32."""
        if self._output is None or self._lse is None:
            self._output, self._lse = output, lse
            return
        total = torch.logaddexp(self._lse, lse)
        merged = self._output.float() * (self._lse - total).exp().unsqueeze(-1)
        merged += output.float() * (lse - total).exp().unsqueeze(-1)
        self._output, self._lse = merged, total

    def result(self) -> torch.Tensor:
        """The merged output, `[..., T, V]`; float32 as soon as there was more than one part."""
        assert self._output is not None, "attention over no keys"
        return self._output


def write_latents(
    kv_cache: torch.Tensor, latents: torch.Tensor, rope_keys: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write new tokens' rows into their slots.

    Args:
        kv_cache: `[pages, block, C + R]`, any strides.
        latents: `[T, C]`, the latents as attention sees them.
        rope_keys: `[T, R]`, rotated.
        slots: `[T]` integer `page * block + offset`; negative means padding, which is skipped.
    """
    slots = slots.to(torch.int64)
    if bool((slots < 0).any()):
        kept = slots >= 0
        slots, latents, rope_keys = slots[kept], latents[kept], rope_keys[kept]
    rows = torch.cat((latents, rope_keys), dim=-1).to(kv_cache.dtype)
    block = kv_cache.shape[1]
    kv_cache[slots // block, slots % block] = rows


def absorbed_attention(
    q: torch.Tensor, kv_cache: torch.Tensor, requests: list[PagedRequest], scale: float, latent_rank: int
) -> torch.Tensor:
    """Attention in latent space: each row is key and value of every head at once.

    Cheap when there are few query tokens, since nothing is expanded: DeepSeek-V2 (arXiv 2405.04434,
    section 2.1.2, "absorbed" projections).

    Args:
        q: `[tokens, N, C + R]`, `W_UK` already applied; all requests' tokens in a row.
        kv_cache: `[pages, block, C + R]`, this step's rows included.
        requests: at least one, with disjoint query slices.
        scale: factor on the scores.
        latent_rank: C.

    Returns:
        `[tokens, N, C]` in q's dtype; `W_UV` is still to be applied.
    """
    output = q.new_empty((*q.shape[:2], latent_rank))
    for request in requests:
        query = q[request.query]
        if request.query_tokens == 1:
            partial = _attend_one_token(query, kv_cache, request, scale)
        else:
            partial = _attend_tokens(query, kv_cache, request, scale)
        output[request.query] = partial[..., :latent_rank].to(q.dtype)
    return output


def expanded_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    requests: list[PagedRequest],
    scale: float,
    expand: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    value_dim: int,
) -> torch.Tensor:
    """Attention over keys and values expanded from the latents, a bounded piece at a time.

    Args:
        q: `[tokens, N, P + R]`, rotated; all requests' tokens in a row.
        kv_cache: `[pages, block, C + R]`, this step's rows included.
        requests: at least one, with disjoint query slices.
        scale: factor on the scores.
        expand: maps rows `[s, C + R]` to keys `[s, N, P + R]` and values `[s, N, V]`.
        value_dim: V.

    Returns:
        `[tokens, N, V]` in q's dtype.
    """
    heads, key_dim = q.shape[1:]
    output = q.new_empty((q.shape[0], heads, value_dim))
    # PyTorch's kernel wants keys and values of one width: the narrower is padded with zeros
    width = max(key_dim, value_dim)
    # key, value and the padded copies of both
    piece_tokens = _piece_tokens(4 * heads * width * q.element_size())

    def keys_and_values(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = expand(rows)
        return _heads_first(keys, width), _heads_first(values, width)

    for request in requests:
        query = _heads_first(q[request.query], width)
        partial = PartialAttention()
        for rows in cached_rows(kv_cache, request, 0, request.context_tokens, piece_tokens):
            partial.add(*_flash(query, *keys_and_values(rows), scale=scale, causal=False))
        _add_causal_pieces(partial, query, kv_cache, request, scale, keys_and_values, piece_tokens)
        output[request.query] = partial.result()[0, :, :, :value_dim].transpose(0, 1).to(q.dtype)
    return output


def cached_rows(
    kv_cache: torch.Tensor, request: PagedRequest, start: int, stop: int, piece_tokens: int
) -> Iterator[torch.Tensor]:
    """Yield the rows of tokens `[start, stop)` in order, in pieces of at most `piece_tokens`.

    A piece is a view where its pages are neighbours in memory, else a gathered copy. Rows past `stop`
    are never read: they may hold anything.

    Yields:
        `[s, C + R]` in the cache's dtype.
    """
    block = kv_cache.shape[1]
    in_place = len(request.runs) == 1 and kv_cache[0].is_contiguous() and kv_cache.stride(0) == kv_cache[0].numel()
    for low in range(start, stop, piece_tokens):
        high = min(low + piece_tokens, stop)
        first_page, last_page = low // block, (high - 1) // block
        if in_place:
            page = request.runs[0][0] + first_page
            pages = kv_cache[page : page + last_page - first_page + 1]
        else:
            pages = kv_cache.index_select(0, request.block_ids[first_page : last_page + 1])
        offset = first_page * block
        yield pages.reshape(-1, pages.shape[-1])[low - offset : high - offset]
