"""Launch the kernel for Turing: what it takes, its launch parameters, and what is compiled ahead of time."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton

from ic_model.ops.aot import AotVariant
from ic_model.ops.dispatch import on_device
from ic_model.ops.launch import launch_parameters
from ic_model.ops.mla_decode.launch import MAX_SEQUENCES, OP, ROPE_DIM, Split, _processors, _run
from ic_model.ops.mla_decode.reference import joined
from ic_model.ops.mla_decode.turing_kernel import decode_turing_kernel

MAX_KV_LORA_RANK = 512
MAX_QUERY_TOKENS = 8


def mla_decode_turing(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    *,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    kv_lora_rank: int,
    softmax_scale: float,
    kv_scale: float = 1.0,
    q_rope: torch.Tensor | None = None,
    sm_count: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to paged latent rows with Turing's tensor cores; see `mla_decode` for the meaning.

    Nothing waits for the host, so that a CUDA graph may hold it and be replayed with other `seq_lens`.

    Args:
        q: `[B, T, N, C + R]` float16, its rows contiguous; R is 64, T at most 8.
        kv_cache: `[pages, page_tokens, C + R]` float16, rows contiguous and at multiples of 16 bytes;
            page_tokens a multiple of 16.
        block_table: `[B, max_pages]` int32. Entries past a sequence's last page are never read.
        seq_lens: `[B]` int32, cached tokens of each sequence, its T queries included; 0 gives zeros.
        kv_lora_rank: C, a multiple of 64, at most 512.
        softmax_scale: factor on the scores.
        kv_scale: factor on the cached numbers.
        q_rope: `[B, T, N, R]`, the rotated query where q lacks it; both are copied into one tensor.
        sm_count: multiprocessors to spread the work over; None for those of the device.

    Returns:
        out `[B, T, N, C]` float16, and the log-sum-exp of the scores `[B, T, N]` in float32.

    Raises:
        ValueError: `refusal` says why.
    """
    q = joined(q, q_rope)
    reason = refusal(q, kv_cache, block_table=block_table, seq_lens=seq_lens, kv_lora_rank=kv_lora_rank)
    if reason:
        raise ValueError(reason)
    batch, query_tokens, heads, _ = q.shape
    rows, page_tokens = query_tokens * heads, kv_cache.shape[1]
    parameters = _parameters(q.device, kv_lora_rank, rows, page_tokens)
    split = Split(
        batch=batch,
        rows=rows,
        block_rows=16 * parameters["row_warps"],
        block_tokens=parameters["block_tokens"],
        processors=(sm_count or _processors(q.device)) * parameters["programs_per_processor"],
    )
    constants = _constants(parameters, kv_lora_rank, page_tokens)

    def launch(results: tuple[torch.Tensor, ...], _: dict[str, Any]) -> None:
        decode_turing_kernel[(split.programs, split.row_blocks)](
            q,
            kv_cache,
            block_table,
            seq_lens,
            *results,
            softmax_scale * kv_scale * math.log2(math.e),
            kv_scale,
            batch,
            query_tokens,
            heads,
            rows,
            *q.stride()[:3],
            kv_cache.stride(0),
            block_table.stride(0),
            TOKEN_STRIDE=kv_cache.stride(1),
            BLOCK_SEQS=split.block_seqs,
            **constants,
            num_warps=parameters["splits"] * parameters["row_warps"],
        )

    # it is called without `mla_decode`, too
    with on_device(q):
        return _run(q, seq_lens, kv_lora_rank, split, launch)


def refusal(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    *,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    kv_lora_rank: int,
) -> str | None:
    """Why `mla_decode_turing` does not take these arguments; None where it does.

    Args:
        q: as there, and so are the others.
        kv_cache: the pages.
        block_table: their numbers.
        seq_lens: tokens of each sequence.
        kv_lora_rank: C.
    """
    rope_dim = q.shape[-1] - kv_lora_rank
    if q.dtype != torch.float16 or kv_cache.dtype != torch.float16:
        return f"q is {q.dtype} and kv_cache is {kv_cache.dtype}; accepted: torch.float16"
    if kv_lora_rank % 64 or not 0 < kv_lora_rank <= MAX_KV_LORA_RANK or rope_dim != ROPE_DIM:
        return (
            f"kv_lora_rank is {kv_lora_rank} and qk_rope_head_dim {rope_dim}; accepted: multiples of 64 up to "
            f"{MAX_KV_LORA_RANK}, and {ROPE_DIM}"
        )
    if q.shape[0] > MAX_SEQUENCES:
        return f"q has {q.shape[0]} sequences; accepted: up to {MAX_SEQUENCES}"
    if not 1 <= q.shape[1] <= MAX_QUERY_TOKENS:
        return f"q has {q.shape[1]} query tokens; accepted: 1 to {MAX_QUERY_TOKENS}"
    if kv_cache.shape[1] % 16 or not kv_cache.shape[1]:
        return f"page_tokens is {kv_cache.shape[1]}; accepted: multiples of 16"
    if q.stride(-1) != 1 or kv_cache.stride(-1) != 1 or kv_cache.stride(0) % 8 or kv_cache.stride(1) % 8:
        return (
            f"q has strides {q.stride()} and kv_cache {kv_cache.stride()}; accepted: 1 for the last dimension, "
            "and multiples of 8 for kv_cache's others"
        )
    if kv_cache.data_ptr() % 16:
        return f"kv_cache begins at address {kv_cache.data_ptr():#x}; accepted: multiples of 16"
    if block_table.dtype != torch.int32 or seq_lens.dtype != torch.int32:
        return f"block_table is {block_table.dtype} and seq_lens is {seq_lens.dtype}; accepted: torch.int32"
    if block_table.stride(-1) != 1 or (seq_lens.numel() > 1 and seq_lens.stride(0) != 1):
        return "block_table's rows and seq_lens must be contiguous"
    return None


def aot_variants(capability: int) -> list[AotVariant]:
    """What would be launched on Turing, for compiling ahead of time.

    Args:
        capability: of the chip; other than 75 only where the kernel is tested on another GPU.
    """
    found: list[AotVariant] = []
    for kv_lora_rank, rows in ((256, 4), (256, 32), (512, 16), (512, 128)):
        parameters = _parameters(capability, kv_lora_rank, rows, 64)
        found.append(
            AotVariant(
                name=f"turing {kv_lora_rank + ROPE_DIM}, {rows} rows",
                function=decode_turing_kernel,
                signature=_signature(),
                constants={
                    "TOKEN_STRIDE": kv_lora_rank + ROPE_DIM,
                    "BLOCK_SEQS": 32,
                    **_constants(parameters, kv_lora_rank, 64),
                },
                attributes={"table_stride": 1},
                num_warps=parameters["splits"] * parameters["row_warps"],
                # around the loops, not in them
                max_spill_bytes=16 if capability == 75 else 128,
                mma="mma.sync m16n8k8",
            )
        )
    return found


def _parameters(device: torch.device | int, kv_lora_rank: int, rows: int, page_tokens: int) -> dict[str, int]:
    """Launch parameters; those for Turing on other chips, too, where this kernel is only tested."""
    on_cuda = isinstance(device, torch.device) and device.type == "cuda"
    on_turing = on_cuda and torch.cuda.get_device_capability(device) == (7, 5)
    found = launch_parameters(
        OP, device if on_turing else 75, kernel="turing", row_dim=kv_lora_rank + ROPE_DIM, rows=rows
    )
    if page_tokens % found["block_tokens"]:
        # a tile lies in one page
        found["block_tokens"] = 16
    return found


def _constants(parameters: dict[str, int], kv_lora_rank: int, page_tokens: int) -> dict[str, Any]:
    """The compile-time arguments that do not depend on the batch, nor on how the cache lies in memory."""
    return {
        "C": kv_lora_rank,
        "R": ROPE_DIM,
        "PAGE_TOKENS": page_tokens,
        "SPLITS": parameters["splits"],
        "ROW_WARPS": parameters["row_warps"],
        "BLOCK_C": triton.next_power_of_2(kv_lora_rank),
        "BLOCK_TOKENS": parameters["block_tokens"],
    }


def _signature() -> dict[str, str]:
    """Types of the kernel's arguments by their names."""
    types = {"table_ptr": "*i32", "lens_ptr": "*i32", "scale_log2": "fp32", "kv_scale": "fp32"}
    types |= dict.fromkeys(("lse_ptr", "partial_ptr", "partial_lse_ptr"), "*fp32")
    types |= dict.fromkeys(("q_ptr", "kv_ptr", "out_ptr"), "*fp16")
    return {name: types.get(name, "i32") for name in decode_turing_kernel.arg_names if not name.isupper()}
