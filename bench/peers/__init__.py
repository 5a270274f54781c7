"""Peers: other implementations of the ops, timed in the same run. Imported only when asked for.

A peer is a function that takes a problem and returns what is to be timed, or raises `Refused` (or whatever its
library raises) where it cannot: the table then shows a dash, with the reason below it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from bench.cases.common import Prepared, Refused

# op: {peer: where its function is}
PEERS: Mapping[str, Mapping[str, str]] = {
    "mla_decode": {
        "flashmla": "bench.peers.vllm_decode:flashmla",
        "fa3": "bench.peers.vllm_decode:fa3",
        "fa3_splits32": "bench.peers.vllm_decode:fa3_splits32",
        "vllm_triton": "bench.peers.vllm_decode:vllm_triton",
        "eager": "bench.peers.torch_decode:eager",
    },
    "mla_prefill": {
        "sdpa_cudnn": "bench.peers.prefill:sdpa_cudnn",
        "sdpa_efficient": "bench.peers.prefill:sdpa_efficient",
        "flex": "bench.peers.prefill:flex",
        "fa3": "bench.peers.prefill:fa3",
    },
    "latent_cache": {
        "vllm_ops": "bench.peers.small:vllm_latent_cache",
        "torch_compile": "bench.peers.small:compiled_latent_cache",
    },
    "rms_norm": {
        "torch_compile": "bench.peers.small:compiled_rms_norm",
        "liger": "bench.peers.small:liger_rms_norm",
        "vllm_ops": "bench.peers.small:vllm_rms_norm",
    },
    "rope": {
        "torch_compile": "bench.peers.small:compiled_rope",
        "eager": "bench.peers.small:eager_rope",
    },
}


def peer_names(op: str, wanted: str | None) -> list[str]:
    """Peers to time.

    Args:
        op: the op.
        wanted: names with commas between, "none", or None for all that there are.

    Raises:
        ValueError: a name is not one of the op's peers.
    """
    known = PEERS[op]
    if wanted is None:
        return list(known)
    names = [] if wanted == "none" else [name for name in wanted.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"peers has {', '.join(unknown)}; {op} accepts {', '.join(known)} or none")
    return names


def prepare_peer(op: str, name: str, problem: Any) -> Prepared:
    """A peer, ready for a problem.

    Raises:
        Refused: it is not installed, or cannot take the problem. Other exceptions are its library's own.
    """
    return load_peer(op, name)(problem)


def load_peer(op: str, name: str) -> Callable[[Any], Prepared]:
    """A peer's function, without what it imports itself."""
    module, function = PEERS[op][name].split(":")
    return getattr(import_module(module), function)


def require_cuda(problem_tensor: Any) -> None:
    """Refuse a problem that is not on a GPU."""
    if problem_tensor.device.type != "cuda":
        raise Refused("it needs a GPU")


def vllm_module(name: str) -> Any:
    """A module of vLLM.

    Raises:
        Refused: vLLM is not installed, or that part of it does not load.
    """
    # its log lines would stand between ours
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        return import_module(name)
    except ImportError as error:
        raise Refused(f"{name} does not import: {error}") from error


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled by PyTorch, for exactly the shapes that it is called with.

    What was compiled before is forgotten: by default a second shape is compiled for any shape, which is slower.
    """
    import torch
    from torch._functorch import config

    torch.compiler.reset()
    # a timing runs the same backward pass many times, so that it may not reuse what forward has saved
    config.donated_buffer = False
    return torch.compile(function, dynamic=False)


def preload_modules(names: Sequence[str]) -> list[str]:
    """Modules that a worker process needs for these peers, to be imported once for all workers."""
    vllm = {
        "flashmla": ["vllm.v1.attention.ops.flashmla"],
        "fa3": ["vllm.vllm_flash_attn"],
        "fa3_splits32": ["vllm.vllm_flash_attn"],
        "vllm_triton": ["vllm.v1.attention.ops.triton_decode_attention"],
        "vllm_ops": ["vllm._custom_ops"],
    }
    return sorted({module for name in names for module in vllm.get(name, [])})
