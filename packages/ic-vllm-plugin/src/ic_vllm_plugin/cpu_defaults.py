"""Defaults for serving on a machine without a GPU: what the KV cache may take, and the context that fits.

vLLM's CPU defaults reserve 92 % of all memory and fail when less is free; with a context of a million
tokens on a small machine they fail again. Whatever the user sets stays as it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ic_vllm_plugin import compat
from ic_vllm_plugin.options import SECTION, Options, read_options

if TYPE_CHECKING:
    from vllm.config import VllmConfig

GIB = 1024**3
# vLLM's three processes and one step's activations
PROCESSES_BYTES = 3 * GIB
# of what is free beyond that; the rest stays for the file cache and for other programs
KV_SHARE = 0.7
# or less: one request of full length, or this. vLLM writes the whole cache at the start, so that what is
# never used costs memory and seconds
KV_TARGET_BYTES = 2 * GIB
# below this a server would be of no use, so the start fails instead
MIN_CONTEXT_TOKENS = 1024
# up to so many cores, vLLM's worker gets all of them
FEW_CORES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class CPUMemoryPlan:
    """How memory is used: bytes for the KV cache, and the longest request in tokens that it can hold."""

    kv_cache_bytes: int
    context_tokens: int


def plan_cpu_memory(
    *,
    available_bytes: int,
    weight_bytes: int,
    kv_bytes_per_token: int,
    context_tokens: int,
    page_tokens: int,
    kv_cache_bytes: int | None = None,
) -> CPUMemoryPlan:
    """Divide a machine's free memory.

    Args:
        available_bytes: free memory for one worker.
        weight_bytes: its share of the weights.
        kv_bytes_per_token: of its layers together.
        context_tokens: what the model is meant for.
        page_tokens: tokens per page of the cache; one page is vLLM's own.
        kv_cache_bytes: the size if the user chose one.

    Raises:
        ValueError: not even a short context fits. Names what is free, what is needed and what to change.
    """
    page_bytes = page_tokens * kv_bytes_per_token
    chosen = kv_cache_bytes
    if kv_cache_bytes is None:
        # twice: the loader holds a tensor beside the parameter that it fills, and layers repack
        free = available_bytes - PROCESSES_BYTES - 2 * weight_bytes
        full_context_bytes = (-(-context_tokens // page_tokens) + 1) * page_bytes
        kv_cache_bytes = min(int(free * KV_SHARE), max(full_context_bytes, KV_TARGET_BYTES))
    fitting_tokens = max(1, kv_cache_bytes // page_bytes - 1) * page_tokens
    # a size of the user's own is vLLM's to judge
    if chosen is None and fitting_tokens < min(MIN_CONTEXT_TOKENS, context_tokens):
        raise ValueError(
            f"not enough memory: {available_bytes / GIB:.1f} GiB free, of which weights take about "
            f"{2 * weight_bytes / GIB:.1f} GiB and vLLM's processes {PROCESSES_BYTES / GIB:.1f} GiB; the KV "
            f"cache needs at least {(MIN_CONTEXT_TOKENS + page_tokens) * kv_bytes_per_token / GIB:.2f} GiB. "
            "Free some memory, or set --kv-cache-memory-bytes and --max-model-len yourself."
        )
    return CPUMemoryPlan(kv_cache_bytes=kv_cache_bytes, context_tokens=min(context_tokens, fitting_tokens))


def weight_bits(quantization: Mapping[str, Any]) -> set[int]:
    """How many bits the weights have, by config.json's quantization_config; empty where it does not say.

    Args:
        quantization: as GPTQ and AWQ write it, or compressed-tensors.
    """
    groups = (quantization.get("config_groups") or {}).values()
    weights = [group.get("weights") or {} for group in groups]
    found = [quantization.get("bits"), *(one.get("num_bits") for one in weights)]
    return {int(bits) for bits in found if bits is not None}


def apply_cpu_defaults(vllm_config: VllmConfig) -> None:
    """Set what the user did not: the KV cache's size, a context that fits (a cap is logged), the threads.

    Raises:
        ValueError: vLLM is too old for MLA on a CPU, it has no kernel for the weights on this processor, the
            memory does not suffice, or an option is wrong.
    """
    from vllm.config import CompilationMode

    if read_options(vllm_config) != Options():
        compat.logger().warning(
            "additional_config[%r] chooses among kernels for GPUs; it has no effect on a CPU.", SECTION
        )
    version = compat.vllm_version()
    if version.release[:2] < compat.CPU_FROM:
        raise ValueError(
            f"vLLM {version} cannot serve MLA on a CPU; install vLLM {'.'.join(map(str, compat.CPU_FROM))}"
        )
    quantization = getattr(vllm_config.model_config.hf_config, "quantization_config", None) or {}
    if 4 in weight_bits(quantization) and compat.lacks_cpu_kernel_of_4_bits():
        raise ValueError(
            f"{vllm_config.model_config.model} has weights of 4 bits (quant_method "
            f"{quantization.get('quant_method')!r}), for which vLLM {version} has no kernel on an x86 processor "
            "without AVX-512, as this one is. Serve the checkpoint that it was made of, or take another machine."
        )
    if _usable_cores() <= FEW_CORES:
        # vLLM keeps one core free of its worker: of two, that is half of the machine, for a scheduler
        # that mostly waits. Read by the processes that this one starts; the user's own value stays.
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    if vllm_config.compilation_config.mode is None:
        # compiling makes the start slower, and attention, where the time goes, is opaque to it
        vllm_config.compilation_config.mode = CompilationMode.NONE
    model, cache = vllm_config.model_config, vllm_config.cache_config
    chosen_bytes = _chosen_kv_bytes(cache.kv_cache_memory_bytes)
    if chosen_bytes is None and cache.gpu_memory_utilization != type(cache)().gpu_memory_utilization:
        # the user divides the memory with vLLM's own knob
        return
    parallel = vllm_config.parallel_config
    config = model.hf_config
    layers = -(-config.num_hidden_layers // parallel.pipeline_parallel_size)
    plan = plan_cpu_memory(
        available_bytes=compat.available_cpu_memory_bytes(),
        weight_bytes=_weight_bytes(model.model),
        kv_bytes_per_token=layers * config.latent_dim * model.dtype.itemsize,
        context_tokens=model.max_model_len,
        page_tokens=cache.block_size if cache.user_specified_block_size else compat.CPU_PAGE_TOKENS,
        kv_cache_bytes=chosen_bytes,
    )
    cache.kv_cache_memory_bytes = plan.kv_cache_bytes
    # None: not set; with a length of the user's own, vLLM says itself when it does not fit
    if model.original_max_model_len is None and plan.context_tokens < model.max_model_len:
        compat.logger().warning(
            "Context capped at %d of the model's %d tokens: the KV cache gets %.2f GiB of this machine's "
            "memory. For more, free memory or set --kv-cache-memory-bytes (or --max-model-len for an exact "
            "length).",
            plan.context_tokens,
            model.max_model_len,
            plan.kv_cache_bytes / GIB,
        )
        model.max_model_len = plan.context_tokens


def _usable_cores() -> int:
    """Cores that this process may use; not every system can restrict them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chosen_kv_bytes(configured: int | None) -> int | None:
    """The KV cache's size if the user chose one, in bytes; the variable is vLLM's and wins over the flag."""
    variable = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "")
    return int(variable) * GIB if variable else configured


def _weight_bytes(model: str) -> int:
    """Size of a local checkpoint; 0 for one that is still to be downloaded."""
    return sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
