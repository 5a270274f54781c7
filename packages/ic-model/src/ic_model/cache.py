"""The cache that `generate` uses: one latent row per token and layer, and nothing else.

Letters: B batch, S cached tokens, T new tokens, C kv_lora_rank, R qk_rope_head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

# growing by half costs at most two copies of a row over a whole generation
_GROWTH = 1.5
_MINIMUM_CAPACITY_TOKENS = 256


class LatentLayer(DynamicLayer):
    """One layer's rows in one buffer `[B, capacity, C + R]` that grows geometrically.

    To transformers it looks like a layer with one key head of C numbers (the normed latent) and one
    value head of R numbers (the rotated shared key); both are views of the rows.

    Args:
        capacity_tokens: rows to allocate at the first update; more are added as needed.
    """

    def __init__(self, capacity_tokens: int = 0) -> None:
        super().__init__()
        self._reserve_tokens = capacity_tokens
        self._buffer: torch.Tensor | None = None
        self._tokens = 0
        self._latent_dim = 0

    @property
    def rows(self) -> torch.Tensor:
        """The cached rows, `[B, S, C + R]`, a view."""
        assert self._buffer is not None, "nothing was cached yet"
        return self._buffer[:, : self._tokens]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the buffer in the dtype and on the device of the first `[B, 1, T, C]` latent."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._latent_dim = key_states.shape[-1]
        self._grow(
            key_states.shape[0], max(key_states.shape[-2], self._reserve_tokens), value_states.shape[-1]
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append T rows.

        Args:
            key_states: `[B, 1, T, C]`, the normed latent.
            value_states: `[B, 1, T, R]`, the rotated shared key.

        Returns:
            all cached latents `[B, 1, S, C]` and shared keys `[B, 1, S, R]`, views of the buffer.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._buffer is not None
        end = self._tokens + key_states.shape[-2]
        if end > self._buffer.shape[1]:
            self._grow(
                key_states.shape[0], max(end, int(self._buffer.shape[1] * _GROWTH)), value_states.shape[-1]
            )
        self._buffer[:, self._tokens : end, : self._latent_dim] = key_states[:, 0]
        self._buffer[:, self._tokens : end, self._latent_dim :] = value_states[:, 0]
        self._tokens = end
        return self._refresh_views()

    def get_seq_length(self) -> int:
        """Cached tokens."""
        return self._tokens

    def reset(self) -> None:
        """Forget all rows and give the memory back."""
        self._buffer = self.keys = self.values = None
        self._tokens = 0
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last rows: `-n` removes n; a positive number is the length to keep, as in older releases."""
        keep = tokens_to_remove if tokens_to_remove > 0 else self._tokens + tokens_to_remove
        self._tokens = max(0, min(keep, self._tokens))
        if self.is_initialized:
            self._refresh_views()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times along the batch."""
        self._replace(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the given sequences of the batch."""
        self._replace(lambda rows: rows[indices])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the batch for beam search."""
        self._replace(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def offload(self) -> None:
        """Move the rows to the CPU."""
        self._replace(lambda rows: rows.to("cpu"))

    def prefetch(self) -> None:
        """Move the rows back to the device they were computed on."""
        self._replace(lambda rows: rows.to(self.device))

    def _grow(self, batch: int, capacity_tokens: int, rope_dim: int) -> None:
        capacity_tokens = max(capacity_tokens, _MINIMUM_CAPACITY_TOKENS)
        grown = torch.empty(
            batch, capacity_tokens, self._latent_dim + rope_dim, dtype=self.dtype, device=self.device
        )
        if self._buffer is not None:
            grown[:, : self._tokens] = self.rows
        self._buffer = grown

    def _replace(self, change: Any) -> None:
        if self._tokens > 0:
            self._buffer = change(self.rows)
            self._refresh_views()

    def _refresh_views(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.rows[:, None]
        self.keys, self.values = rows[..., : self._latent_dim], rows[..., self._latent_dim :]
        return self.keys, self.values


class LatentCache(Cache):
    """A transformers cache of latent rows, `[B, S, C + R]` per layer.

    Args:
        num_layers: layers of the model.
        capacity_tokens: rows to allocate per layer at the first update; 0 lets the cache grow by itself.
            Give the final length where memory is tight: growing holds the old and the new buffer at once.
    """

    def __init__(self, num_layers: int, capacity_tokens: int = 0) -> None:
        super().__init__(layers=[LatentLayer(capacity_tokens) for _ in range(num_layers)])

    @property
    def cached_bytes(self) -> int:
        """Bytes of all rows that hold a token (not of the spare capacity)."""
        layers = [layer for layer in self.layers if layer.get_seq_length()]
        return sum(layer.rows.numel() * layer.rows.element_size() for layer in layers)
