"""How much context the prefill expands at a time, and making vLLM's memory profile count that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ic_model.sizing_serving import (
    MIB,
    AttentionShape,
    prefill_budget_bytes,
    prefill_peak_bytes,
    prefill_workspace_tokens,
)

from ic_vllm_plugin import compat
from ic_vllm_plugin.options import read_options

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def layer_shape(layer: Any) -> AttentionShape:
    """The attention of this GPU in the terms of `ic_model.sizing_serving`.

    Args:
        layer: vLLM's MLAAttention.
    """
    return AttentionShape(
        heads=layer.num_heads,
        kv_lora_rank=layer.kv_lora_rank,
        qk_rope_head_dim=layer.qk_rope_head_dim,
        qk_nope_head_dim=layer.qk_nope_head_dim,
        v_head_dim=layer.v_head_dim,
    )


def workspace_tokens(vllm_config: VllmConfig, layer: Any) -> int:
    """Rows of cached context that are expanded at a time: as the user said, or a share of the GPU's memory.

    Args:
        vllm_config: the engine's.
        layer: vLLM's MLAAttention.
    """
    chosen = read_options(vllm_config).prefill_workspace_mib
    if chosen is None:
        usable = compat.device_memory_bytes() * vllm_config.cache_config.gpu_memory_utilization
        budget = prefill_budget_bytes(usable)
    else:
        budget = chosen * MIB
    element_bytes = vllm_config.model_config.dtype.itemsize
    return prefill_workspace_tokens(layer_shape(layer), budget, element_bytes=element_bytes)


def count_in_profile(vllm_config: VllmConfig, layer: Any) -> None:
    """Let vLLM's profile run allocate what our prefill takes, instead of what its own would.

    Without that, vLLM sets aside the expansion of up to 65,536 tokens: 1 GiB for 32 heads of 128 + 128.

    Args:
        vllm_config: the engine's.
        layer: vLLM's MLAAttention with our backend.
    """
    shape = layer_shape(layer)
    element_bytes = vllm_config.model_config.dtype.itemsize
    peak = prefill_peak_bytes(
        shape,
        step_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        workspace_tokens=workspace_tokens(vllm_config, layer),
        element_bytes=element_bytes,
    )
    row = shape.heads * (shape.qk_nope_head_dim + shape.v_head_dim) * element_bytes
    compat.set_profiled_rows(layer, -(-peak // row))
