"""Prefill by PyTorch's attention kernels and by the FlashAttention 3 that vLLM ships."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.cases.common import Prepared, Refused
from bench.cases.mla_prefill import PrefillProblem
from bench.peers import compiled, require_cuda, vllm_module


def sdpa_cudnn(problem: PrefillProblem) -> Prepared:
    """PyTorch's attention by cuDNN."""
    return _sdpa(problem, SDPBackend.CUDNN_ATTENTION)


def sdpa_efficient(problem: PrefillProblem) -> Prepared:
    """PyTorch's memory-efficient attention."""
    return _sdpa(problem, SDPBackend.EFFICIENT_ATTENTION)


def _sdpa(problem: PrefillProblem, backend: SDPBackend) -> Prepared:
    require_cuda(problem.q)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (_by_head(problem, tensor) for tensor in (q, k, v))
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=problem.softmax_scale)
        return _by_token(out)

    return problem.prepared(attention)


def flex(problem: PrefillProblem) -> Prepared:
    """PyTorch's FlexAttention, compiled for the exact shape, with its sparse causal mask."""
    require_cuda(problem.q)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = problem.case.context_tokens
    mask = create_block_mask(_causal, None, None, tokens, tokens, device=str(problem.q.device))
    exact = compiled(partial(flex_attention, block_mask=mask, scale=problem.softmax_scale))

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = exact(*(_by_head(problem, tensor) for tensor in (q, k, v)))
        assert isinstance(out, torch.Tensor), "neither the log-sum-exp nor anything else was asked for"
        return _by_token(out)

    return problem.prepared(attention)


def fa3(problem: PrefillProblem) -> Prepared:
    """FlashAttention 3, forward: what vLLM prefills MLA with on Hopper. Its wheel has no backward."""
    require_cuda(problem.q)
    if problem.case.direction == "backward":
        raise Refused("vLLM ships FA3 without its backward pass")
    module = vllm_module("vllm.vllm_flash_attn")
    if not module.is_fa_version_supported(3):
        raise Refused(str(module.fa_version_unsupported_reason(3)))

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return module.flash_attn_varlen_func(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=problem.cu_seqlens,
            cu_seqlens_k=problem.cu_seqlens,
            max_seqlen_q=problem.case.context_tokens,
            max_seqlen_k=problem.case.context_tokens,
            softmax_scale=problem.softmax_scale,
            causal=True,
            fa_version=3,
        )

    return problem.prepared(attention)


def _causal(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    del batch, head
    return query >= key


def _by_head(problem: PrefillProblem, tensor: torch.Tensor) -> torch.Tensor:
    """`[tokens, N, width]` as `[B, N, T, width]`; nothing is copied."""
    return tensor.unflatten(0, (problem.case.batch, problem.case.context_tokens)).transpose(1, 2)


def _by_token(out: torch.Tensor) -> torch.Tensor:
    return out.transpose(1, 2).flatten(0, 1)
