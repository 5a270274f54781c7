"""Choices for our architecture on a GPU that are made before the engine starts; what the user set stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ic_vllm_plugin import compat
from ic_vllm_plugin.options import read_options

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# from which compute capability on, and for which (P, R, V), vLLM's own prefill runs on every release supported
STOCK_PREFILL_FROM = 80
STOCK_PREFILL_DIMS = {(128, 64, 128), (192, 64, 256), (64, 64, 128)}


def apply_gpu_defaults(vllm_config: VllmConfig) -> None:
    """Refuse what cannot work, and give layers a prefill that takes the model's dimensions.

    Raises:
        ValueError: an option of the plugin is wrong, or the parallelism is one that our attention cannot do.
    """
    read_options(vllm_config)
    attention = vllm_config.attention_config
    vllms = asked_for_vllms_backend(vllm_config)
    if not vllms:
        _refuse_parallelism(vllm_config)
    if attention.mla_prefill_backend is not None:
        return
    config = vllm_config.model_config.hf_config
    dims = (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim)
    capability = compat.compute_capability() or 0
    if not (vllms and dims in STOCK_PREFILL_DIMS and capability >= STOCK_PREFILL_FROM):
        attention.mla_prefill_backend = compat.MLAPrefillBackendEnum.CUSTOM


def asked_for_vllms_backend(vllm_config: VllmConfig) -> bool:
    """Whether `--attention-backend`, for all layers or for MLA, names one of vLLM's own."""
    attention = vllm_config.attention_config
    per_kind = getattr(attention, "backend_per_kind", {})
    asked = per_kind.get("mla_attention", attention.backend)
    return asked is not None and asked != compat.AttentionBackendEnum.CUSTOM


def _refuse_parallelism(vllm_config: VllmConfig) -> None:
    for field in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(vllm_config.parallel_config, field, 1)
        if size > 1:
            raise ValueError(
                f"{field} is {size}; InfiniteContext's attention accepts 1. For more, ask for one of vLLM's: "
                "--attention-backend TRITON_MLA"
            )
