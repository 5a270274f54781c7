"""vLLM attention backend for MLA on the CPU, for any latent size.

Handed to the layer as `attn_backend=`: vLLM's CPU platform ignores a backend asked for by name, and
overriding its CPU_MLA slot would change every other MLA model in the environment. vLLM's own CPU
backends take latent rows of 576 only, build the whole score matrix in prefill and can neither chunk
a prefill nor reuse a prefix. The arithmetic is in `latent_attention`; this file translates.

Letters: T query tokens, S cached tokens, N heads, C kv_lora_rank, R qk_rope_head_dim, P
qk_nope_head_dim, V v_head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ic_vllm_plugin import compat
from ic_vllm_plugin.latent_attention import (
    PagedRequest,
    absorbed_attention,
    expanded_attention,
    write_latents,
)
from ic_vllm_plugin.latent_impl import LatentImplBase

# the model's own dtype
KV_CACHE_DTYPES = ("auto",)


def absorbed_query_limit(latent_rank: int, rope_dim: int, nope_dim: int, value_dim: int) -> int:
    """The most query tokens per request for which attention in latent space needs fewer operations.

    Per head and cached token, absorbed attention takes `T (2 C + R)` multiplications, expanded
    attention `T (P + R + V)` and once `C (P + V)` for the expansion.
    """
    saved_per_token = 2 * latent_rank - nope_dim - value_dim
    if saved_per_token <= 0:
        return 2**31 - 1
    return max(1, latent_rank * (nope_dim + value_dim) // saved_per_token)


class CPULatentBackend(compat.AttentionBackend):
    """Description of the backend for vLLM."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = list(KV_CACHE_DTYPES)

    @staticmethod
    def get_name() -> str:
        """Shown in vLLM's log."""
        return "IC_CPU_MLA"

    @staticmethod
    def get_impl_cls() -> type[CPULatentImpl]:
        """The attention itself."""
        return CPULatentImpl

    @staticmethod
    def get_builder_cls() -> type[CPULatentMetadataBuilder]:
        """What makes its metadata."""
        return CPULatentMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Pages of any length."""
        return [compat.MultipleOf(1)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Empty means any."""
        return []

    @classmethod
    def is_mla(cls) -> bool:
        """The cache holds latent rows."""
        return True


@dataclass
class CPULatentMetadata(compat.AttentionMetadata):
    """One step's batch. vLLM has put short queries first: they run absorbed, the rest expanded.

    Args:
        num_actual_tokens: query tokens of the batch.
        num_decodes, num_decode_tokens: requests and query tokens that run absorbed.
        num_prefills: requests that run expanded.
        decode: their pages and lengths; query slices count from the first absorbed token.
        prefill: the same for the expanded ones, counting from the first expanded token.
        slot_mapping: `[tokens]` where each token's row goes.
    """

    num_actual_tokens: int
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int
    decode: list[PagedRequest] | None
    prefill: CPUPrefill | None
    slot_mapping: torch.Tensor


@dataclass
class CPUPrefill:
    """The expanded requests; MLAAttention asks for `chunked_context` on GPUs' account."""

    requests: list[PagedRequest]
    chunked_context: None = None


class CPULatentMetadataBuilder(compat.AttentionMetadataBuilder):
    """Makes `CPULatentMetadata` from what the model runner knows about a step."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        self.page_tokens = kv_cache_spec.block_size
        # the model runner moves queries up to this length to the front of the batch
        self.reorder_batch_threshold = absorbed_query_limit(
            layer.kv_lora_rank, layer.qk_rope_head_dim, layer.qk_nope_head_dim, layer.v_head_dim
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> CPULatentMetadata:
        """Metadata of one step; all layers share it."""
        common = common_attn_metadata
        decodes, prefills, decode_tokens, _ = compat.split_decodes_and_prefills(
            common, decode_threshold=self.reorder_batch_threshold
        )
        starts = common.query_start_loc_cpu.tolist()
        lengths = common.seq_lens.tolist()

        def paged_requests(first: int, last: int, token_offset: int) -> list[PagedRequest]:
            """Requests `[first, last)` of the batch; their query slices count from a token of it."""
            return [
                PagedRequest(
                    slice(starts[i] - token_offset, starts[i + 1] - token_offset),
                    lengths[i],
                    common.block_table_tensor[i, : -(-lengths[i] // self.page_tokens)],
                )
                for i in range(first, last)
                # the model runner may pad the batch with requests without tokens
                if starts[i + 1] > starts[i]
            ]

        prefill = paged_requests(decodes, decodes + prefills, decode_tokens)
        return CPULatentMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decodes=decodes,
            num_decode_tokens=decode_tokens,
            num_prefills=prefills,
            decode=paged_requests(0, decodes, 0) if decodes else None,
            prefill=CPUPrefill(prefill) if prefills else None,
            slot_mapping=common.slot_mapping,
        )


class CPULatentImpl(LatentImplBase):
    """The attention of one layer. MLAAttention calls it: first the cache update, then the two forwards."""

    kv_cache_dtypes = KV_CACHE_DTYPES
    can_return_lse_for_decode: bool = False

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
    ) -> None:
        """Write latents `[T, C]` and rotated keys `[T, 1, R]` as rows of `[pages, block, C + R]`."""
        if kv_cache.numel() == 0:
            return
        slots = slot_mapping.flatten()
        # the batch may be padded beyond the tokens that have a slot
        write_latents(kv_cache, kv_c_normed[: len(slots)], k_pe[: len(slots)].flatten(1), slots)

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: CPULatentMetadata,
        layer: Any,
    ) -> tuple[torch.Tensor, None]:
        """Short queries: `[T, N, C + R]`, or its two parts, to `[T, N, C]`. No log-sum-exp is returned."""
        assert attn_metadata.decode is not None
        query = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
        output = absorbed_attention(
            query, kv_c_and_k_pe_cache, attn_metadata.decode, scale=self.scale, latent_rank=self.kv_lora_rank
        )
        return output, None

    def forward_mha(
        self,
        q: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: CPULatentMetadata,
        k_scale: torch.Tensor,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
    ) -> None:
        """Long queries `[T, N, P + R]` into `output` `[T, N * V]`; keys come from the cache, own rows too."""
        assert attn_metadata.prefill is not None
        assert output_scale is None, "quantised output is never asked for: supports_quant_output is False"
        attended = expanded_attention(
            q,
            kv_c_and_k_pe_cache,
            attn_metadata.prefill.requests,
            self._expand_rows,
            scale=self.scale,
            value_dim=self.v_head_dim,
        )
        output.copy_(attended.flatten(1))

    def _expand_rows(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows `[s, C + R]` to keys `[s, N, P + R]` and values `[s, N, V]`."""
        return self._expand(*rows.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1))
