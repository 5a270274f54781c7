"""Peers of the memory-bound ops: the reference compiled by PyTorch, vLLM's CUDA ops, Liger."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch

from bench.cases import latent_cache, rms_norm, rope
from bench.cases.common import Prepared, Refused
from bench.peers import compiled, require_cuda, vllm_module


def compiled_rms_norm(problem: rms_norm.NormProblem) -> Prepared:
    """The reference, compiled."""
    require_cuda(problem.weight)
    from ic_model.ops.rms_norm.reference import rms_norm as reference

    function = compiled(reference)
    return problem.prepared(
        lambda x, weight, residual: function(x, weight, epsilon=rms_norm.EPSILON, residual=residual)
    )


def liger_rms_norm(problem: rms_norm.NormProblem) -> Prepared:
    """Liger's Triton kernel."""
    require_cuda(problem.weight)
    if problem.case.residual:
        raise Refused("its plain norm takes no residual")
    try:
        function = import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    except ImportError as error:
        raise Refused(f"liger_kernel does not import: {error}") from error
    # offset 0, weight multiplied after rounding as in Llama, input left as it is
    return problem.prepared(
        lambda x, weight, residual: function.apply(x, weight, rms_norm.EPSILON, 0.0, "llama", False)
    )


def vllm_rms_norm(problem: rms_norm.NormProblem) -> Prepared:
    """CUDA ops of vLLM; the one with a residual overwrites its inputs."""
    require_cuda(problem.weight)
    if problem.case.direction == "backward":
        raise Refused("vLLM's ops have no backward")
    ops = vllm_module("vllm._custom_ops")
    if not problem.case.residual:
        outs = [torch.empty_like(x) for x in problem.x]

        def norm(index: int) -> torch.Tensor:
            ops.rms_norm(outs[index], problem.x[index], problem.weight, rms_norm.EPSILON)
            return outs[index]

        return _per_set(norm, problem)
    sums = [
        (x.clone(), residual.clone())
        for x, residual in zip(problem.x, problem.residual, strict=True)
        if residual is not None
    ]

    def add_and_norm(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        ops.fused_add_rms_norm(*sums[index], problem.weight, rms_norm.EPSILON)
        return sums[index]

    return _per_set(add_and_norm, problem)


def _per_set(launch: Callable[[int], Any], problem: rms_norm.NormProblem) -> Prepared:
    return Prepared(
        launches=[partial(launch, index) for index in range(problem.sets)],
        outputs=problem.forward_outputs,
    )


def compiled_rope(problem: rope.RopeProblem) -> Prepared:
    """The reference, compiled."""
    require_cuda(problem.x[0])
    from ic_model.ops.rope.reference import rope as reference

    return problem.prepared(compiled(reference))


def eager_rope(problem: rope.RopeProblem) -> Prepared:
    """The reference as it is: what a model without a kernel does."""
    from ic_model.ops.rope.reference import rope as reference

    return problem.prepared(reference)


def compiled_latent_cache(problem: latent_cache.LatentProblem) -> Prepared:
    """The reference, compiled."""
    require_cuda(problem.cos)
    from ic_model.ops.latent_cache.reference import latent_cache as reference

    return problem.prepared(compiled(reference))


def vllm_latent_cache(problem: latent_cache.LatentProblem) -> Prepared:
    """Three CUDA ops of vLLM, one after the other: norm, rotation (in place), and the write into the cache."""
    require_cuda(problem.cos)
    ops = vllm_module("vllm._custom_ops")
    case, device = problem.case, problem.cos.device
    positions = torch.arange(case.tokens, device=device)
    # vLLM's table has the dtype of what it rotates
    table = torch.cat((problem.cos, problem.sin), -1).to(torch.bfloat16)
    keys = [k_rope.clone() for k_rope in problem.k_rope]
    cache = problem.empty_cache()
    dtype, stored = "auto", cache
    if case.kv_dtype == "fp8_e4m3":
        dtype, stored = "fp8", cache.view(torch.uint8)
    scale = torch.tensor(problem.kv_scale, dtype=torch.float32, device=device)

    def launch(index: int) -> None:
        normed = torch.empty_like(problem.latent[index])
        ops.rms_norm(normed, problem.latent[index], problem.norm_weight, latent_cache.EPSILON)
        ops.rotary_embedding(positions, keys[index], None, latent_cache.ROPE_DIM, table, False)
        ops.concat_and_cache_mla(normed, keys[index], stored, problem.slots[index], dtype, scale)

    return Prepared(
        launches=[partial(launch, index) for index in range(problem.sets)],
        outputs=lambda returned: problem.written(cache),
        bound="fp8_store" if dtype == "fp8" else "bfloat16",
        note="the rotary table in bfloat16",
    )
