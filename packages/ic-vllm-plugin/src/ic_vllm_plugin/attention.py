"""vLLM attention backend for MLA on GPUs, on the kernels of `ic_model.ops`: decode and prefill.

For our architecture it is handed to the layer; every other MLA model takes it with `--attention-backend CUSTOM`.
It builds on vLLM's plain base classes, not on its common MLA ones: those take latent rows of 320 and 576 only,
keep a 64 Ki token workspace and a cloned prefill backend per builder, and differ between the releases supported.

Letters: B requests, T query tokens of one, N heads, C kv_lora_rank, R qk_rope_head_dim, P qk_nope_head_dim, V
v_head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from ic_model.ops.latent_cache.reference import quantize
from ic_model.ops.mla_decode import mla_decode

from ic_vllm_plugin import compat
from ic_vllm_plugin.latent_attention import write_latents
from ic_vllm_plugin.latent_impl import LatentImplBase
from ic_vllm_plugin.metadata import DecodeBatch, LatentMetadata, LatentMetadataBuilder
from ic_vllm_plugin.options import read_options
from ic_vllm_plugin.prefill import ContextPass, MergedAttention, attention, gather_rows, prefill_kernel

# what every kernel can take; the one for Hopper asks for 64, so that is what vLLM is told
PAGE_TOKENS = 64
FP8 = torch.float8_e4m3fn
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


class LatentImpl(LatentImplBase):
    """The attention of one layer. MLAAttention calls it: first the cache update, then the two forwards."""

    kv_cache_dtypes = KV_CACHE_DTYPES
    can_return_lse_for_decode: bool = True
    lse_base_on_e: bool = True
    supports_dcp: bool = False

    def __init__(self, *arguments: Any, **mla_arguments: Any) -> None:
        super().__init__(*arguments, **mla_arguments)
        # vLLM builds a model with its own dtype as the default
        self._dtype = torch.get_default_dtype()
        query_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        _check_cache(self.kv_cache_dtype, self._dtype)
        _check_dims(query_dim, self.v_head_dim)
        options = read_options(compat.current_vllm_config())
        self._decode_with = options.decode
        kernel = prefill_kernel(
            options.prefill,
            query_dim=query_dim,
            value_dim=self.v_head_dim,
            dtype=self._dtype,
        )
        self._attend = attention(kernel, self.scale)
        compat.logger().info_once(
            "InfiniteContext attention: decode by %s, prefill by %s.",
            f"ic_model.ops.mla_decode ({options.decode or 'the best for this GPU'})",
            "FlashAttention 3"
            if kernel[0] == "flash_attn"
            else f"ic_model.ops.mla_prefill ({kernel[1] or 'the best for this GPU'})",
        )

    def warm_up(self, device: torch.device, *, page_tokens: int, query_tokens: list[int]) -> None:
        """Run every kernel once on zeros, so that what does not compile or run stops the start, not a request.

        Args:
            device: of the model.
            page_tokens: of the cache's pages.
            query_tokens: those that requests run absorbed with.
        """
        dtype = self._dtype
        fp8 = self.kv_cache_dtype.startswith("fp8")
        cache = torch.zeros(2, page_tokens, self.head_size, dtype=FP8 if fp8 else dtype, device=device)
        for tokens in query_tokens:
            latent, rope = (
                torch.zeros(tokens, self.num_heads, dim, dtype=dtype, device=device)
                for dim in (self.kv_lora_rank, self.qk_rope_head_dim)
            )
            batch = DecodeBatch(
                tokens=slice(0, tokens),
                block_table=torch.tensor([[0, 1]], dtype=torch.int32, device=device),
                seq_lens=torch.tensor([2 * page_tokens - 1], dtype=torch.int32, device=device),
                query_tokens=tokens,
                rows=None,
            )
            self._decode_batch(latent, rope, cache, batch, 1.0)
        # Triton compiles numbers that 16 divides apart from others
        for tokens in (64, 65):
            latents = torch.zeros(tokens, self.kv_lora_rank, dtype=dtype, device=device)
            keys, values = self._expand(latents, latents.new_zeros(tokens, self.qk_rope_head_dim))
            starts = torch.tensor([0, tokens], dtype=torch.int32, device=device)
            for causal, return_lse in ((True, False), (True, True), (False, True)):
                self._attend(
                    torch.zeros_like(keys),
                    keys,
                    values,
                    query_starts=starts,
                    key_starts=None if causal else starts.clone(),
                    max_query_tokens=tokens,
                    max_key_tokens=tokens,
                    causal=causal,
                    return_lse=return_lse,
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
        if kv_cache.dtype in (torch.uint8, FP8):
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
        assert attn_metadata.decode is not None
        latent, rope = (
            q if isinstance(q, tuple) else q.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        )
        kv_scale = layer._k_scale_float if kv_c_and_k_pe_cache.dtype == FP8 else 1.0
        parts = [
            self._decode_batch(latent[batch.tokens], rope[batch.tokens], kv_c_and_k_pe_cache, batch, kv_scale)
            for batch in attn_metadata.decode
        ]
        if len(parts) == 1:
            return parts[0]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs), torch.cat(lses)

    def _decode_batch(
        self,
        latent: torch.Tensor,
        rope: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: DecodeBatch,
        kv_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[tokens, N, C]` and `[tokens, N, R]` to `[tokens, N, C]` and `[tokens, N]`.

        Padded in between where lengths differ.
        """
        requests, tokens = len(batch.seq_lens), len(latent)

        def shaped(part: torch.Tensor) -> torch.Tensor:
            if batch.rows is not None:
                padded = part.new_zeros(requests * batch.query_tokens, *part.shape[1:])
                padded[batch.rows] = part[: len(batch.rows)]
                part = padded
            return part.view(requests, batch.query_tokens, *part.shape[1:])

        results = self._decode(
            shaped(latent),
            kv_cache,
            q_rope=shaped(rope),
            block_table=batch.block_table,
            seq_lens=batch.seq_lens,
            kv_lora_rank=self.kv_lora_rank,
            softmax_scale=self.scale,
            kv_scale=kv_scale,
        )
        out, lse = (part.flatten(0, 1) for part in results)
        if batch.rows is not None:
            # tokens beyond the requests' are padding, whatever they get
            found = torch.nn.functional.pad(batch.rows, (0, tokens - len(batch.rows)))
            out, lse = out[found], lse[found]
        return out, lse

    def _decode(
        self, latent: torch.Tensor, kv_cache: torch.Tensor, **arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`mla_decode` by the implementation that was chosen."""
        if self._decode_with == "turing" and latent.is_cuda:
            # by name the op takes it on a Turing card only; asked for elsewhere, it is to be tried there
            from ic_model.ops.mla_decode.turing import mla_decode_turing

            return mla_decode_turing(latent, kv_cache, **arguments)
        return mla_decode(latent, kv_cache, implementation=self._decode_with, **arguments)

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
        expand = self._expander(q)
        for context in batch.context:
            rows = gather_rows(kv_c_and_k_pe_cache, context, q.dtype, k_scale)
            merged.add(context.queries, *self._attend_to(*expand(rows), q[context.queries], context))
        output.copy_(merged.output.flatten(1))

    def _attend_to(
        self, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor, context: ContextPass
    ) -> tuple[torch.Tensor, torch.Tensor]:
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

    def _expander(self, like: torch.Tensor) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """What makes cached rows `[s, C + R]` keys `[s, N, P + R]` and values `[s, N, V]`, all `like` a tensor.

        Where kv_b_proj is a plain matrix, the rotated key goes through the product that makes the others: an
        identity takes it to every head, exactly. So keys are written once, and not copied to stand beside it.
        """
        heads, nope, rope, rank = (
            self.num_heads,
            self.qk_nope_head_dim,
            self.qk_rope_head_dim,
            self.kv_lora_rank,
        )
        if not compat.has_plain_weight(self.kv_b_proj):
            return lambda rows: self._expand(*rows.split([rank, rope], dim=-1))
        # asked for, not read: vLLM may have packed it, as it does for a CPU
        plain = self.kv_b_proj(torch.eye(rank, dtype=like.dtype, device=like.device))[0]
        plain = plain.T.view(heads, nope + self.v_head_dim, rank)
        for_keys = plain.new_zeros(heads, nope + rope, rank + rope)
        for_keys[:, :nope, :rank] = plain[:, :nope]
        for_keys[:, nope:, rank:] = torch.eye(rope, dtype=like.dtype, device=like.device)
        for_keys, for_values = for_keys.flatten(0, 1), plain[:, nope:].flatten(0, 1)

        def expand(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            keys = torch.nn.functional.linear(rows, for_keys)
            values = torch.nn.functional.linear(rows[:, :rank], for_values)
            return keys.view(-1, heads, nope + rope), values.view(-1, heads, self.v_head_dim)

        return expand


def _check_cache(kv_cache_dtype: str, dtype: torch.dtype) -> None:
    if kv_cache_dtype in ("float16", "bfloat16") and str(dtype) != f"torch.{kv_cache_dtype}":
        raise ValueError(
            f"kv_cache_dtype is {kv_cache_dtype!r} and the model's dtype {dtype}; accepted: auto, fp8"
        )


def _check_dims(query_dim: int, value_dim: int) -> None:
    for name, dim in (("qk_nope_head_dim + qk_rope_head_dim", query_dim), ("v_head_dim", value_dim)):
        if dim % PREFILL_DIM_STEP or not 0 < dim <= MAX_PREFILL_DIM:
            raise ValueError(
                f"{name} is {dim}; InfiniteContext's prefill accepts multiples of {PREFILL_DIM_STEP} up to "
                f"{MAX_PREFILL_DIM}"
            )
