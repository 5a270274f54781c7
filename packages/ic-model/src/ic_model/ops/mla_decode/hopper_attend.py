"""Attending on Hopper, in two crews: one turns tiles into weights, the other one gathers the values by them.

The crews meet at a small ring of weights. So the scores of a tile are computed while the values of the one before
are gathered, and neither waits for the other's latencies; a tile's place is free as soon as its values are
gathered, whether the next tile has arrived or not.

With few rows tokens are on the M side of both products (scores = latent . q^T, out^T = latent^T . w): 16 rows fill
the tensor cores' 64-wide instructions. From 64 rows on the rows are (scores = q . latent^T, out = w . latent):
the weights are the smaller operand then, and two crews gather half of the columns each.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ic_model.ops.hopper_softmax import NEG_INF, clear_rows
from ic_model.ops.mla_decode.hopper_list import advance, segment, work_list

# Triton 3.9 has renamed it, and 3.6 to 3.8 have the old name only
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

LN_2 = gl.constexpr(0.6931471805599453)
# columns of one instruction: ptxas holds it to the registers that each thread begins with, of 512 threads 128
WIDEST = gl.constexpr(128)


@gluon.jit
def load_queries(
    q_ptr, q_rope_ptr, q_latent, q_rope, row_block, num_rows, num_heads,
    stride_t, stride_n, rope_stride_t, rope_stride_n,
):
    """One block of rows of a sequence's absorbed and rotated queries to shared memory."""
    PARTS: gl.constexpr = q_latent.shape[0]
    BLOCK_ROWS: gl.constexpr = q_latent.shape[1]
    COLUMNS: gl.constexpr = q_latent.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = row_block * BLOCK_ROWS + gl.arange(0, BLOCK_ROWS, layout=gl.SliceLayout(1, layout))
    token, head = rows // num_heads, rows % num_heads
    pointers = q_ptr + (token * stride_t + head * stride_n)[:, None]
    rope_pointers = q_rope_ptr + (token * rope_stride_t + head * rope_stride_n)[:, None]
    there = (rows < num_rows)[:, None]
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))[None, :]
    rope_pointers += gl.arange(0, 64, layout=gl.SliceLayout(0, layout))[None, :]
    if q_ptr.dtype.element_ty == q_latent.dtype:
        # past the registers, which hold few loads at a time; what is not there becomes zero
        for part in gl.static_range(PARTS):
            numbers = pointers + part * COLUMNS + columns
            copy_to_shared(q_latent.index(part), numbers, there)
        copy_to_shared(q_rope, rope_pointers, there)
        async_copy.commit_group()
        async_copy.wait_group(0)
    else:
        for part in gl.static_range(PARTS):
            values = gl.load(pointers + part * COLUMNS + columns, mask=there, other=0.0)
            q_latent.index(part).store(values.to(q_latent.dtype))
        q_rope.store(gl.load(rope_pointers, mask=there, other=0.0).to(q_rope.dtype))
    fence_async_shared()


@gluon.jit
def _score(latent, k_rope, slot, q_latent, q_rope, layout: gl.constexpr, ROWS_FIRST: gl.constexpr):
    """The scores of one tile: `[TILE, BLOCK_ROWS]`, or `[BLOCK_ROWS, TILE]` where rows come first."""
    PARTS: gl.constexpr = q_latent.shape[0]
    TILE: gl.constexpr = k_rope.shape[1]
    BLOCK_ROWS: gl.constexpr = q_latent.shape[1]
    rope = k_rope.index(slot)
    if ROWS_FIRST:
        scores = gl.zeros([BLOCK_ROWS, TILE], gl.float32, layout)
        scores = warpgroup_mma(q_rope, rope.permute([1, 0]), scores, use_acc=False, is_async=True)
    else:
        scores = gl.zeros([TILE, BLOCK_ROWS], gl.float32, layout)
        scores = warpgroup_mma(rope, q_rope.permute([1, 0]), scores, use_acc=False, is_async=True)
    for part in gl.static_range(PARTS):
        tile = latent.index(slot * PARTS + part)
        q = q_latent.index(part)
        if ROWS_FIRST:
            scores = warpgroup_mma(q, tile.permute([1, 0]), scores, is_async=True)
        else:
            scores = warpgroup_mma(tile, q.permute([1, 0]), scores, is_async=True)
    return warpgroup_mma_wait(0, deps=[scores])


@gluon.jit
def scores(
    q_ptr, q_rope_ptr, lens_ptr, lse_ptr, partial_lse_ptr, scale_log2, kv_scale,
    num_seqs, num_heads, num_rows, q_stride_b, q_stride_t, q_stride_n,
    rope_stride_b, rope_stride_t, rope_stride_n,
    latent, k_rope, full, q_latent, q_rope, weights, factors, told, heard,
    QUERY_TOKENS: gl.constexpr, BLOCK_SEQS: gl.constexpr, ROWS_FIRST: gl.constexpr,
):
    """Turn tiles into weights, and tell the crew of values: the weights, and the decay of what came before.

    After a segment's last tile one more message brings the factor that its sums are multiplied by.
    """
    SLOTS: gl.constexpr = k_rope.shape[0]
    TILE: gl.constexpr = k_rope.shape[1]
    PARTS: gl.constexpr = q_latent.shape[0]
    BLOCK_ROWS: gl.constexpr = q_latent.shape[1]
    MESSAGES: gl.constexpr = weights.shape[0]
    TOKEN_DIM: gl.constexpr = 1 if ROWS_FIRST else 0
    N: gl.constexpr = TILE if ROWS_FIRST else BLOCK_ROWS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    row_layout: gl.constexpr = gl.SliceLayout(TOKEN_DIM, layout)
    list_layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    row_block = gl.program_id(1)
    local_rows = gl.arange(0, BLOCK_ROWS, layout=row_layout)
    query_token = (row_block * BLOCK_ROWS + local_rows) // num_heads
    tokens = gl.expand_dims(gl.arange(0, TILE, layout=gl.SliceLayout(1 - TOKEN_DIM, layout)), TOKEN_DIM ^ 1)

    seqs, lens, seq_tiles, ends, tile, share_end = work_list(lens_ptr, num_seqs, TILE, BLOCK_SEQS, list_layout)
    slot, phase, message, message_phase = 0, 0, 0, 0
    while tile < share_end:
        seq, seq_start, length = segment(seqs, lens, seq_tiles, ends, tile)
        seq_end = seq_start + (length + TILE - 1) // TILE
        segment_end = gl.minimum(share_end, seq_end)
        load_queries(
            q_ptr + seq.to(gl.int64) * q_stride_b, q_rope_ptr + seq.to(gl.int64) * rope_stride_b,
            q_latent, q_rope, row_block, num_rows, num_heads,
            q_stride_t, q_stride_n, rope_stride_t, rope_stride_n,
        )
        largest = gl.full([BLOCK_ROWS], NEG_INF, gl.float32, row_layout)
        if ROWS_FIRST:
            total = gl.zeros([BLOCK_ROWS, TILE], gl.float32, layout)
        else:
            total = gl.zeros([TILE, BLOCK_ROWS], gl.float32, layout)
        for place in range(tile - seq_start, segment_end - seq_start):
            valid = length - place * TILE
            mbarrier.wait(full.index(slot), phase)
            score = _score(latent, k_rope, slot, q_latent, q_rope, layout, ROWS_FIRST)
            # the last token that each row sees, counted from the tile's first
            last_seen = gl.expand_dims(valid - QUERY_TOKENS + query_token, TOKEN_DIM)
            score = gl.where(tokens <= last_seen, score, NEG_INF)
            new_largest = gl.maximum(largest, gl.max(score, TOKEN_DIM) * scale_log2)
            # a row that has seen nothing yet keeps -inf; subtracting 0 instead avoids inf - inf
            anchor = gl.where(new_largest == NEG_INF, 0.0, new_largest)
            decay = gl.exp2(largest - anchor)
            weight = gl.exp2(score * scale_log2 - gl.expand_dims(anchor, TOKEN_DIM))
            # summed over the tokens only once, at the end: until then every thread keeps its own
            total = total * gl.expand_dims(decay, TOKEN_DIM) + weight
            largest = new_largest
            if valid < TILE:
                for part in gl.static_range(PARTS):
                    clear_rows(latent.index(slot * PARTS + part), valid)
            mbarrier.wait(heard.index(message), message_phase ^ 1)
            weights.index(message).store(weight.to(weights.dtype))
            factors.index(message).store(decay)
            fence_async_shared()
            mbarrier.arrive(told.index(message), count=1)
            slot, phase = advance(slot, phase, SLOTS)
            message, message_phase = advance(message, message_phase, MESSAGES)

        sums = gl.sum(total, TOKEN_DIM)
        mbarrier.wait(heard.index(message), message_phase ^ 1)
        factors.index(message).store(kv_scale / gl.where(sums > 0, sums, 1.0))
        mbarrier.arrive(told.index(message), count=1)
        message, message_phase = advance(message, message_phase, MESSAGES)
        lse = largest + gl.log2(sums)
        begins = tile == seq_start
        if begins & (segment_end == seq_end):
            rows = row_block * BLOCK_ROWS + local_rows
            gl.store(lse_ptr + seq.to(gl.int64) * num_rows + rows, lse * LN_2, mask=rows < num_rows)
        else:
            partial = (row_block * gl.num_programs(0) + gl.program_id(0)) * 2 + begins.to(gl.int32)
            gl.store(partial_lse_ptr + partial * BLOCK_ROWS + local_rows, lse)
        tile = segment_end


@gluon.jit
def values(
    lens_ptr, out_ptr, partial_ptr, num_seqs, num_rows, latent, empty, weights, factors, told, heard,
    PART: gl.constexpr, PARTS: gl.constexpr, BLOCK_SEQS: gl.constexpr,
    ROWS_FIRST: gl.constexpr,
):
    """Gather one part of the columns by the weights, tile after tile, and write each segment's result."""
    SLOTS: gl.constexpr = latent.shape[0] // PARTS
    TILE: gl.constexpr = latent.shape[1]
    COLUMNS: gl.constexpr = latent.shape[2]
    MESSAGES: gl.constexpr = weights.shape[0]
    BLOCK_ROWS: gl.constexpr = factors.shape[1]
    ROW_DIM: gl.constexpr = 0 if ROWS_FIRST else 1
    N: gl.constexpr = min(COLUMNS, WIDEST) if ROWS_FIRST else BLOCK_ROWS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1 - ROW_DIM, layout)
    list_layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    local_rows = gl.expand_dims(gl.arange(0, BLOCK_ROWS, layout=row_layout), 1 - ROW_DIM)
    columns = PART * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(ROW_DIM, layout))
    columns = gl.expand_dims(columns, ROW_DIM)
    row_block = gl.program_id(1)

    seqs, lens, seq_tiles, ends, tile, share_end = work_list(lens_ptr, num_seqs, TILE, BLOCK_SEQS, list_layout)
    slot, message, message_phase = 0, 0, 0
    while tile < share_end:
        seq, seq_start, length = segment(seqs, lens, seq_tiles, ends, tile)
        seq_end = seq_start + (length + TILE - 1) // TILE
        segment_end = gl.minimum(share_end, seq_end)
        if ROWS_FIRST:
            out = gl.zeros([BLOCK_ROWS, COLUMNS], gl.float32, layout)
        else:
            out = gl.zeros([COLUMNS, BLOCK_ROWS], gl.float32, layout)
        for _ in range(tile, segment_end):
            mbarrier.wait(told.index(message), message_phase)
            out *= gl.expand_dims(factors.index(message).load(row_layout), 1 - ROW_DIM)
            values_tile = latent.index(slot * PARTS + PART)
            if ROWS_FIRST:
                out = warpgroup_mma(weights.index(message), values_tile, out, is_async=True)
            else:
                out = warpgroup_mma(values_tile.permute([1, 0]), weights.index(message), out, is_async=True)
            out = warpgroup_mma_wait(0, deps=[out])
            mbarrier.arrive(empty.index(slot), count=1)
            mbarrier.arrive(heard.index(message), count=1)
            slot, _phase = advance(slot, 0, SLOTS)
            message, message_phase = advance(message, message_phase, MESSAGES)

        mbarrier.wait(told.index(message), message_phase)
        out *= gl.expand_dims(factors.index(message).load(row_layout), 1 - ROW_DIM)
        mbarrier.arrive(heard.index(message), count=1)
        message, message_phase = advance(message, message_phase, MESSAGES)
        begins = tile == seq_start
        WIDTH: gl.constexpr = COLUMNS * PARTS
        if begins & (segment_end == seq_end):
            rows = row_block * BLOCK_ROWS + local_rows
            pointers = out_ptr + (seq.to(gl.int64) * num_rows + rows) * WIDTH + columns
            gl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=(rows < num_rows) & (columns < WIDTH))
        else:
            partial = (row_block * gl.num_programs(0) + gl.program_id(0)) * 2 + begins.to(gl.int32)
            start = partial_ptr + partial.to(gl.int64) * (WIDTH * BLOCK_ROWS)
            # as it lies in the accumulators: four threads write 32 bytes side by side
            gl.store(start + columns * BLOCK_ROWS + local_rows, out)
        tile = segment_end
