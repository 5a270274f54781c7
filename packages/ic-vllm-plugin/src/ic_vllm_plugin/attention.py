"""vLLM attention backend for MLA on GPUs, on the kernels of `ic_model.ops`: decode and prefill.

For our architecture it is handed to the layer; every other MLA model takes it with `--attention-backend CUSTOM`.
It builds on vLLM's plain base classes, not on its common MLA ones: those take latent rows of 320 and 576 only,
keep a 64 Ki token workspace and a cloned prefill backend per builder, and differ between the releases supported.

Letters: B requests, T query tokens of one, N heads, C kv_lora_rank, R qk_rope_head_dim, P qk_nope_head_dim, V
v_head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from ic_model.ops.latent_cache.reference import quantize
from ic_model.ops.mla_decode import mla_decode

from ic_vllm_plugin import compat
from ic_vllm_plugin.latent_attention import write_latents
from ic_vllm_plugin.options import read_options
from ic_vllm_plugin.prefill import (
    ContextPass,
    MergedAttention,
    attention,
    gather_rows,
    locate_context,
    plan_context,
    prefill_kernel,
)
from ic_vllm_plugin.workspace import workspace_tokens

# what every kernel can take; the one for Hopper asks for 64, so that is what vLLM is told
PAGE_TOKENS = 64
KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3")
# of ic_model.ops.mla_prefill
PREFILL_DIM_STEP, MAX_PREFILL_DIM = 16, 256


class LatentBackend(compat.AttentionBackend):
    """Description of the backend for vLLM."""

    # float32 for tests on a CPU; no tensor core takes it
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = list(KV_CACHE_DTYPES)

    @staticmethod
    def get_name() -> str:
        """Shown in vLLM's log. CUSTOM is the name by which it is registered: vLLM looks it up again by this."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[LatentImpl]:
        """The attention itself."""
        return LatentImpl

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        """What makes its metadata."""
        return LatentMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Pages of multiples of 64 tokens: what the kernel for Hopper copies at a time."""
        return [compat.MultipleOf(PAGE_TOKENS)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """One row per token for all heads. vLLM 0.32 knows that by itself and does not ask."""
        return (num_blocks, block_size, head_size)

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Empty means any."""
        return []

    @classmethod
    def is_mla(cls) -> bool:
        """The cache holds latent rows."""
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """From Turing on."""
        return capability >= (7, 5)

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Which request a token belongs to is planned on the host (asked for by vLLM 0.32's adaptive drafts)."""
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeBatch:
    """The requests that run absorbed.

    Args:
        block_table: `[B, pages]` int32.
        seq_lens: `[B]` int32, cached tokens with this step's; 0 for a request that only fills a CUDA graph.
        query_tokens: T, the most query tokens of a request.
        rows: None where every request has T. Else `[tokens]` int64, each token's row among `B * T`: a shorter
            request takes the last rows of its T, as the kernel's causal mask is aligned to the end.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_tokens: int
    rows: torch.Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillBatch:
    """The requests that run expanded.

    Args:
        query_starts: `[requests + 1]` int32, from 0.
        max_query_tokens: the longest.
        context: passes over what is cached before this step's tokens.
        chunked_context: asked for by MLAAttention on other backends' account.
    """

    query_starts: torch.Tensor
    max_query_tokens: int
    context: list[ContextPass]
    chunked_context: None = None


@dataclass
class LatentMetadata(compat.AttentionMetadata):
    """One step's batch, short queries first; all layers share it.

    Args:
        num_reqs, num_actual_tokens, max_query_len, max_seq_len: of the batch, as vLLM gives them.
        query_start_loc: `[requests + 1]` int32.
        slot_mapping: `[tokens]` where each token's row goes.
        num_decodes, num_decode_tokens: requests and query tokens that run absorbed.
        num_prefills: requests that run expanded.
        decode, prefill: the two parts.
        causal: always.
    """

    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    query_start_loc: torch.Tensor
    slot_mapping: torch.Tensor
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int
    decode: DecodeBatch | None
    prefill: PrefillBatch | None
    causal: bool = True


class LatentMetadataBuilder(compat.AttentionMetadataBuilder):
    """Makes `LatentMetadata` from what the model runner knows about a step.

    A decode step's metadata are views of the runner's own buffers, so that a CUDA graph can hold them.
    """

    # full CUDA graphs for decode, also with as many query tokens of every request (speculative decoding)
    _cudagraph_support: ClassVar[Any] = compat.AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.page_tokens = kv_cache_spec.block_size
        layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        self.workspace_tokens = workspace_tokens(vllm_config, layer)
        # with drafts in flight, the host's lengths are upper bounds
        self.host_lengths_are_exact = vllm_config.speculative_config is None

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> LatentMetadata:
        """Metadata of one step."""
        common = common_attn_metadata
        decodes, prefills, decode_tokens, _ = compat.split_decodes_and_prefills(
            common, decode_threshold=self.reorder_batch_threshold
        )
        starts = common.query_start_loc_cpu.numpy()
        return LatentMetadata(
            num_reqs=common.num_reqs,
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            query_start_loc=common.query_start_loc,
            slot_mapping=common.slot_mapping,
            num_decodes=decodes,
            num_decode_tokens=decode_tokens,
            num_prefills=prefills,
            decode=self._decode(common, starts[: decodes + 1], decode_tokens) if decodes else None,
            prefill=self._prefill(common, decodes, starts[decodes : common.num_reqs + 1])
            if prefills
            else None,
        )

    def _decode(self, common: Any, starts: np.ndarray, tokens: int) -> DecodeBatch:
        lengths = np.diff(starts)
        requests, longest = len(lengths), max(1, int(lengths.max()))
        rows = None
        # requests without tokens, at the end, fill a CUDA graph: the tokens are padded for them, too
        if tokens != requests * longest or ((lengths != longest) & (lengths != 0)).any():
            ends = np.arange(1, requests + 1) * longest
            # each token's distance from its request's end
            distances = np.repeat(starts[1:], lengths) - np.arange(starts[-1])
            rows = torch.from_numpy(np.repeat(ends, lengths) - distances).to(self.device, non_blocking=True)
        return DecodeBatch(
            block_table=common.block_table_tensor[:requests],
            seq_lens=common.seq_lens[:requests],
            query_tokens=longest,
            rows=rows,
        )

    def _prefill(self, common: Any, first: int, starts: np.ndarray) -> PrefillBatch:
        bounds = starts - starts[0]
        queries = np.diff(bounds)
        block_table = common.block_table_tensor[first:]
        context = self._lengths(common)[first : first + len(queries)] - queries
        return PrefillBatch(
            query_starts=torch.from_numpy(bounds.astype(np.int32)).to(self.device, non_blocking=True),
            max_query_tokens=int(queries.max()),
            context=[
                locate_context(pieces, bounds.tolist(), block_table, self.page_tokens)
                for pieces in plan_context(context.tolist(), self.workspace_tokens)
            ],
        )

    def _lengths(self, common: Any) -> np.ndarray:
        """Cached tokens of each request."""
        host = common.seq_lens_cpu_upper_bound
        exact = host is not None and self.host_lengths_are_exact
        return (host if exact else common.seq_lens.cpu()).numpy()


class LatentImpl(compat.MLAAttentionImpl):
    """The attention of one layer. MLAAttention calls it: first the cache update, then the two forwards."""

    can_return_lse_for_decode: bool = True
    lse_base_on_e: bool = True
    supports_pcp: bool = False
    supports_dcp: bool = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        *,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        kv_b_proj: torch.nn.Module,
        **other_mla_args: Any,
    ) -> None:
        _refuse_features(
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
            indexer=other_mla_args.get("indexer"),
        )
        if attn_type != compat.AttentionType.DECODER:
            raise ValueError(f"attn_type is {attn_type!r}; accepted: {compat.AttentionType.DECODER!r}")
        if kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ValueError(f"kv_cache_dtype is {kv_cache_dtype!r}; accepted: {', '.join(KV_CACHE_DTYPES)}")
        _check_dims(qk_nope_head_dim + qk_rope_head_dim, v_head_dim)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads, kv_cache_dtype
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim = qk_nope_head_dim, qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.kv_b_proj = kv_b_proj
        options = read_options(compat.current_vllm_config())
        self._decode_with = options.decode
        kernel = prefill_kernel(
            options.prefill,
            query_dim=qk_nope_head_dim + qk_rope_head_dim,
            value_dim=v_head_dim,
            dtype=torch.get_default_dtype(),
        )
        self._attend = attention(kernel, self.scale)
        compat.logger().info_once(
            "InfiniteContext attention: decode by %s, prefill by %s.",
            f"ic_model.ops.mla_decode ({options.decode or 'the best for this GPU'})",
            "FlashAttention 3"
            if kernel[0] == "flash_attn"
            else f"ic_model.ops.mla_prefill ({kernel[1] or 'the best for this GPU'})",
        )

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """The output is in the model's dtype."""
        return False

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
    ) -> None:
        """Write latents `[T, C]` and rotated keys `[T, 1, R]` as rows of `[pages, page_tokens, C + R]`."""
        if kv_cache.is_cuda:
            super().do_kv_cache_update(kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale)
            return
        if kv_cache.numel() == 0:
            return
        slots = slot_mapping.flatten()
        latents, rope_keys = kv_c_normed[: len(slots)], k_pe[: len(slots)].flatten(1)
        if kv_cache.dtype in (torch.uint8, torch.float8_e4m3fn):
            latents, rope_keys = (quantize(x, k_scale.item()).view(torch.uint8) for x in (latents, rope_keys))
            kv_cache = kv_cache.view(torch.uint8)
        write_latents(kv_cache, latents, rope_keys, slots)

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: LatentMetadata,
        layer: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Short queries: `[tokens, N, C + R]`, or its two parts, to `[tokens, N, C]` and lse `[tokens, N]`."""
        batch = attn_metadata.decode
        assert batch is not None
        query = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
        requests, tokens = len(batch.seq_lens), len(query)
        if batch.rows is not None:
            padded = query.new_zeros(requests * batch.query_tokens, *query.shape[1:])
            padded[batch.rows] = query[: len(batch.rows)]
            query = padded
        out, lse = self._decode(
            query.view(requests, batch.query_tokens, *query.shape[1:]),
            kv_c_and_k_pe_cache,
            batch,
            layer._k_scale_float if kv_c_and_k_pe_cache.dtype == torch.float8_e4m3fn else 1.0,
        )
        out, lse = out.flatten(0, 1), lse.flatten(0, 1)
        if batch.rows is not None:
            # tokens beyond the requests' are padding, whatever they get
            found = torch.nn.functional.pad(batch.rows, (0, tokens - len(batch.rows)))
            out, lse = out[found], lse[found]
        return out, lse

    def _decode(
        self, query: torch.Tensor, kv_cache: torch.Tensor, batch: DecodeBatch, kv_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        arguments: dict[str, Any] = {
            "block_table": batch.block_table,
            "seq_lens": batch.seq_lens,
            "kv_lora_rank": self.kv_lora_rank,
            "softmax_scale": self.scale,
            "kv_scale": kv_scale,
        }
        if self._decode_with == "turing" and query.is_cuda:
            # by name the op takes it on a Turing card only; asked for elsewhere, it is to be tried there
            from ic_model.ops.mla_decode.turing import mla_decode_turing

            return mla_decode_turing(query, kv_cache, **arguments)
        return mla_decode(query, kv_cache, implementation=self._decode_with, **arguments)

    def forward_mha(
        self,
        q: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: LatentMetadata,
        k_scale: torch.Tensor,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
    ) -> None:
        """Long queries `[tokens, N, P + R]` into output `[tokens, N * V]`; see `prefill`."""
        batch = attn_metadata.prefill
        assert batch is not None
        assert output_scale is None, "fused_output_quant_supported says no"
        keys, values = self._expand(kv_c_normed, k_pe.flatten(1))
        attended, lse = self._attend(
            q,
            keys,
            values,
            query_starts=batch.query_starts,
            key_starts=None,
            max_query_tokens=batch.max_query_tokens,
            max_key_tokens=batch.max_query_tokens,
            causal=True,
            return_lse=bool(batch.context),
        )
        if not batch.context:
            output.copy_(attended.flatten(1))
            return
        assert lse is not None
        # freed before the context takes as much
        del keys, values
        merged = MergedAttention(attended, lse)
        del attended
        for context in batch.context:
            rows = gather_rows(kv_c_and_k_pe_cache, context, q.dtype, k_scale)
            merged.add(context.queries, *self._attend_to(rows, q[context.queries], context))
        output.copy_(merged.output.flatten(1))

    def _attend_to(
        self, rows: torch.Tensor, query: torch.Tensor, context: ContextPass
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._expand(*rows.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1))
        output, lse = self._attend(
            query,
            keys,
            values,
            query_starts=context.query_starts,
            key_starts=context.key_starts,
            max_query_tokens=context.max_query_tokens,
            max_key_tokens=context.max_key_tokens,
            causal=False,
            return_lse=True,
        )
        assert lse is not None
        return output, lse

    def _expand(self, latents: torch.Tensor, rope_keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents `[s, C]` and rotated keys `[s, R]` to keys `[s, N, P + R]` and values `[s, N, V]`."""
        expanded = self.kv_b_proj(latents.contiguous())[0]
        expanded = expanded.view(-1, self.num_heads, self.qk_nope_head_dim + self.v_head_dim)
        nope, values = expanded.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        keys = nope.new_empty(*nope.shape[:2], self.qk_nope_head_dim + self.qk_rope_head_dim)
        keys[..., : self.qk_nope_head_dim] = nope
        keys[..., self.qk_nope_head_dim :] = rope_keys.unsqueeze(1)
        return keys, values


def _refuse_features(**features: Any) -> None:
    for name, value in features.items():
        if value is not None:
            raise ValueError(f"{name} is {value!r}; InfiniteContext's attention accepts None only")


def _check_dims(query_dim: int, value_dim: int) -> None:
    for name, dim in (("qk_nope_head_dim + qk_rope_head_dim", query_dim), ("v_head_dim", value_dim)):
        if dim % PREFILL_DIM_STEP or not 0 < dim <= MAX_PREFILL_DIM:
            raise ValueError(
                f"{name} is {dim}; InfiniteContext's prefill accepts multiples of {PREFILL_DIM_STEP} up to "
                f"{MAX_PREFILL_DIM}"
            )
