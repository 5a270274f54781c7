"""MLA decoding for Hopper with many rows, in Gluon: a producer warp, and two crews of four warps.

A crew makes the weights of 64 rows and gathers values by them itself, from registers: scores = q . latent^T,
out = w . latent. The scores of the next tile and the values of the last one are started together
(FlashAttention-3, arXiv 2407.08608, section 3.2), and one crew's softmax falls into the other one's products. A
tile is brought once for 128 rows, where `hopper.py` brings it once for 64. There are up to 256 columns: their sums
for 64 rows are what the registers of a crew hold.

The list of tiles, the shares and the partial results are those of `kernel.py`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ic_model.ops.hopper_softmax import NEG_INF, clear_rows, weigh
from ic_model.ops.mla_decode.hopper_attend import LN_2, load_queries
from ic_model.ops.mla_decode.hopper_copy import produce, tile_ring
from ic_model.ops.mla_decode.hopper_list import advance, ring_barriers, segment, work_list

# of a crew: what one instruction of its four warps takes
CREW_ROWS = gl.constexpr(64)


@gluon.jit
def _start_scores(q_latent, q_rope, latent, k_rope, slot, layout: gl.constexpr):
    """Start the scores of one tile, `[rows, tokens]`."""
    ROWS: gl.constexpr = q_rope.shape[0]
    TILE: gl.constexpr = k_rope.shape[1]
    scores = gl.zeros([ROWS, TILE], gl.float32, layout)
    rope = k_rope.index(slot).permute([1, 0])
    scores = warpgroup_mma(q_rope, rope, scores, use_acc=False, is_async=True)
    return warpgroup_mma(q_latent.index(0), latent.index(slot).permute([1, 0]), scores, is_async=True)


@gluon.jit
def _finish_weights(
    scores, largest, total, scale_log2, last_seen, valid, latent, slot, layout: gl.constexpr, MASKED: gl.constexpr
):
    """The softmax of one tile."""
    TILE: gl.constexpr = latent.shape[1]
    dtype: gl.constexpr = latent.dtype
    weights, largest, total, decay = weigh(scores, largest, total, scale_log2, last_seen, dtype, MASKED)
    if MASKED:
        # past a sequence's end; both crews clear for themselves, with the same numbers
        if valid < TILE:
            clear_rows(latent.index(slot), valid)
    return gl.convert_layout(weights, layout), largest, total, decay


@gluon.jit
def _step(
    q_latent, q_rope, latent, k_rope, full, empty, slot, phase, last_slot,
    weights, largest, total, out, scale_log2, last_seen, valid, MASKED: gl.constexpr,
):
    """Scores and softmax of one tile while the values of the one before are gathered."""
    TILE: gl.constexpr = k_rope.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    weights_layout: gl.constexpr = weights.type.layout
    mbarrier.wait(full.index(slot), phase)
    scores = _start_scores(q_latent, q_rope, latent, k_rope, slot, layout)
    out = warpgroup_mma(weights, latent.index(last_slot), out, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    new_weights, largest, total, decay = _finish_weights(
        scores, largest, total, scale_log2, last_seen, valid, latent, slot, weights_layout, MASKED
    )
    # the product reads the old weights from registers until it is done; naming the new ones asks the compiler
    # not to put the softmax off until after the wait
    out, weights, new_weights = warpgroup_mma_wait(0, deps=[out, weights, new_weights])
    mbarrier.arrive(empty.index(last_slot), count=1)
    out = out * gl.convert_layout(decay, gl.SliceLayout(1, out.type.layout))[:, None]
    return new_weights, largest, total, out


@gluon.jit
def _crew(
    q_ptr, q_rope_ptr, lens_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, scale_log2, kv_scale,
    num_seqs, num_heads, num_rows, q_stride_b, q_stride_t, q_stride_n,
    rope_stride_b, rope_stride_t, rope_stride_n, latent, k_rope, full, empty, q_latent, q_rope,
    CREW: gl.constexpr, BLOCK_ROWS: gl.constexpr, QUERY_TOKENS: gl.constexpr, BLOCK_SEQS: gl.constexpr,
):
    """Attend with one crew's rows to the tiles of the share, and write each segment's result."""
    SLOTS: gl.constexpr = k_rope.shape[0]
    TILE: gl.constexpr = k_rope.shape[1]
    C: gl.constexpr = latent.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    list_layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    row_block = gl.program_id(1)
    # within the block of all crews
    local_rows = CREW * CREW_ROWS + gl.arange(0, CREW_ROWS, layout=row_layout)
    out_rows = CREW * CREW_ROWS + gl.arange(0, CREW_ROWS, layout=gl.SliceLayout(1, out_layout))
    columns = gl.arange(0, C, layout=gl.SliceLayout(0, out_layout))[None, :]
    query_token = (row_block * BLOCK_ROWS + local_rows) // num_heads

    seqs, lens, seq_tiles, ends, tile, share_end = work_list(lens_ptr, num_seqs, TILE, BLOCK_SEQS, list_layout)
    slot, phase = 0, 0
    while tile < share_end:
        seq, seq_start, length = segment(seqs, lens, seq_tiles, ends, tile)
        seq_end = seq_start + (length + TILE - 1) // TILE
        segment_end = gl.minimum(share_end, seq_end)
        load_queries(
            q_ptr + seq.to(gl.int64) * q_stride_b, q_rope_ptr + seq.to(gl.int64) * rope_stride_b,
            q_latent, q_rope, row_block * (BLOCK_ROWS // CREW_ROWS) + CREW, num_rows, num_heads,
            q_stride_t, q_stride_n, rope_stride_t, rope_stride_n,
        )
        place = tile - seq_start
        end = segment_end - seq_start
        # the last token that each row sees, and the tiles that all rows see whole, which need no mask
        last_token = length - QUERY_TOKENS + query_token
        whole = gl.minimum(gl.maximum(length - QUERY_TOKENS + 1, 0) // TILE, end)
        mbarrier.wait(full.index(slot), phase)
        scores = _start_scores(q_latent, q_rope, latent, k_rope, slot, layout)
        scores = warpgroup_mma_wait(0, deps=[scores])
        largest = gl.full([CREW_ROWS], NEG_INF, gl.float32, row_layout)
        total = gl.zeros([CREW_ROWS], gl.float32, row_layout)
        weights, largest, total, _ = _finish_weights(
            scores, largest, total, scale_log2, last_token - place * TILE, length - place * TILE, latent, slot,
            weights_layout, True,
        )
        out = gl.zeros([CREW_ROWS, C], gl.float32, out_layout)
        last_slot = slot
        slot, phase = advance(slot, phase, SLOTS)
        for _ in range(place + 1, whole):
            weights, largest, total, out = _step(
                q_latent, q_rope, latent, k_rope, full, empty, slot, phase, last_slot,
                weights, largest, total, out, scale_log2, last_token, length, False,
            )
            last_slot = slot
            slot, phase = advance(slot, phase, SLOTS)
        for masked in range(gl.maximum(place + 1, whole), end):
            weights, largest, total, out = _step(
                q_latent, q_rope, latent, k_rope, full, empty, slot, phase, last_slot,
                weights, largest, total, out, scale_log2, last_token - masked * TILE, length - masked * TILE, True,
            )
            last_slot = slot
            slot, phase = advance(slot, phase, SLOTS)
        out = warpgroup_mma(weights, latent.index(last_slot), out, is_async=True)
        out, weights = warpgroup_mma_wait(0, deps=[out, weights])
        mbarrier.arrive(empty.index(last_slot), count=1)

        lse = largest + gl.log2(total)
        factor = kv_scale / gl.where(total > 0, total, 1.0)
        out = out * gl.convert_layout(factor, gl.SliceLayout(1, out_layout))[:, None]
        begins = tile == seq_start
        if begins & (segment_end == seq_end):
            first = seq.to(gl.int64) * num_rows
            rows = row_block * BLOCK_ROWS + local_rows
            gl.store(lse_ptr + first + rows, lse * LN_2, mask=rows < num_rows)
            rows = (row_block * BLOCK_ROWS + out_rows)[:, None]
            pointers = out_ptr + (first + rows) * C + columns
            gl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=(rows < num_rows) & (columns < C))
        else:
            partial = (row_block * gl.num_programs(0) + gl.program_id(0)) * 2 + begins.to(gl.int32)
            gl.store(partial_lse_ptr + partial * BLOCK_ROWS + local_rows, lse)
            start = partial_ptr + partial.to(gl.int64) * (C * BLOCK_ROWS)
            gl.store(start + columns * BLOCK_ROWS + out_rows[:, None], out)
        tile = segment_end


@gluon.jit
def decode_hopper_rows_kernel(
    latent_desc, rope_desc, q_ptr, q_rope_ptr, table_ptr, lens_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    scale_log2, kv_scale, num_seqs, num_heads, num_rows, q_stride_b, q_stride_t, q_stride_n, rope_stride_b,
    rope_stride_t, rope_stride_n, page_rows, table_stride,
    QUERY_TOKENS: gl.constexpr, C: gl.constexpr, PAGE_TOKENS: gl.constexpr, BLOCK_ROWS: gl.constexpr,
    BLOCK_SEQS: gl.constexpr, TILE: gl.constexpr, SLOTS: gl.constexpr, PDL: gl.constexpr,
):
    """Attend to one program's share of the list of tiles; grid and results are those of `kernel.decode_kernel`."""
    gl.static_assert(BLOCK_ROWS == 2 * CREW_ROWS, "each of two crews has half of the rows")
    gl.static_assert(C <= 256, "sums of more columns do not fit a crew's registers")
    gl.static_assert(SLOTS >= 2, "a tile's values are gathered when the next tile has come")
    gl.static_assert(latent_desc.dtype != gl.float8e4nv, "fp8 rows are hopper.py's, which widens them")
    dtype: gl.constexpr = latent_desc.dtype
    q_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    first_latent = gl.allocate_shared_memory(dtype, [1, CREW_ROWS, C], q_layout)
    first_rope = gl.allocate_shared_memory(dtype, [CREW_ROWS, 64], q_layout)
    second_latent = gl.allocate_shared_memory(dtype, [1, CREW_ROWS, C], q_layout)
    second_rope = gl.allocate_shared_memory(dtype, [CREW_ROWS, 64], q_layout)
    latent, k_rope = tile_ring(dtype, SLOTS, TILE, 1, C)
    full, empty = ring_barriers(SLOTS, 2)
    if PDL:
        # everything above overlaps with the end of the kernel before
        gdc_wait()
        gdc_launch_dependents()
    # the groups' arguments are spelled out: in a variable, constants would not be constants any more
    gl.warp_specialize(
        [
            (
                _crew,
                (
                    q_ptr, q_rope_ptr, lens_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, scale_log2,
                    kv_scale, num_seqs, num_heads, num_rows, q_stride_b, q_stride_t, q_stride_n,
                    rope_stride_b, rope_stride_t, rope_stride_n, latent, k_rope, full, empty,
                    first_latent, first_rope, 0, BLOCK_ROWS, QUERY_TOKENS, BLOCK_SEQS,
                ),
            ),
            (
                _crew,
                (
                    q_ptr, q_rope_ptr, lens_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, scale_log2,
                    kv_scale, num_seqs, num_heads, num_rows, q_stride_b, q_stride_t, q_stride_n,
                    rope_stride_b, rope_stride_t, rope_stride_n, latent, k_rope, full, empty,
                    second_latent, second_rope, 1, BLOCK_ROWS, QUERY_TOKENS, BLOCK_SEQS,
                ),
            ),
            (
                produce,
                (
                    latent_desc, rope_desc, table_ptr, lens_ptr, num_seqs, table_stride, page_rows,
                    latent, k_rope, full, empty, C, TILE, PAGE_TOKENS, BLOCK_SEQS,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )
