"""Before and after the backward kernel for Hopper: its row sums, and dQ out of the sum that it leaves.

Blocks are of 64 queries of one sequence and one head, numbered as `blocks.locate` does. Of each the row sums are
two rows, [minus lse / scale, minus delta], and dQ is three pieces of `[64, 64]` in float32. A piece is laid out as
the tensor cores hold it: rows are (4 warps, 2 halves, 8 groups), columns (8 groups, 4 lanes, 2 numbers),
and memory
has (warp, column group, row group, lane, half, number).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ic_model.ops.mla_prefill.blocks import head_pointer, load_tile, locate, store_tile, written_rows

# what changes from batch to batch: otherwise each would compile anew for a number that 16 divides, and for 1
UNSPECIALIZED = ("num_seqs", "tokens_q", "q_blocks", "lse_stride_b", "lse_stride_n")
BLOCK = tl.constexpr(64)
PIECES = tl.constexpr(3)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prepare_kernel(
    out_ptr, d_out_ptr, lse_ptr, sums_ptr, d_q_sum_ptr, cu_q_ptr, softmax_scale, num_seqs, tokens_q, q_blocks,
    out_stride_b, out_stride_t, out_stride_n, d_out_stride_b, d_out_stride_t, d_out_stride_n,
    lse_stride_b, lse_stride_n,
    V_DIM: tl.constexpr, PACKED: tl.constexpr,
):
    """Row sums of one block, and zeros for its sum of dQ. Grid: (blocks of queries of all sequences, heads)."""
    seq, block, start, length = locate(tl.program_id(0), cu_q_ptr, num_seqs, tokens_q, BLOCK, PACKED)
    batch = seq
    if PACKED:
        batch = 0
    head = tl.program_id(1)
    first = block * BLOCK
    if first < length:
        out_base = head_pointer(out_ptr, batch, start, head, out_stride_b, out_stride_t, out_stride_n)
        d_out_base = head_pointer(d_out_ptr, batch, start, head, d_out_stride_b, d_out_stride_t, d_out_stride_n)
        out = load_tile(out_base, first, length, out_stride_t, BLOCK, 0, V_DIM, V_DIM, True)
        d_out = load_tile(d_out_base, first, length, d_out_stride_t, BLOCK, 0, V_DIM, V_DIM, True)
        delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
        rows = tl.arange(0, BLOCK)
        lse_base = lse_ptr + tl.cast(batch, tl.int64) * lse_stride_b
        lse_base += tl.cast(head, tl.int64) * lse_stride_n + start
        lse = tl.load(lse_base + first + rows, mask=first + rows < length, other=float("-inf"))
        # what saw nothing, and what does not exist, weighs nothing
        bias = tl.where(lse == float("-inf"), float("-inf"), -lse / softmax_scale)
        place = tl.cast(head, tl.int64) * q_blocks + tl.program_id(0)
        tl.store(sums_ptr + place * (2 * BLOCK) + rows, bias)
        tl.store(sums_ptr + place * (2 * BLOCK) + BLOCK + rows, -delta)
        numbers = tl.arange(0, BLOCK * BLOCK)
        for piece in tl.static_range(PIECES):
            pointers = d_q_sum_ptr + (place * PIECES + piece) * (BLOCK * BLOCK) + numbers
            tl.store(pointers, tl.zeros([BLOCK * BLOCK], tl.float32))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def finish_kernel(
    d_q_sum_ptr, d_q_ptr, cu_q_ptr, softmax_scale, num_seqs, tokens_q, q_blocks,
    d_q_stride_b, d_q_stride_t, d_q_stride_n,
    PACKED: tl.constexpr,
):
    """dQ of one block in its dtype, out of its sum. Grid: as `prepare_kernel`."""
    seq, block, start, length = locate(tl.program_id(0), cu_q_ptr, num_seqs, tokens_q, BLOCK, PACKED)
    batch = seq
    if PACKED:
        batch = 0
    head = tl.program_id(1)
    first = block * BLOCK
    rows_end = written_rows(seq, num_seqs, start, length, tokens_q, PACKED)
    if first < rows_end:
        d_q_base = head_pointer(d_q_ptr, batch, start, head, d_q_stride_b, d_q_stride_t, d_q_stride_n)
        place = tl.cast(head, tl.int64) * q_blocks + tl.program_id(0)
        exists = (first + tl.arange(0, BLOCK) < length)[:, None]
        numbers = tl.arange(0, BLOCK * BLOCK)
        for piece in tl.static_range(PIECES):
            found = tl.load(d_q_sum_ptr + (place * PIECES + piece) * (BLOCK * BLOCK) + numbers)
            found = tl.permute(tl.reshape(found, (4, 8, 8, 4, 2, 2)), (0, 4, 2, 1, 3, 5))
            found = tl.where(exists, tl.reshape(found, (BLOCK, BLOCK)) * softmax_scale, 0.0)
            store_tile(d_q_base, found, first, rows_end, d_q_stride_t, BLOCK, piece * BLOCK, BLOCK, BLOCK)
