"""What the serving benchmark does inside vLLM's workers: one for each GPU, some in processes of their own."""

from __future__ import annotations

from typing import Any

import torch
from ic_model.sizing import GIB

# `worker_extension_cls` of vLLM's LLM: its methods are then there for `collective_rpc`
EXTENSION = f"{__name__}.Probe"


class Probe:
    """Methods of every worker."""

    def bench_skip_prefill_attention(self) -> None:
        """From now on prefill writes the cache but attends to nothing.

        The time of a decode step does not depend on what the numbers in the cache are: a context of a million
        tokens is then there in seconds. What the prefill itself takes is measured without this.
        """
        from ic_vllm_plugin.attention import LatentImpl
        from vllm.model_executor.layers.attention import mla_attention

        # a class further down in vLLM 0.26 than in 0.32
        stock: Any = getattr(mla_attention, "MLACommonBaseImpl", mla_attention.MLACommonImpl)

        def forward_mha(self: Any, *args: Any, output: torch.Tensor | None = None, **kwargs: Any) -> None:
            (args[-1] if output is None else output).zero_()

        for owner in (LatentImpl, stock):
            owner.forward_mha = forward_mha

    def bench_reset_peak(self) -> None:
        """Forget the most memory so far."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def bench_memory(self) -> dict[str, float]:
        """GiB: the most that PyTorch has reserved, and with what the device holds beside it; empty on a CPU."""
        if not torch.cuda.is_available():
            return {}
        free, total = torch.cuda.mem_get_info()
        beside = total - free - torch.cuda.memory_reserved()
        reserved = torch.cuda.max_memory_reserved()
        return {
            "reserved_gib": reserved / GIB,
            "beside_gib": beside / GIB,
            "peak_gib": (reserved + beside) / GIB,
            "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        }
