"""Batches for the attention backend without an engine: what vLLM's layer and model runner would hand to it."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from ic_model.ops.latent_cache.reference import quantize
from vllm.v1.attention.backend import CommonAttentionMetadata

from ic_vllm_plugin import compat
from ic_vllm_plugin.attention import LatentImpl
from ic_vllm_plugin.metadata import LatentMetadata, LatentMetadataBuilder

FP8 = torch.float8_e4m3fn
PAGE_TOKENS = 16
SCALE = 0.1
FP8_SCALE = 0.03


@dataclass(frozen=True)
class Dims:
    """Letters as everywhere: C, R, P, V, N."""

    latent: int
    rope: int
    nope: int
    value: int
    heads: int


class KVBProj(torch.nn.Module):
    """In place of vLLM's linear layer: returns the product and no bias."""

    def __init__(self, dims: Dims, dtype: torch.dtype) -> None:
        super().__init__()
        shape = (dims.heads, dims.nope + dims.value, dims.latent)
        weight = torch.randn(shape, dtype=torch.float32) / dims.latent**0.5
        self.weight = torch.nn.Parameter(weight.flatten(0, 1).to(dtype), requires_grad=False)
        self.quant_method = compat.UnquantizedLinearMethod()

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, None]:
        return latents @ self.weight.T, None


def engine_config(dtype: torch.dtype = torch.float32, drafts: int = 0, **section: Any) -> Any:
    """The fields of a VllmConfig that the backend reads."""
    speculative = SimpleNamespace(num_speculative_tokens=drafts, parallel_drafting=False) if drafts else None
    return SimpleNamespace(
        additional_config={"infinite_context": section} if section else {},
        cache_config=SimpleNamespace(gpu_memory_utilization=0.9),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048),
        model_config=SimpleNamespace(dtype=dtype),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        speculative_config=speculative,
        use_v2_model_runner=False,
        compilation_config=SimpleNamespace(static_forward_context={}),
    )


def make_impl(
    monkeypatch: Any, dims: Dims, dtype: torch.dtype, *, config: Any = None, **options: Any
) -> LatentImpl:
    """The impl as MLAAttention makes it."""
    monkeypatch.setattr(compat, "current_vllm_config", lambda: config or engine_config(dtype))
    arguments: dict[str, Any] = {
        "num_heads": dims.heads,
        "head_size": dims.latent + dims.rope,
        "scale": SCALE,
        "num_kv_heads": 1,
        "alibi_slopes": None,
        "sliding_window": None,
        "kv_cache_dtype": "auto",
        "logits_soft_cap": None,
        "attn_type": "decoder",
        "kv_sharing_target_layer_name": None,
        "q_lora_rank": None,
        "kv_lora_rank": dims.latent,
        "qk_nope_head_dim": dims.nope,
        "qk_rope_head_dim": dims.rope,
        "qk_head_dim": dims.nope + dims.rope,
        "v_head_dim": dims.value,
        "kv_b_proj": KVBProj(dims, dtype),
        "indexer": None,
    }
    return LatentImpl(**{**arguments, **options})


def make_builder(
    dims: Dims,
    *,
    drafts: int = 0,
    absorbed_tokens: int | None = None,
    workspace_tokens: int = 100,
    page_tokens: int = PAGE_TOKENS,
    device: str = "cpu",
) -> LatentMetadataBuilder:
    """The builder as the model runner makes it, with a workspace so small that context takes several passes."""
    options = {"absorbed_tokens": absorbed_tokens} if absorbed_tokens else {}
    config = engine_config(drafts=drafts, **options)
    config.compilation_config.static_forward_context["layer"] = SimpleNamespace(
        num_heads=dims.heads,
        kv_lora_rank=dims.latent,
        qk_rope_head_dim=dims.rope,
        qk_nope_head_dim=dims.nope,
        v_head_dim=dims.value,
        impl=SimpleNamespace(warm_up=lambda *_, **__: None),
    )
    builder = LatentMetadataBuilder(
        SimpleNamespace(block_size=page_tokens), ["layer"], config, torch.device(device)
    )
    builder.workspace_tokens = workspace_tokens
    return builder


@dataclass
class Batch:
    """Requests of (query tokens, cached tokens with these), their cache full of NaN elsewhere, and the answer."""

    dims: Dims
    requests: list[tuple[int, int]]
    dtype: torch.dtype
    kv_dtype: str = "auto"
    device: str = "cpu"
    page_tokens: int = PAGE_TOKENS
    options: dict[str, Any] = field(default_factory=dict)
    impl: LatentImpl = field(init=False)

    def prepare(self, monkeypatch: Any) -> "Batch":
        torch.manual_seed(0)
        dims, fp8 = self.dims, self.kv_dtype != "auto"
        config = engine_config(self.dtype, **self.options)
        # as vLLM does while it builds a model
        torch.set_default_dtype(self.dtype)
        try:
            self.impl = make_impl(monkeypatch, dims, self.dtype, config=config, kv_cache_dtype=self.kv_dtype)
        finally:
            torch.set_default_dtype(torch.float32)
        self.impl.kv_b_proj.to(self.device)
        self.k_scale = torch.tensor(FP8_SCALE if fp8 else 1.0, device=self.device)
        self.layer = SimpleNamespace(_k_scale=self.k_scale, _k_scale_float=self.k_scale.item())
        needed = sum(-(-cached // self.page_tokens) for _, cached in self.requests)
        shape = (needed + 9, self.page_tokens, dims.latent + dims.rope)
        # 0x7f is float8's NaN
        self.cache = (
            torch.full(shape, 0x7F, dtype=torch.uint8)
            if fp8
            else torch.full(shape, float("nan"), dtype=self.dtype)
        ).to(self.device)
        free = torch.randperm(needed + 9).tolist()
        widest = max(-(-cached // self.page_tokens) for _, cached in self.requests)
        # beyond a request's pages the table holds what the runner left there
        self.table = torch.full((len(self.requests), widest + 3), 2**31 - 1, dtype=torch.int32)
        self.rows, self.slots, self.queries = [], [], []
        for index, (queries, cached) in enumerate(self.requests):
            pages = torch.tensor([free.pop() for _ in range(-(-cached // self.page_tokens))])
            self.table[index, : len(pages)] = pages.int()
            self.rows.append(torch.randn(cached, dims.latent + dims.rope).to(self.device, self.dtype))
            slots = pages.repeat_interleave(self.page_tokens)[:cached] * self.page_tokens
            self.slots.append((slots + torch.arange(cached) % self.page_tokens).to(self.device))
            query = torch.randn(queries, dims.heads, dims.nope + dims.rope)
            self.queries.append(query.to(self.device, self.dtype))
            # vLLM's kernel takes no step without tokens
            if context := cached - queries:
                self._write(self.rows[-1][:context], self.slots[-1][:context])
        self.table = self.table.to(self.device)
        return self

    def _write(self, rows: torch.Tensor, slots: torch.Tensor) -> None:
        latents, rope = rows.split([self.dims.latent, self.dims.rope], dim=-1)
        self.impl.do_kv_cache_update(
            latents, rope.unsqueeze(1), self.cache, slots, self.kv_dtype, self.k_scale
        )

    def common(self, *, padded_requests: int = 0, padded_tokens: int = 0) -> CommonAttentionMetadata:
        """What the model runner says about the step; padding as for a CUDA graph."""
        lengths = [queries for queries, _ in self.requests] + [0] * padded_requests
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        cached = torch.tensor(
            [cached for _, cached in self.requests] + [0] * padded_requests, dtype=torch.int32
        )
        table = torch.nn.functional.pad(self.table, (0, 0, 0, padded_requests))
        slots = torch.cat(
            [slots[-queries:] for slots, (queries, _) in zip(self.slots, self.requests, strict=True)]
        )
        return CommonAttentionMetadata(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts.clone(),
            seq_lens=cached.to(self.device),
            seq_lens_cpu_upper_bound=cached.clone(),
            num_reqs=len(lengths),
            num_actual_tokens=sum(lengths) + padded_tokens,
            max_query_len=max(lengths),
            max_seq_len=int(cached.max()),
            block_table_tensor=table,
            slot_mapping=torch.nn.functional.pad(slots, (0, padded_tokens), value=-1),
        )

    def run(self, metadata: LatentMetadata) -> torch.Tensor:
        """As MLAAttention.forward_impl does: `[tokens, N, V]`."""
        dims, fp8 = self.dims, self.kv_dtype != "auto"
        tokens = metadata.num_actual_tokens
        own = torch.cat(
            [rows[-queries:] for rows, (queries, _) in zip(self.rows, self.requests, strict=True)]
        )
        query = torch.cat(self.queries)
        self._write(own, metadata.slot_mapping[: len(own)])
        pad = (0, 0, 0, 0, 0, tokens - len(query))
        query, own = torch.nn.functional.pad(query, pad), torch.nn.functional.pad(own, pad[2:])
        cache = self.cache.view(FP8) if fp8 else self.cache
        output = query.new_full((tokens, dims.heads * dims.value), float("nan"))
        weight = self.impl.kv_b_proj.weight.view(dims.heads, dims.nope + dims.value, dims.latent)
        first = metadata.num_decode_tokens
        if first < tokens:
            latents, rope = own[first:].split([dims.latent, dims.rope], dim=-1)
            self.impl.forward_mha(
                query[first:], latents, rope.unsqueeze(1), cache, metadata, self.k_scale, output[first:]
            )
        if first:
            nope, rope = query[:first].split([dims.nope, dims.rope], dim=-1)
            # the layer hands over a transposed view
            absorbed = torch.bmm(nope.transpose(0, 1), weight[:, : dims.nope]).transpose(0, 1)
            latent_out, self.lse = self.impl.forward_mqa((absorbed, rope), cache, metadata, self.layer)
            assert latent_out.is_contiguous() or latent_out.view(-1, dims.heads, dims.latent) is not None
            output[:first] = torch.einsum("tnc,nvc->tnv", latent_out, weight[:, dims.nope :]).flatten(1)
        return output.view(tokens, dims.heads, dims.value)

    def expected(self, decodes: int) -> torch.Tensor:
        """Plain attention in float32; requests from `decodes` on see their own rows as they were computed."""
        found = []
        for index, (rows, query) in enumerate(zip(self.rows, self.queries, strict=True)):
            rows, queries = rows.float(), len(query)
            if self.kv_dtype != "auto":
                stored = quantize(rows, FP8_SCALE).float() * FP8_SCALE
                rows = stored if index < decodes else torch.cat((stored[:-queries], rows[-queries:]))
            found.append(self.plain(query.float(), rows)[0])
        return torch.cat(found)

    def plain(self, query: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output `[T, N, V]` and lse `[T, N]` of one request."""
        dims = self.dims
        weight = self.impl.kv_b_proj.weight.float().view(dims.heads, dims.nope + dims.value, dims.latent)
        keys = torch.einsum("sc,npc->snp", rows[:, : dims.latent], weight[:, : dims.nope])
        keys = torch.cat((keys, rows[:, None, dims.latent :].expand(-1, dims.heads, -1)), dim=-1)
        values = torch.einsum("sc,nvc->snv", rows[:, : dims.latent], weight[:, dims.nope :])
        scores = torch.einsum("tnd,snd->nts", query, keys) * SCALE
        place = torch.arange(len(rows), device=rows.device)
        scores.masked_fill_(place > place[len(rows) - len(query) :, None], float("-inf"))
        return torch.einsum("nts,snv->tnv", scores.softmax(-1), values), scores.logsumexp(-1).T
