"""Decode kernels that vLLM 0.26 ships, called as its MLA backends call them.

What vLLM computes once per step for all layers (scheduler metadata) is computed before the timing, as it is
amortised over the layers there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from bench.cases.common import Prepared, Refused
from bench.cases.mla_decode import PAGE_TOKENS, DecodeProblem
from bench.peers import require_cuda, vllm_module

# vLLM's flash_attn_max_num_splits_for_cuda_graph
GRAPH_SPLITS = 32
# query numbers are about 1; float8 e4m3 reaches 448 and is densest, relatively, above 2**-6
FP8_QUERY_SCALE = 1 / 32


def flashmla(problem: DecodeProblem) -> Prepared:
    """FlashMLA's dense decode kernel; for a float8 cache its float8 kernel, which takes float8 queries."""
    require_cuda(problem.kv_cache)
    module = vllm_module("vllm.v1.attention.ops.flashmla")
    supported, reason = module.is_flashmla_dense_supported()
    if not supported:
        raise Refused(str(reason))
    if problem.case.row_dim != 576:
        raise Refused("FlashMLA has rows of 576 only")
    if problem.case.kv_dtype == "fp8_e4m3":
        return _flashmla_fp8(module, problem)
    # filled by the first call, then reused: the lengths of all input sets are the same
    metadata, _ = module.get_mla_metadata()

    def launch(index: int) -> Any:
        return module.flash_mla_with_kvcache(
            q=problem.q[index],
            k_cache=problem.kv_cache.unsqueeze(-2),
            block_table=problem.block_tables[index],
            cache_seqlens=problem.seq_lens,
            head_dim_v=problem.kv_lora_rank,
            tile_scheduler_metadata=metadata,
            softmax_scale=problem.softmax_scale,
            causal=True,
        )

    return Prepared(launches=_launches(launch, problem), outputs=_flashmla_outputs)


def _flashmla_fp8(module: Any, problem: DecodeProblem) -> Prepared:
    metadata, splits = module.get_mla_metadata_dense_fp8(
        problem.seq_lens, problem.case.query_tokens * problem.case.heads, 1
    )
    queries = [(q / FP8_QUERY_SCALE).to(torch.float8_e4m3fn) for q in problem.q]
    device = problem.kv_cache.device
    descale_q = torch.full((1,), FP8_QUERY_SCALE, dtype=torch.float32, device=device)
    descale_k = torch.full((1,), problem.kv_scale, dtype=torch.float32, device=device)

    def launch(index: int) -> Any:
        return module.flash_mla_with_kvcache_fp8(
            q=queries[index],
            k_cache=problem.kv_cache.unsqueeze(-2),
            block_table=problem.block_tables[index],
            cache_seqlens=problem.seq_lens,
            head_dim_v=problem.kv_lora_rank,
            tile_scheduler_metadata=metadata,
            num_splits=splits,
            softmax_scale=problem.softmax_scale,
            causal=True,
            descale_q=descale_q,
            descale_k=descale_k,
        )

    return Prepared(
        launches=_launches(launch, problem),
        outputs=_flashmla_outputs,
        bound="fp8_query",
        note="float8 queries, quantised before the timing",
    )


def _flashmla_outputs(returned: Any) -> dict[str, torch.Tensor]:
    # its log-sum-exp is [B, N, T]
    return {"out": returned[0], "lse": returned[1].transpose(1, 2)}


def fa3(problem: DecodeProblem) -> Prepared:
    """FlashAttention 3 with the value part of the query apart; it chooses the number of splits itself."""
    return _fa3(problem, num_splits=0)


def fa3_splits32(problem: DecodeProblem) -> Prepared:
    """FlashAttention 3 with at most 32 splits: what vLLM runs when it replays full CUDA graphs."""
    return _fa3(problem, num_splits=GRAPH_SPLITS)


def _fa3(problem: DecodeProblem, num_splits: int) -> Prepared:
    require_cuda(problem.kv_cache)
    case, rank = problem.case, problem.kv_lora_rank
    if case.kv_dtype != "bfloat16":
        raise Refused("FA3 MLA has no float8 cache in vLLM")
    module = vllm_module("vllm.vllm_flash_attn")
    if not module.is_fa_version_supported(3):
        raise Refused(str(module.fa_version_unsupported_reason(3)))
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device=problem.kv_cache.device)
    starts *= case.query_tokens
    longest = max(case.sequence_tokens)
    metadata = module.get_scheduler_metadata(
        batch_size=case.batch,
        max_seqlen_q=case.query_tokens,
        max_seqlen_k=longest,
        num_heads_q=case.heads,
        num_heads_kv=1,
        headdim=case.row_dim - rank,
        cache_seqlens=problem.seq_lens,
        qkv_dtype=torch.bfloat16,
        headdim_v=rank,
        page_size=PAGE_TOKENS,
        cu_seqlens_q=starts,
        causal=True,
        num_splits=num_splits,
    )

    def launch(index: int) -> Any:
        q = problem.q[index].flatten(0, 1)
        return module.flash_attn_varlen_func(
            q=q[..., rank:],
            k=problem.kv_cache[..., rank:].unsqueeze(-2),
            v=problem.kv_cache[..., :rank].unsqueeze(-2),
            q_v=q[..., :rank],
            max_seqlen_q=case.query_tokens,
            cu_seqlens_q=starts,
            max_seqlen_k=longest,
            seqused_k=problem.seq_lens,
            block_table=problem.block_tables[index],
            softmax_scale=problem.softmax_scale,
            causal=True,
            return_softmax_lse=True,
            fa_version=3,
            scheduler_metadata=metadata,
            num_splits=num_splits,
        )

    def outputs(returned: Any) -> dict[str, torch.Tensor]:
        shape = (case.batch, case.query_tokens, case.heads)
        # its log-sum-exp is [N, B * T]
        return {
            "out": returned[0].reshape(*shape, rank),
            "lse": returned[1].transpose(0, 1).reshape(shape),
        }

    return Prepared(launches=_launches(launch, problem), outputs=outputs)


def vllm_triton(problem: DecodeProblem) -> Prepared:
    """The Triton kernel of vLLM, with the number of splits and the scratch memory of its TRITON_MLA backend."""
    require_cuda(problem.kv_cache)
    case = problem.case
    if case.query_tokens != 1:
        raise Refused("TRITON_MLA decodes one query per sequence")
    module = vllm_module("vllm.v1.attention.ops.triton_decode_attention")
    device = problem.kv_cache.device
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    # as TRITON_MLA chooses it: 512 tokens per split, a power of two, at most two splits per multiprocessor
    per_split = max(1, max(case.sequence_tokens) // 512)
    splits = min(1 << (per_split - 1).bit_length(), 2 * processors)
    shape = (case.batch, case.heads)
    scratch = torch.empty((*shape, splits, problem.kv_lora_rank + 1), dtype=torch.float32, device=device)
    scale = torch.tensor(problem.kv_scale, dtype=torch.float32, device=device)
    cache = problem.kv_cache.unsqueeze(2)

    def launch(index: int) -> Any:
        q = problem.q[index].flatten(0, 1)
        out = torch.zeros((*shape, problem.kv_lora_rank), dtype=q.dtype, device=device)
        lse = torch.zeros(shape, dtype=q.dtype, device=device)
        module.decode_attention_fwd(
            q,
            cache,
            cache[..., : problem.kv_lora_rank],
            out,
            lse,
            problem.block_tables[index],
            problem.seq_lens,
            scratch,
            splits,
            problem.softmax_scale,
            PAGE_TOKENS,
            k_scale=scale,
            v_scale=scale,
            is_mla=True,
        )
        return out, lse

    return Prepared(
        launches=_launches(launch, problem),
        outputs=lambda returned: {"out": returned[0].unsqueeze(1), "lse": returned[1].unsqueeze(1)},
    )


def _launches(launch: Any, problem: DecodeProblem) -> list[Any]:
    return [partial(launch, index) for index in range(problem.sets)]
