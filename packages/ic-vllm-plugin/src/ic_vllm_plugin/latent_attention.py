"""Attention over a paged latent cache on the CPU, for any latent size, in bounded memory.

Plain PyTorch, no vLLM: a request's cached rows are read a piece at a time, attended with PyTorch's
CPU flash attention, and the partial results are merged by their log-sum-exp, which is exact. So no
score matrix and no expanded key or value of the whole context ever exists.

Letters: T query tokens, S cached tokens, N heads, C latent rank, R rotary dimensions, P dimensions
without position, V value dimensions. A latent row is C + R numbers: the (normed) latent, then the
rotated key that all heads share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

# what one piece may hold beside its inputs: large enough that the matrix products dominate, small
# enough that a million cached tokens and a machine of 8 GB go together
PIECE_BYTES = 64 * 1024 * 1024
# query tokens attended at once: their keys among themselves are expanded in one piece
QUERY_TOKENS = 2048
# attention of few query rows (heads times tokens) is split over threads by its keys, in parts of at least
# so many rows; smaller ones cost more than they save
MAX_SPLIT_QUERY_ROWS = 64
MIN_SPLIT_ROWS = 512
# pages are read in place if runs of neighbours have at least so many on average, else gathered
MIN_RUN_PAGES = 8


@dataclass(frozen=True, slots=True)
class PagedRequest:
    """Where one request's query tokens and cached rows are.

    Args:
        query: its rows of the batch's query tensor.
        cached_tokens: S, tokens in the cache, this step's included.
        pages: `[>= S / block]` integer page numbers; the i-th holds tokens `[i * block, (i + 1) * block)`.
    """

    query: slice
    cached_tokens: int
    pages: torch.Tensor

    @property
    def query_tokens(self) -> int:
        """T, this step's query tokens."""
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
        """The merged output `[..., T, V]`; float32 as soon as there was more than one part."""
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


def unordered_rows(
    kv_cache: torch.Tensor, request: PagedRequest, tokens: int, piece_tokens: int
) -> Iterator[torch.Tensor]:
    """Yield the rows of the first tokens in any order, in pieces of at most `piece_tokens`.

    Attention without a mask does not depend on the order of its keys, and positions are in the rows
    already. So pages are taken in the order of memory, where they mostly are neighbours, and neighbours
    are read in place: gathering them would take as long as attending to them.

    Yields:
        `[s, C + R]` in the cache's dtype. Rows of other tokens never reach the caller.
    """
    block = kv_cache.shape[1]
    piece_pages = max(1, piece_tokens // block)
    pages = request.pages[: tokens // block].to(torch.int64).sort().values
    bounds = [0, *(torch.nonzero(pages.diff() != 1).flatten() + 1).tolist(), len(pages)]
    if len(bounds) * MIN_RUN_PAGES > len(pages):
        for low in range(0, len(pages), piece_pages):
            yield _rows(kv_cache.index_select(0, pages[low : low + piece_pages]))
    else:
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):
            start = int(pages[first])
            for low in range(start, start + last - first, piece_pages):
                yield _rows(kv_cache[low : min(low + piece_pages, start + last - first)])
    if tokens % block:
        yield kv_cache[int(request.pages[tokens // block]), : tokens % block]


def last_rows(kv_cache: torch.Tensor, request: PagedRequest) -> torch.Tensor:
    """The rows of this step's own tokens in order, `[T, C + R]`."""
    block, start = kv_cache.shape[1], request.context_tokens
    first, last = start // block, (request.cached_tokens - 1) // block
    rows = _rows(kv_cache.index_select(0, request.pages[first : last + 1]))
    return rows[start - first * block :][: request.query_tokens]


def _rows(pages: torch.Tensor) -> torch.Tensor:
    return pages.reshape(-1, pages.shape[-1])


def absorbed_attention(
    q: torch.Tensor, kv_cache: torch.Tensor, requests: list[PagedRequest], *, scale: float, latent_rank: int
) -> torch.Tensor:
    """Attention in latent space: each row is the key and the value of every head at once.

    Cheap for few query tokens, since nothing is expanded: DeepSeek-V2 (arXiv 2405.04434, section
    2.1.2) absorbs `W_UK` into the query and `W_UV` into the output.

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
    piece_tokens = _piece_tokens(q.shape[2] * q.element_size())
    for request in requests:
        query = q[request.query].transpose(0, 1).unsqueeze(0)
        attended = _attend_absorbed(query, kv_cache, request, scale, piece_tokens)
        output[request.query] = attended[0, :, :, :latent_rank].transpose(0, 1).to(q.dtype)
    return output


def expanded_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    requests: list[PagedRequest],
    expand: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    *,
    scale: float,
    value_dim: int,
) -> torch.Tensor:
    """Attention over keys and values expanded from the latents, a bounded piece at a time.

    Args:
        q: `[tokens, N, P + R]`, rotated; all requests' tokens in a row.
        kv_cache: `[pages, block, C + R]`, this step's rows included.
        requests: at least one, with disjoint query slices.
        expand: maps rows `[s, C + R]` to keys `[s, N, P + R]` and values `[s, N, V]`.
        scale: factor on the scores.
        value_dim: V.

    Returns:
        `[tokens, N, V]` in q's dtype.
    """
    heads, key_dim = q.shape[1:]
    output = q.new_empty((q.shape[0], heads, value_dim))
    # PyTorch's kernel takes keys and values of one width only: the narrower is padded with zeros
    width = max(key_dim, value_dim)
    # keys and values, each as expanded and as padded
    piece_tokens = _piece_tokens(4 * heads * width * q.element_size())
    for request in requests:
        for part in _split_query(request):
            query = _heads_first(q[part.query], width)
            merged = PartialAttention()
            for rows in unordered_rows(kv_cache, part, part.context_tokens, piece_tokens):
                keys, values = (_heads_first(x, width) for x in expand(rows))
                merged.add(*_flash(query, keys, values, scale=scale))
            keys, values = (_heads_first(x, width) for x in expand(last_rows(kv_cache, part)))
            merged.add(*_flash(query, keys, values, scale=scale, causal=True))
            output[part.query] = merged.result()[0, :, :, :value_dim].transpose(0, 1).to(q.dtype)
    return output


def _split_query(request: PagedRequest) -> Iterator[PagedRequest]:
    """The request as consecutive requests of at most QUERY_TOKENS query tokens: bounded causal pieces."""
    if request.query_tokens <= QUERY_TOKENS:
        yield request
        return
    for low in range(request.query.start, request.query.stop, QUERY_TOKENS):
        high = min(low + QUERY_TOKENS, request.query.stop)
        cached_tokens = request.cached_tokens - (request.query.stop - high)
        yield PagedRequest(slice(low, high), cached_tokens, request.pages)


def _attend_absorbed(
    query: torch.Tensor, kv_cache: torch.Tensor, request: PagedRequest, scale: float, piece_tokens: int
) -> torch.Tensor:
    """`[1, N, T, C + R]` against the context, and causally against this step's own rows."""
    heads, tokens = query.shape[1:3]
    merged = PartialAttention()
    # heads share their keys: as more query rows of one head, they read each row once
    folded = query.reshape(1, 1, heads * tokens, -1)
    # a single token sees its own row, too: nothing is masked
    unmasked_tokens = request.cached_tokens if tokens == 1 else request.context_tokens
    for rows in unordered_rows(kv_cache, request, unmasked_tokens, piece_tokens):
        for output, lse in _attend_in_splits(folded, rows, scale):
            merged.add(output.view(1, heads, tokens, -1), lse.view(1, heads, tokens))
    if tokens > 1:
        keys = last_rows(kv_cache, request).expand(1, heads, -1, -1)
        merged.add(*_flash(query, keys, keys, scale=scale, causal=True))
    return merged.result()


def _attend_in_splits(
    folded: torch.Tensor, rows: torch.Tensor, scale: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`[1, 1, N * T, C + R]` against `[s, C + R]`; few query rows are spread over threads by their keys."""
    splits = 1
    if folded.shape[2] <= MAX_SPLIT_QUERY_ROWS:
        # the kernel gives batch entries to threads, not keys: equal splits become batch entries
        splits = max(1, min(torch.get_num_threads(), len(rows) // MIN_SPLIT_ROWS))
    split_rows = len(rows) // splits
    keys = rows[: splits * split_rows].view(splits, 1, split_rows, -1)
    outputs, lses = _flash(folded.expand(splits, -1, -1, -1), keys, keys, scale=scale)
    yield from zip(outputs.split(1), lses.split(1), strict=True)
    if splits * split_rows < len(rows):
        rest = rows[splits * split_rows :].view(1, 1, -1, rows.shape[-1])
        yield _flash(folded, rest, rest, scale=scale)


def _flash(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float, causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, N, T, width]` and log-sum-exp `[B, N, T]`: PyTorch's own operator, since the public
    function does not return the second, without which partial results cannot be merged.
    """
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, causal, scale=scale
    )
    return output, lse


def _heads_first(x: torch.Tensor, width: int) -> torch.Tensor:
    """`[s, N, d]` as `[1, N, s, width]`, padded with zeros."""
    return pad(x, (0, width - x.shape[-1])).transpose(0, 1).unsqueeze(0)


def _piece_tokens(bytes_per_token: int) -> int:
    """Rows per piece within PIECE_BYTES, a power of two of at least 256."""
    return max(256, 1 << ((PIECE_BYTES // bytes_per_token).bit_length() - 1))
