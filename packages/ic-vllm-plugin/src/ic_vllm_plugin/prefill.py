"""Prefill over new tokens and cached context in bounded memory, and which kernel attends.

New tokens are attended causally among themselves. Their context is read from the latent cache a workspace at a
time, expanded to keys and values of all heads, attended without a mask and merged in float32 by log-sum-exp,
which is exact (arXiv 2501.01005, section 2.2). vLLM's own does the same with a gather that takes rows of 320 and
576 only and with a workspace that is never smaller than what 64 Ki tokens need.

Letters: T query tokens, N heads, C kv_lora_rank, R qk_rope_head_dim, P qk_nope_head_dim, V v_head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ic_model.ops.mla_prefill import mla_prefill

from ic_vllm_plugin import compat

FLASH_ATTN = "flash_attn"
OPS = "ops"
# The switch between stock FlashAttention and `ic_model.ops.mla_prefill`, by compute capability from which on; what
# cannot take the dimensions is passed over. Not measured inside vLLM yet: bench/cases/serving.py times both.
PREFERRED = {90: (FLASH_ATTN, OPS), 0: (OPS,)}
# (P + R, V) that vLLM passes to FlashAttention 3 without padding
FLASH_ATTN_DIMS = {(192, 128), (256, 256), (128, 128)}


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive cached tokens of one request: `[start, start + tokens)`."""

    request: int
    start: int
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextPass:
    """One workspace full of context, of requests that follow each other.

    Args:
        queries: their query tokens.
        query_starts, key_starts: `[requests + 1]` int32, where each one's queries and rows begin.
        max_query_tokens, max_key_tokens: the longest of each.
        slots: `[rows]` int64, where each row is in the cache: `page * page_tokens + offset`.
    """

    queries: slice
    query_starts: torch.Tensor
    key_starts: torch.Tensor
    max_query_tokens: int
    max_key_tokens: int
    slots: torch.Tensor


def plan_context(context_tokens: Sequence[int], workspace_tokens: int) -> list[list[Piece]]:
    """Divide requests' context into passes that fit the workspace.

    Args:
        context_tokens: cached tokens before this step's, of each request in the batch's order.
        workspace_tokens: rows per pass, at least 1.

    Returns:
        passes of pieces; a pass holds requests that follow each other without a gap, so that their query tokens
        are one slice, and no request without context.
    """
    passes: list[list[Piece]] = []
    room = 0
    for request, tokens in enumerate(context_tokens):
        if room and passes[-1][-1].request != request - 1:
            room = 0
        start = 0
        while start < tokens:
            if not room:
                passes.append([])
                room = workspace_tokens
            taken = min(room, tokens - start)
            passes[-1].append(Piece(request, start, taken))
            start += taken
            room -= taken
    return passes


def locate_context(
    pieces: list[Piece], query_starts: Sequence[int], block_table: torch.Tensor, page_tokens: int
) -> ContextPass:
    """Where a pass's rows and queries are; nothing waits for the device.

    Args:
        pieces: one pass of `plan_context`.
        query_starts: `[requests + 1]`, where each request's query tokens begin.
        block_table: `[requests, pages]` int32 on the device.
        page_tokens: tokens per page.
    """
    device = block_table.device
    first, last = pieces[0].request, pieces[-1].request
    lengths = [piece.tokens for piece in pieces]
    bounds = list(query_starts[first : last + 2])
    table = torch.tensor(
        [[piece.request for piece in pieces], [piece.start for piece in pieces], lengths], dtype=torch.int32
    ).to(device, non_blocking=True)
    request, start, tokens = table
    key_starts = torch.zeros(len(pieces) + 1, dtype=torch.int32, device=device)
    torch.cumsum(tokens, 0, out=key_starts[1:])
    rows = sum(lengths)
    piece = torch.repeat_interleave(torch.arange(len(pieces), device=device), tokens, output_size=rows)
    position = torch.arange(rows, dtype=torch.int32, device=device) - key_starts[piece] + start[piece]
    return ContextPass(
        queries=slice(bounds[0], bounds[-1]),
        query_starts=torch.tensor([bound - bounds[0] for bound in bounds], dtype=torch.int32).to(
            device, non_blocking=True
        ),
        key_starts=key_starts,
        max_query_tokens=max(high - low for low, high in zip(bounds[:-1], bounds[1:], strict=True)),
        max_key_tokens=max(lengths),
        slots=block_table[request[piece], position // page_tokens].long() * page_tokens
        + position % page_tokens,
    )


def gather_rows(
    kv_cache: torch.Tensor, context: ContextPass, dtype: torch.dtype, kv_scale: torch.Tensor
) -> torch.Tensor:
    """A pass's rows of any length, dequantised: `[rows, C + R]` in dtype.

    Args:
        kv_cache: `[pages, page_tokens, C + R]` in dtype or float8_e4m3fn, any strides.
        context: the pass.
        dtype: of the model.
        kv_scale: what a float8 number is multiplied by, one number on the cache's device.
    """
    if kv_cache.dtype != torch.float8_e4m3fn:
        return _rows_at(kv_cache, context.slots)
    # PyTorch indexes bytes everywhere, float8 not
    rows = _rows_at(kv_cache.view(torch.uint8), context.slots).view(kv_cache.dtype)
    return (rows.float() * kv_scale).to(dtype)


def _rows_at(kv_cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    page_tokens = kv_cache.shape[1]
    if kv_cache.stride(0) == page_tokens * kv_cache.stride(1):
        # all rows as one matrix: nothing is to be computed from the slots for every layer
        return kv_cache.flatten(0, 1).index_select(0, slots)
    return kv_cache[slots // page_tokens, slots % page_tokens]


class MergedAttention:
    """Attention over new tokens, extended by attention over one pass of context after the other.

    Kept in float32: a million tokens of context are merged from dozens of passes.
    """

    def __init__(self, output: torch.Tensor, lse: torch.Tensor) -> None:
        self.output, self._lse = output.float(), lse

    def add(self, queries: slice, output: torch.Tensor, lse: torch.Tensor) -> None:
        """Merge attention of some queries over other keys.

        Args:
            queries: which.
            output: `[t, N, V]`.
            lse: `[N, t]` float32; minus infinity where nothing was seen.
        """
        before = self._lse[:, queries]
        total = torch.logaddexp(before, lse)
        anchor = torch.where(total == -torch.inf, 0.0, total)
        kept, added = ((part - anchor).exp().T.unsqueeze(-1) for part in (before, lse))
        self.output[queries].mul_(kept).addcmul_(output, added)
        self._lse[:, queries] = total


def prefill_kernel(
    wanted: str | None, *, query_dim: int, value_dim: int, dtype: torch.dtype
) -> tuple[str, str | None]:
    """Choose what attends: `FLASH_ATTN`, or `OPS` with the name of an implementation or None.

    Args:
        wanted: "flash_attn", "ops", or an implementation of `ic_model.ops.mla_prefill`; None to choose.
        query_dim: P + R.
        value_dim: V.
        dtype: of the model.

    Raises:
        ValueError: FlashAttention was asked for and cannot take these.
    """
    refusal = flash_attn_refuses(query_dim, value_dim, dtype)
    if wanted == FLASH_ATTN and refusal is not None:
        raise ValueError(f"prefill is {FLASH_ATTN!r}, which cannot attend here: {refusal}")
    if wanted is None:
        capability = compat.compute_capability() or 0
        order = next(names for lowest, names in PREFERRED.items() if capability >= lowest)
        wanted = next(name for name in order if name != FLASH_ATTN or refusal is None)
    if wanted == FLASH_ATTN:
        return FLASH_ATTN, None
    return OPS, None if wanted == OPS else wanted


def flash_attn_refuses(query_dim: int, value_dim: int, dtype: torch.dtype) -> str | None:
    """Say why FlashAttention 3 cannot take these dimensions here, or None."""
    if (query_dim, value_dim) not in FLASH_ATTN_DIMS:
        return f"queries of {query_dim} and values of {value_dim}; accepted: {sorted(FLASH_ATTN_DIMS)}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype}; accepted: float16, bfloat16"
    capability = compat.compute_capability() or 0
    if not 90 <= capability < 100:
        return f"compute capability {capability}; accepted: 9.x"
    return None if compat.has_flash_attn_3() else "this vLLM has no FlashAttention 3"


def attention(
    kernel: tuple[str, str | None], softmax_scale: float
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """A function `(q, k, v, query_starts, key_starts, max_query_tokens, max_key_tokens, causal, return_lse)`.

    It takes `[T, N, P + R]`, `[S, N, P + R]` and `[S, N, V]`; it returns `[T, N, V]` and, if asked for, `[N, T]`.

    Args:
        kernel: of `prefill_kernel`.
        softmax_scale: factor on the scores.
    """
    name, implementation = kernel

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        query_starts: torch.Tensor,
        key_starts: torch.Tensor | None,
        max_query_tokens: int,
        max_key_tokens: int,
        causal: bool,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        lengths: dict[str, Any] = {
            "cu_seqlens_q": query_starts,
            "max_seqlen_q": max_query_tokens,
            "max_seqlen_k": max_key_tokens,
            "softmax_scale": softmax_scale,
            "causal": causal,
        }
        if name == FLASH_ATTN:
            keys_from = query_starts if key_starts is None else key_starts
            return compat.flash_attn_3(q, k, v, cu_seqlens_k=keys_from, **lengths)
        found = mla_prefill(
            q,
            k,
            v,
            cu_seqlens_k=key_starts,
            return_lse=return_lse,
            implementation=implementation,
            **lengths,
        )
        return found if isinstance(found, tuple) else (found, None)

    return attend
