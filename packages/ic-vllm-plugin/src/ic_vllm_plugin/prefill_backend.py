"""Our prefill for vLLM's own MLA decode backends: `-ac.mla_prefill_backend CUSTOM`.

vLLM's layer needs a prefill backend that takes the model's dimensions whatever attention backend it has, and on
cards before Ampere none of vLLM's runs. Context is gathered and merged by vLLM here.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ic_vllm_plugin import compat
from ic_vllm_plugin.options import read_options
from ic_vllm_plugin.prefill import attention, prefill_kernel


class OpsPrefillBackend(compat.MLAPrefillBackend):
    """Attention over packed sequences by `ic_model.ops.mla_prefill`, or by FlashAttention where that is better."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    def __init__(self, **shape: Any) -> None:
        super().__init__(**shape)
        query_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        kernel = prefill_kernel(
            read_options(self.vllm_config).prefill,
            query_dim=query_dim,
            value_dim=self.v_head_dim,
            dtype=self.vllm_config.model_config.dtype,
        )
        self._attend = attention(kernel, self.scale)

    @staticmethod
    def get_name() -> str:
        """Shown in vLLM's log."""
        return "CUSTOM"

    def run_prefill_new_tokens(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        return_softmax_lse: bool,
        out: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Causal attention of new tokens among themselves: `[T, N, V]`, and lse `[N, T]` where asked for."""
        assert out is None and output_scale is None, "supports_quant_output and supports_out say no"
        metadata = self._prefill_metadata
        found = self._attend(
            q,
            k,
            v,
            query_starts=metadata.query_start_loc,
            key_starts=None,
            max_query_tokens=metadata.max_query_len,
            max_key_tokens=metadata.max_query_len,
            causal=True,
            return_lse=return_softmax_lse,
        )
        return found if return_softmax_lse else found[0]

    def run_prefill_context_chunk(
        self,
        chunk: Any = None,
        q: Any = None,
        k: Any = None,
        v: Any = None,
        out: torch.Tensor | None = None,
        *,
        chunk_idx: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention to one chunk of context, unmasked: `[T, N, V]` and lse `[N, T]`.

        Args:
            chunk: of vLLM 0.32, which knows its queries and rows.
            q, k, v: `[T, N, P + R]`, `[S, N, P + R]`, `[S, N, V]`.
            out: never given, as supports_out says no.
            chunk_idx: of vLLM 0.26, an index into the step's metadata.
        """
        assert out is None, "supports_out says no"
        if chunk_idx is None:
            starts, longest = chunk.query_start_loc, chunk.max_query_len
            key_starts, longest_key = chunk.cu_seq_lens, chunk.max_seq_len
        else:
            metadata = self._prefill_metadata
            starts, longest = metadata.query_start_loc, metadata.max_query_len
            context = metadata.chunked_context
            key_starts, longest_key = context.cu_seq_lens[chunk_idx], context.max_seq_lens[chunk_idx]
        return self._attend(
            q,
            k,
            v,
            query_starts=starts,
            key_starts=key_starts,
            max_query_tokens=longest,
            max_key_tokens=longest_key,
            causal=False,
            return_lse=True,
        )
