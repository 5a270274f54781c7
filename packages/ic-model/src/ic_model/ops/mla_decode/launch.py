"""Launch the kernels of MLA decoding: which one takes what, how the work is split, and scratch memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton

from ic_model.ops.dispatch import kernel_refuses
from ic_model.ops.launch import launch_parameters
from ic_model.ops.mla_decode import ALIGNED

OP = "mla_decode"
ROPE_DIM = 64
# tokens per tile of the kernel for Hopper: what one instruction of a warpgroup takes
HOPPER_TILE_TOKENS = 64
# query rows that one crew of the kernels for Hopper takes
CREW_ROWS = 64
# of the kernel that combines, per multiprocessor
COMBINE_PROGRAMS = 4
MAX_SEQUENCES = 4096  # each program looks at the lengths of all at once, to find its place
# the interpreter has no multiprocessors; a few programs show the splitting
INTERPRETED_PROCESSORS = 4
FP8 = torch.float8_e4m3fn
HALVES = (torch.float16, torch.bfloat16)


def triton_refuses(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    *,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    kv_lora_rank: int,
    q_rope: torch.Tensor | None = None,
    **_: Any,
) -> str | None:
    """Say why the kernels in plain Triton cannot take these arguments, or None."""
    reason = kernel_refuses(q, kv_cache, block_table, seq_lens)
    latent, rope = _parts(q, q_rope, kv_lora_rank)
    if reason is None and q.shape[0] > MAX_SEQUENCES:
        reason = f"q has {q.shape[0]} sequences; accepted: up to {MAX_SEQUENCES}"
    if reason is None and kv_cache.dtype not in (q.dtype, FP8):
        reason = f"q is {q.dtype} and kv_cache is {kv_cache.dtype}; accepted: q's dtype, or {FP8}"
    if reason is None and (block_table.dtype, seq_lens.dtype) != (torch.int32, torch.int32):
        reason = f"block_table is {block_table.dtype}, seq_lens {seq_lens.dtype}; accepted: torch.int32"
    last = tuple(tensor.stride(-1) for tensor in (latent, rope, kv_cache, block_table, seq_lens))
    if reason is None and last != (1, 1, 1, 1, 1):
        reason = f"the last strides of q, q_rope, kv_cache, block_table and seq_lens are {last}; accepted: 1"
    strides = (*latent.stride()[:3], *rope.stride()[:3], *kv_cache.stride()[:2])
    if reason is None and any(stride % ALIGNED for stride in strides):
        reason = (
            f"q has strides {latent.stride()}, q_rope {rope.stride()} and kv_cache {kv_cache.stride()}; "
            f"accepted: multiples of {ALIGNED}"
        )
    # without it rows are read number by number, as with other strides
    for name, tensor in (("q", q), ("kv_cache", kv_cache)):
        if reason is None and tensor.data_ptr() % 16:
            reason = f"{name} begins at address {tensor.data_ptr():#x}; accepted: multiples of 16"
    if reason is None and kv_lora_rank > 256 and _capability(q.device) < (8, 0):
        reason = f"kv_lora_rank is {kv_lora_rank}; accepted below capability 8.0: up to 256 (shared memory)"
    return reason


def hopper_refuses(
    q: torch.Tensor, kv_cache: torch.Tensor, *, kv_lora_rank: int, **others: Any
) -> str | None:
    """Say why the kernel for Hopper cannot take these arguments, or None."""
    reason = triton_refuses(q, kv_cache, kv_lora_rank=kv_lora_rank, **others)
    if reason is not None:
        return reason
    if q.device.type != "cuda" or _capability(q.device) != (9, 0):
        return "it is for compute capability 9.0"
    rope_dim = kv_cache.shape[-1] - kv_lora_rank
    page_stride, token_stride, _ = kv_cache.stride()
    checks = (
        (q.dtype in HALVES, f"q is {q.dtype}; accepted: float16 and bfloat16"),
        (kv_lora_rank in (64, 128, 256, 512), f"kv_lora_rank is {kv_lora_rank}; accepted: 64, 128, 256, 512"),
        (rope_dim == ROPE_DIM, f"qk_rope_head_dim is {rope_dim}; accepted: {ROPE_DIM}"),
        (
            kv_cache.shape[1] % HOPPER_TILE_TOKENS == 0,
            f"a page has {kv_cache.shape[1]} tokens; accepted: multiples of {HOPPER_TILE_TOKENS}",
        ),
        # one descriptor addresses every row of every page, as a multiple of the rows' stride
        (
            page_stride % token_stride == 0 and token_stride * kv_cache.element_size() % 16 == 0,
            f"kv_cache has strides {kv_cache.stride()}; accepted: pages at multiples of rows, rows of 16 bytes",
        ),
    )
    return next((message for holds, message in checks if not holds), None)


def _parts(
    q: torch.Tensor, q_rope: torch.Tensor | None, kv_lora_rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Absorbed and rotated query, `[B, T, N, C]` and `[B, T, N, R]`."""
    return (q, q_rope) if q_rope is not None else (q[..., :kv_lora_rank], q[..., kv_lora_rank:])


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """How a step's list of tiles is shared out: `programs` along the list, for each block of rows."""

    batch: int
    rows: int
    block_rows: int
    block_tokens: int
    processors: int

    @property
    def row_blocks(self) -> int:
        """Blocks of rows."""
        return triton.cdiv(self.rows, self.block_rows)

    @property
    def programs(self) -> int:
        """Shares of the list."""
        return max(self.processors // self.row_blocks, 1)

    @property
    def block_seqs(self) -> int:
        """Sequences that a program looks at to find its place; few sizes, so that few kernels are compiled."""
        return next(size for size in (32, 256, 1024, MAX_SEQUENCES) if self.batch <= size)

    def combine_constants(self, kv_lora_rank: int, parameters: dict[str, int]) -> dict[str, Any]:
        """Of the second kernel: as many splits at a time as a sequence has, few columns where there are many."""
        splits = triton.next_power_of_2(self.programs // self.batch + 2)
        block_splits = min(max(splits, 4), parameters["max_splits"])
        block_columns = max(parameters["elements"] // (block_splits * self.block_rows), 1)
        return {
            "KV_LORA_RANK": kv_lora_rank,
            "PARTIAL_COLUMNS": triton.next_power_of_2(kv_lora_rank),
            "BLOCK_TOKENS": self.block_tokens,
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_SEQS": self.block_seqs,
            "BLOCK_SPLITS": block_splits,
            "BLOCK_COLUMNS": min(block_columns, triton.next_power_of_2(kv_lora_rank)),
        }


def mla_decode_triton(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    *,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    kv_lora_rank: int,
    softmax_scale: float,
    kv_scale: float = 1.0,
    q_rope: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to paged latent rows with plain Triton; see `mla_decode` for arguments and result."""
    from ic_model.ops.mla_decode.kernel import decode_kernel

    q, q_rope = _parts(q, q_rope, kv_lora_rank)
    batch, query_tokens, heads, _ = q.shape
    row_dim = kv_cache.shape[2]
    shape = {"row_dim": row_dim, "rows": query_tokens * heads, "element_bytes": q.element_size()}
    parameters = launch_parameters(OP, q.device, kernel="triton", **shape)
    split = _split(q, parameters["block_rows"], parameters["block_tokens"])
    constants = triton_constants(parameters, query_tokens, kv_lora_rank, row_dim, kv_cache.shape[1])

    def _launch(results: tuple[torch.Tensor, ...], options: dict[str, Any]) -> None:
        decode_kernel[(split.programs, split.row_blocks)](
            q,
            q_rope,
            # e4m3 as bytes: not every chip knows the format
            kv_cache.view(torch.uint8) if kv_cache.dtype == FP8 else kv_cache,
            block_table,
            seq_lens,
            *results,
            softmax_scale * kv_scale * math.log2(math.e),
            kv_scale,
            batch,
            heads,
            split.rows,
            *q.stride()[:3],
            *q_rope.stride()[:3],
            *kv_cache.stride()[:2],
            block_table.stride(0),
            **constants,
            BLOCK_SEQS=split.block_seqs,
            FP8=kv_cache.dtype == FP8,
            PDL=bool(options),
            num_warps=parameters["num_warps"],
            num_stages=parameters["num_stages"],
            **options,
        )

    return _run(q, seq_lens, kv_lora_rank, split, _launch)


def triton_constants(
    parameters: dict[str, int], query_tokens: int, kv_lora_rank: int, row_dim: int, page_tokens: int
) -> dict[str, Any]:
    """The plain kernel's compile-time arguments that do not depend on the batch."""
    return {
        "QUERY_TOKENS": query_tokens,
        "KV_LORA_RANK": kv_lora_rank,
        "ROPE_DIM": row_dim - kv_lora_rank,
        "PAGE_TOKENS": page_tokens,
        "BLOCK_C": triton.next_power_of_2(kv_lora_rank),
        "BLOCK_R": max(triton.next_power_of_2(row_dim - kv_lora_rank), 16),
        "BLOCK_TOKENS": parameters["block_tokens"],
        "BLOCK_ROWS": parameters["block_rows"],
        "TOKENS_FIRST": bool(parameters["tokens_first"]),
        "NUM_STAGES": parameters["num_stages"],
    }


def mla_decode_hopper(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    *,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    kv_lora_rank: int,
    softmax_scale: float,
    kv_scale: float = 1.0,
    q_rope: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to paged latent rows with the Gluon kernel for Hopper; see `mla_decode` for arguments and result."""
    from ic_model.ops.mla_decode.hopper import decode_hopper_kernel
    from ic_model.ops.mla_decode.hopper_rows import decode_hopper_rows_kernel

    q, q_rope = _parts(q, q_rope, kv_lora_rank)
    batch, query_tokens, heads, _ = q.shape
    row_dim = kv_cache.shape[2]
    shape = {"row_dim": row_dim, "rows": query_tokens * heads, "kv_bytes": kv_cache.element_size()}
    parameters = launch_parameters(OP, q.device, kernel="hopper", **shape)
    split = _split(q, parameters["block_rows"], HOPPER_TILE_TOKENS)
    page_stride, token_stride, _ = kv_cache.stride()
    constants = hopper_constants(parameters, query_tokens, kv_lora_rank, kv_cache.shape[1])

    kernel = decode_hopper_rows_kernel if parameters["gathers"] else decode_hopper_kernel

    def _launch(results: tuple[torch.Tensor, ...], options: dict[str, Any]) -> None:
        if parameters["max_registers"]:
            options = {**options, "maxnreg": parameters["max_registers"]}
        kernel[(split.programs, split.row_blocks)](
            *_descriptors(kv_cache, kv_lora_rank, constants),
            q,
            q_rope,
            block_table,
            seq_lens,
            *results,
            softmax_scale * kv_scale * math.log2(math.e),
            kv_scale,
            batch,
            heads,
            split.rows,
            *q.stride()[:3],
            *q_rope.stride()[:3],
            page_stride // token_stride,
            block_table.stride(0),
            **constants,
            BLOCK_SEQS=split.block_seqs,
            PDL=True,
            num_warps=parameters["num_warps"],
            **options,
        )

    return _run(q, seq_lens, kv_lora_rank, split, _launch)


def hopper_constants(
    parameters: dict[str, int], query_tokens: int, kv_lora_rank: int, page_tokens: int
) -> dict[str, Any]:
    """The compile-time arguments of a kernel for Hopper that do not depend on the batch.

    The kernel is `hopper_rows.py`'s where the crew that makes the weights `gathers`, too, else `hopper.py`'s.
    """
    shared = {
        "QUERY_TOKENS": query_tokens,
        "C": kv_lora_rank,
        "PAGE_TOKENS": page_tokens,
        "BLOCK_ROWS": parameters["block_rows"],
        "TILE": HOPPER_TILE_TOKENS,
        "SLOTS": parameters["slots"],
    }
    if parameters["gathers"]:
        return shared
    return {
        **shared,
        # with 64 rows the sums of 256 columns are what the registers of four warps hold
        "PARTS": 2 if parameters["block_rows"] >= CREW_ROWS and kv_lora_rank > 256 else 1,
        "MESSAGES": parameters["messages"],
        # fp8 tiles may come in pieces
        "STEP": parameters["step"],
        "WIDE_SLOTS": parameters["wide_slots"],
        "VALUE_REGISTERS": parameters["value_registers"],
        "WIDEN_WARPS": parameters["widen_warps"],
    }


def descriptor_blocks(
    kv_lora_rank: int, element_bytes: int, constants: Mapping[str, Any]
) -> list[tuple[list[int], int]]:
    """Block shape and swizzle, in bytes, of the descriptors for latent and rope columns."""
    widths = (kv_lora_rank // constants.get("PARTS", 1), ROPE_DIM)
    rows = constants.get("STEP", constants["TILE"])
    return [([rows, columns], min(columns * element_bytes, 128)) for columns in widths]


def _descriptors(kv_cache: torch.Tensor, kv_lora_rank: int, constants: Mapping[str, Any]) -> list[Any]:
    """For the copy engine: all rows of all pages as one matrix, read in blocks."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    pages, page_tokens, row_dim = kv_cache.shape
    page_stride, token_stride, _ = kv_cache.stride()
    rows = (pages - 1) * (page_stride // token_stride) + page_tokens
    matrix = kv_cache.as_strided((rows, row_dim), (token_stride, 1))
    bits = 8 * kv_cache.element_size()
    return [
        TensorDescriptor(
            matrix, [rows, row_dim], [token_stride, 1], block, NVMMASharedLayout(swizzle, bits, 2)
        )
        for block, swizzle in descriptor_blocks(kv_lora_rank, kv_cache.element_size(), constants)
    ]


def _split(q: torch.Tensor, block_rows: int, block_tokens: int) -> Split:
    return Split(
        batch=q.shape[0],
        rows=q.shape[1] * q.shape[2],
        block_rows=block_rows,
        block_tokens=block_tokens,
        processors=_processors(q.device),
    )


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device; the interpreter counts as 8.0."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def _run(
    q: torch.Tensor,
    seq_lens: torch.Tensor,
    kv_lora_rank: int,
    split: Split,
    launch: Callable[[tuple[torch.Tensor, ...], dict[str, Any]], None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Results and scratch memory, the first kernel, and the one that combines.

    Scratch is bounded by the chip, not by the context: two partial results per program.
    """
    from ic_model.ops.mla_decode.kernel import combine_kernel

    batch, query_tokens, heads, _ = q.shape
    out = q.new_empty(batch, query_tokens, heads, kv_lora_rank)
    lse = torch.empty(batch, query_tokens, heads, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    shape = {"kv_lora_rank": kv_lora_rank, "block_rows": split.block_rows, "batch": batch}
    parameters = launch_parameters(OP, q.device, kernel="combine", **shape)
    constants = split.combine_constants(kv_lora_rank, parameters)
    slots = split.row_blocks * 2 * split.programs
    shape = (slots, constants["PARTIAL_COLUMNS"], split.block_rows)
    partial = torch.empty(shape, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(slots, split.block_rows, dtype=torch.float32, device=q.device)
    # programmatic dependent launch: a kernel starts while the one before it ends, and waits for its results
    overlaps = _capability(q.device) >= (9, 0)
    options = {"launch_pdl": True} if overlaps else {}
    launch((out, lse, partial, partial_lse), options)
    # a few programs per multiprocessor: often there is nothing to combine, and then each one is in vain
    pieces = split.row_blocks * batch
    column_programs = min(
        triton.cdiv(kv_lora_rank, constants["BLOCK_COLUMNS"]),
        triton.cdiv(COMBINE_PROGRAMS * split.processors, pieces),
    )
    combine_kernel[(column_programs, split.row_blocks, batch)](
        partial,
        partial_lse,
        seq_lens,
        out,
        lse,
        split.programs,
        batch,
        split.rows,
        **constants,
        PDL=overlaps,
        num_warps=parameters["num_warps"],
        **options,
    )
    return out, lse
