"""MLA decoding for Hopper in Gluon: a producer warp keeps the copy engine busy, a warpgroup attends.

The list of tiles, the shares and the partial results are those of `kernel.py`. What plain Triton cannot say is who
waits for whom: its loop asks for the next tile only when the last one has arrived, so that memory idles in
between. Here one warp does nothing but ask: a tile's place in the ring is refilled as soon as the last product
that reads it is done, while the next tile is on its way already. That is what the bandwidth of an H100 or H200
takes (bytes in flight = bandwidth * latency). With fp8 rows a third group of warps widens the tiles to float16 in
between, because the tensor cores take a transposed operand (the values) in 16 bits only.

Tokens are on the M side of both products and the rows on the N side (scores = latent . q^T, out^T = latent^T . w),
so that 16 rows fill the tensor cores' 64-wide instructions; the latent tile serves both from one place.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Triton 3.9 has renamed it, and 3.6 to 3.8 have the old name only
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

LN_2 = gl.constexpr(0.6931471805599453)
NEG_INF = gl.constexpr(float("-inf"))


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _advance(slot, phase, SLOTS: gl.constexpr):
    """The next place in a ring, and the parity that its barriers have then."""
    wraps = (slot + 1 == SLOTS).to(gl.int32)
    return (slot + 1) * (1 - wraps), phase ^ wraps


@gluon.jit
def _work_list(lens_ptr, num_seqs, BLOCK_SEQS: gl.constexpr, layout: gl.constexpr):
    """The sequences: number, length, tiles, and where those end in the list; and this program's share of it."""
    seqs = gl.arange(0, BLOCK_SEQS, layout=layout)
    lens = gl.load(lens_ptr + seqs, mask=seqs < num_seqs, other=0)
    seq_tiles = (lens + 63) // 64
    ends = gl.associative_scan(seq_tiles, 0, _add)
    tiles = gl.sum(seq_tiles, 0)
    program = gl.program_id(0).to(gl.int64)
    # no program in the middle of the list may be without work: the second kernel reads what each has left
    programs = gl.minimum(gl.num_programs(0), gl.maximum(tiles, 1))
    first = (program * tiles // programs).to(gl.int32)
    end = gl.minimum(((program + 1) * tiles // programs).to(gl.int32), tiles)
    return seqs, lens, seq_tiles, ends, first, end


@gluon.jit
def _segment(seqs, lens, seq_tiles, ends, tile):
    """The sequence that a tile of the list belongs to, the place of its first tile, and its length in tokens."""
    seq = gl.sum((ends <= tile).to(gl.int32), 0)
    seq_start = gl.sum(gl.where(seqs < seq, seq_tiles, 0), 0)
    length = gl.sum(gl.where(seqs == seq, lens, 0), 0)
    return seq, seq_start, length


@gluon.jit
def _producer(
    latent_desc, rope_desc, table_ptr, lens_ptr, num_seqs, table_stride, page_rows,
    latent_ring, rope_ring, full, empty,
    C: gl.constexpr, PAGE_TOKENS: gl.constexpr, BLOCK_SEQS: gl.constexpr,
):
    """Ask for the tiles of the share, one after the other, each as soon as there is room for it."""
    SLOTS: gl.constexpr = latent_ring.shape[0]
    # fp8 tiles come in halves, which leaves more of the ring in flight
    STEP: gl.constexpr = latent_ring.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    seqs, lens, seq_tiles, ends, tile, share_end = _work_list(lens_ptr, num_seqs, BLOCK_SEQS, layout)
    slot, phase = 0, 0
    while tile < share_end:
        seq, seq_start, length = _segment(seqs, lens, seq_tiles, ends, tile)
        segment_end = gl.minimum(share_end, seq_start + (length + 63) // 64)
        table = table_ptr + seq.to(gl.int64) * table_stride
        for i in range(tile - seq_start, segment_end - seq_start):
            token = i * 64
            row = gl.load(table + token // PAGE_TOKENS) * page_rows + token % PAGE_TOKENS
            for part in gl.static_range(64 // STEP):
                barrier = full.index(slot)
                mbarrier.wait(empty.index(slot), phase ^ 1)
                mbarrier.expect(barrier, latent_desc.block_type.nbytes + rope_desc.block_type.nbytes)
                async_load(latent_desc, [row + part * STEP, 0], barrier, latent_ring.index(slot))
                async_load(rope_desc, [row + part * STEP, C], barrier, rope_ring.index(slot))
                slot, phase = _advance(slot, phase, SLOTS)
        tile = segment_end


@gluon.jit
def _widener(
    lens_ptr, num_seqs, latent_ring, rope_ring, ring_full, ring_empty, latent_wide, rope_wide, full, empty,
    BLOCK_SEQS: gl.constexpr,
):
    """Widen fp8 half tiles to float16; every e4m3 number is one."""
    SLOTS: gl.constexpr = latent_ring.shape[0]
    WIDE_SLOTS: gl.constexpr = latent_wide.shape[0]
    STEP: gl.constexpr = latent_ring.shape[1]
    dtype: gl.constexpr = latent_wide.dtype
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
    list_layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    _seqs, _lens, _tiles, _ends, tile, share_end = _work_list(lens_ptr, num_seqs, BLOCK_SEQS, list_layout)
    slot, phase, wide_slot, wide_phase = 0, 0, 0, 0
    for _ in range(tile, share_end):
        for part in gl.static_range(64 // STEP):
            mbarrier.wait(ring_full.index(slot), phase)
            latent = latent_ring.index(slot).load(layout)
            k_rope = rope_ring.index(slot).load(layout)
            if part == 0:
                mbarrier.wait(empty.index(wide_slot), wide_phase ^ 1)
            latent_wide.index(wide_slot).slice(part * STEP, STEP, 0).store(latent.to(dtype))
            rope_wide.index(wide_slot).slice(part * STEP, STEP, 0).store(k_rope.to(dtype))
            # only now has everything arrived in registers: the copy engine does not wait for loads under way
            fence_async_shared()
            mbarrier.arrive(ring_empty.index(slot), count=1)
            slot, phase = _advance(slot, phase, SLOTS)
        fence_async_shared()
        mbarrier.arrive(full.index(wide_slot), count=1)
        wide_slot, wide_phase = _advance(wide_slot, wide_phase, WIDE_SLOTS)


@gluon.jit
def _clear_rows(buffer, valid, WARPS: gl.constexpr):
    """Zero the rows from `valid` on: what lies there may be NaN, and 0 * NaN is NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    COLUMNS: gl.constexpr = buffer.shape[1]
    for column in gl.static_range(0, COLUMNS, 64):
        part = buffer.slice(column, 64, 1)
        values = part.load(layout)
        part.store(gl.where((rows < valid)[:, None], values, gl.zeros_like(values)))


@gluon.jit
def _load_queries(
    q_ptr, q_latent, q_rope, row_block, num_rows, num_heads, stride_t, stride_n, WARPS: gl.constexpr
):
    """One block of rows of a sequence's absorbed queries to shared memory."""
    C: gl.constexpr = q_latent.shape[1]
    BLOCK_ROWS: gl.constexpr = q_latent.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    rows = row_block * BLOCK_ROWS + gl.arange(0, BLOCK_ROWS, layout=gl.SliceLayout(1, layout))
    pointers = q_ptr + ((rows // num_heads) * stride_t + (rows % num_heads) * stride_n)[:, None]
    there = (rows < num_rows)[:, None]
    columns = gl.arange(0, C, layout=gl.SliceLayout(0, layout))[None, :]
    q_latent.store(gl.load(pointers + columns, mask=there, other=0.0).to(q_latent.dtype))
    columns = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))[None, :]
    q_rope.store(gl.load(pointers + C + columns, mask=there, other=0.0).to(q_rope.dtype))
    fence_async_shared()


@gluon.jit
def _score(latent, k_rope, q_latent, q_rope, layout: gl.constexpr):
    """Start the scores of one tile, `[64, BLOCK_ROWS]`."""
    BLOCK_ROWS: gl.constexpr = q_latent.shape[0]
    scores = gl.zeros([64, BLOCK_ROWS], gl.float32, layout)
    scores = warpgroup_mma(latent, q_latent.permute([1, 0]), scores, use_acc=False, is_async=True)
    return warpgroup_mma(k_rope, q_rope.permute([1, 0]), scores, is_async=True)


@gluon.jit
def _weigh(scores, largest, total, scale_log2, last_seen, MASKED: gl.constexpr):
    """The online softmax of one tile: its weights, and the running maximum, sum and decay of what came before."""
    layout: gl.constexpr = scores.type.layout
    if MASKED:
        tokens = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        scores = gl.where(tokens[:, None] <= last_seen[None, :], scores, NEG_INF)
    new_largest = gl.maximum(largest, gl.max(scores, 0) * scale_log2)
    anchor = new_largest
    if MASKED:
        # a row that has seen nothing yet keeps -inf; subtracting 0 instead avoids inf - inf
        anchor = gl.where(new_largest == NEG_INF, 0.0, new_largest)
    decay = gl.exp2(largest - anchor)
    weights = gl.exp2(scores * scale_log2 - anchor[None, :])
    # summed over the tokens only once, at the end: until then every thread keeps its own
    return weights, new_largest, total * decay[None, :] + weights, decay


@gluon.jit
def _rescaled(values, factor, layout: gl.constexpr):
    """Multiply `[C, BLOCK_ROWS]` by a factor per row that came out of the scores' layout."""
    return values * gl.convert_layout(factor, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def _attend(
    latent, k_rope, q_latent, q_rope, weights_buffer, largest, total, out, scale_log2, valid, last_seen,
    MASKED: gl.constexpr,
):
    """One tile: scores, softmax, values."""
    if MASKED:
        if valid < 64:
            WARPS: gl.constexpr = gl.num_warps()
            _clear_rows(latent, valid, WARPS)
            _clear_rows(k_rope, valid, WARPS)
            fence_async_shared()
    score_layout: gl.constexpr = total.type.layout
    out_layout: gl.constexpr = out.type.layout
    scores = _score(latent, k_rope, q_latent, q_rope, score_layout)
    scores = warpgroup_mma_wait(0, deps=[scores])
    weights, largest, total, decay = _weigh(scores, largest, total, scale_log2, last_seen, MASKED)
    weights_buffer.store(weights.to(weights_buffer.dtype))
    fence_async_shared()
    out = warpgroup_mma(latent.permute([1, 0]), weights_buffer, _rescaled(out, decay, out_layout), is_async=True)
    return largest, total, warpgroup_mma_wait(0, deps=[out])


@gluon.jit
def _store_result(
    out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, largest, total, out, kv_scale, seq, num_rows, begins, whole,
    layout: gl.constexpr,
):
    """Write a segment's result: the answer where it is the whole sequence, else a partial result."""
    C: gl.constexpr = out.shape[0]
    BLOCK_ROWS: gl.constexpr = out.shape[1]
    row_block = gl.program_id(1)
    lse = largest + gl.log2(total)
    out = _rescaled(out, kv_scale / gl.where(total > 0, total, 1.0), layout)
    local_rows = gl.arange(0, BLOCK_ROWS, layout=largest.type.layout)
    out_rows = gl.arange(0, BLOCK_ROWS, layout=gl.SliceLayout(0, layout))
    columns = gl.arange(0, C, layout=gl.SliceLayout(1, layout))
    if whole:
        flat = seq.to(gl.int64) * num_rows + row_block * BLOCK_ROWS
        rows_left = num_rows - row_block * BLOCK_ROWS
        gl.store(lse_ptr + flat + local_rows, lse * LN_2, mask=local_rows < rows_left)
        pointers = out_ptr + (flat + out_rows)[None, :] * C + columns[:, None]
        gl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=(out_rows < rows_left)[None, :])
    else:
        partial = (row_block * gl.num_programs(0) + gl.program_id(0)) * 2 + begins.to(gl.int32)
        gl.store(partial_lse_ptr + partial * BLOCK_ROWS + local_rows, lse)
        # as it lies in the accumulators: four threads write 32 bytes side by side
        start = partial_ptr + partial.to(gl.int64) * (C * BLOCK_ROWS)
        gl.store(start + columns[:, None] * BLOCK_ROWS + out_rows[None, :], out)


@gluon.jit
def _consumer(
    q_ptr, lens_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, scale_log2, kv_scale,
    num_seqs, num_heads, num_rows, q_stride_b, q_stride_t, q_stride_n,
    latent_ring, rope_ring, q_latent, q_rope, weights_buffer, full, empty,
    QUERY_TOKENS: gl.constexpr, BLOCK_SEQS: gl.constexpr,
):
    """Attend to the tiles of the share, one after the other, and write each segment's result."""
    SLOTS: gl.constexpr = latent_ring.shape[0]
    C: gl.constexpr = latent_ring.shape[2]
    BLOCK_ROWS: gl.constexpr = q_latent.shape[0]
    WARPS: gl.constexpr = gl.num_warps()
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_ROWS, 16])
    # 64 tokens are one warpgroup's; where two work together they share the scores by rows
    score_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, WARPS // 4], [16, BLOCK_ROWS // (WARPS // 4), 16]
    )
    list_layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    row_block = gl.program_id(1)
    rows = row_block * BLOCK_ROWS + gl.arange(0, BLOCK_ROWS, layout=gl.SliceLayout(0, score_layout))

    seqs, lens, seq_tiles, ends, tile, share_end = _work_list(lens_ptr, num_seqs, BLOCK_SEQS, list_layout)
    slot, phase = 0, 0
    while tile < share_end:
        seq, seq_start, length = _segment(seqs, lens, seq_tiles, ends, tile)
        seq_end = seq_start + (length + 63) // 64
        segment_end = gl.minimum(share_end, seq_end)
        q_base = q_ptr + seq.to(gl.int64) * q_stride_b
        _load_queries(q_base, q_latent, q_rope, row_block, num_rows, num_heads, q_stride_t, q_stride_n, WARPS)
        largest = gl.full([BLOCK_ROWS], NEG_INF, gl.float32, gl.SliceLayout(0, score_layout))
        total = gl.zeros([64, BLOCK_ROWS], gl.float32, score_layout)
        out = gl.zeros([C, BLOCK_ROWS], gl.float32, out_layout)
        # tiles that every query token sees whole come first: a branch in their loop would cost registers
        whole_end = gl.minimum(segment_end, seq_start + gl.maximum(length - QUERY_TOKENS + 1, 0) // 64)
        place = tile
        while place < whole_end:
            mbarrier.wait(full.index(slot), phase)
            largest, total, out = _attend(
                latent_ring.index(slot), rope_ring.index(slot), q_latent, q_rope, weights_buffer,
                largest, total, out, scale_log2, 0, rows, False,
            )
            mbarrier.arrive(empty.index(slot), count=1)
            slot, phase = _advance(slot, phase, SLOTS)
            place += 1
        while place < segment_end:
            valid = length - (place - seq_start) * 64
            mbarrier.wait(full.index(slot), phase)
            largest, total, out = _attend(
                latent_ring.index(slot), rope_ring.index(slot), q_latent, q_rope, weights_buffer,
                largest, total, out, scale_log2, valid, valid - QUERY_TOKENS + rows // num_heads, True,
            )
            mbarrier.arrive(empty.index(slot), count=1)
            slot, phase = _advance(slot, phase, SLOTS)
            place += 1
        begins = tile == seq_start
        _store_result(
            out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, largest, gl.sum(total, 0), out, kv_scale,
            seq, num_rows, begins, begins & (segment_end == seq_end), out_layout,
        )
        tile = segment_end


@gluon.jit
def _ring(dtype: gl.constexpr, SLOTS: gl.constexpr, STEP: gl.constexpr, C: gl.constexpr):
    """Shared memory for tiles, with a barrier for "has arrived" and one for "may be overwritten" each."""
    WIDTH: gl.constexpr = dtype.primitive_bitwidth
    rope_swizzle: gl.constexpr = 64 * WIDTH // 8
    latent = gl.allocate_shared_memory(dtype, [SLOTS, STEP, C], gl.NVMMASharedLayout(128, WIDTH, 2))
    rope = gl.allocate_shared_memory(dtype, [SLOTS, STEP, 64], gl.NVMMASharedLayout(rope_swizzle, WIDTH, 2))
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    return latent, rope, full, empty


@gluon.jit
def decode_hopper_kernel(
    latent_desc, rope_desc, q_ptr, table_ptr, lens_ptr,
    out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, scale_log2, kv_scale,
    num_seqs, num_heads, num_rows, q_stride_b, q_stride_t, q_stride_n, page_rows, table_stride,
    QUERY_TOKENS: gl.constexpr, C: gl.constexpr, PAGE_TOKENS: gl.constexpr,
    BLOCK_ROWS: gl.constexpr, BLOCK_SEQS: gl.constexpr, SLOTS: gl.constexpr, WIDE_SLOTS: gl.constexpr,
    PDL: gl.constexpr,
):
    """Attend to one program's share of the list of tiles; grid and results are those of `kernel.decode_kernel`."""
    FP8: gl.constexpr = latent_desc.dtype == gl.float8e4nv
    dtype: gl.constexpr = gl.float16 if FP8 else latent_desc.dtype
    q_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_latent = gl.allocate_shared_memory(dtype, [BLOCK_ROWS, C], q_layout)
    q_rope = gl.allocate_shared_memory(dtype, [BLOCK_ROWS, 64], q_layout)
    weights_layout: gl.constexpr = gl.NVMMASharedLayout(min(BLOCK_ROWS * 2, 128), 16, 2)
    weights_buffer = gl.allocate_shared_memory(dtype, [64, BLOCK_ROWS], weights_layout)
    latent_ring, rope_ring, full, empty = _ring(latent_desc.dtype, SLOTS, latent_desc.block_shape[0], C)
    if PDL:
        # everything above overlaps with the end of the kernel before
        gdc_wait()
        gdc_launch_dependents()
    if FP8:
        latent_wide, rope_wide, wide_full, wide_empty = _ring(dtype, WIDE_SLOTS, 64, C)
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (
                        q_ptr, lens_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, scale_log2, kv_scale,
                        num_seqs, num_heads, num_rows, q_stride_b, q_stride_t, q_stride_n,
                        latent_wide, rope_wide, q_latent, q_rope, weights_buffer, wide_full, wide_empty,
                        QUERY_TOKENS, BLOCK_SEQS,
                    ),
                ),
                (
                    _widener,
                    (
                        lens_ptr, num_seqs, latent_ring, rope_ring, full, empty,
                        latent_wide, rope_wide, wide_full, wide_empty, BLOCK_SEQS,
                    ),
                ),
                (
                    _producer,
                    (
                        latent_desc, rope_desc, table_ptr, lens_ptr, num_seqs, table_stride, page_rows,
                        latent_ring, rope_ring, full, empty, C, PAGE_TOKENS, BLOCK_SEQS,
                    ),
                ),
            ],
            [4, 1],
            [120, 40],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (
                        q_ptr, lens_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, scale_log2, kv_scale,
                        num_seqs, num_heads, num_rows, q_stride_b, q_stride_t, q_stride_n,
                        latent_ring, rope_ring, q_latent, q_rope, weights_buffer, full, empty,
                        QUERY_TOKENS, BLOCK_SEQS,
                    ),
                ),
                (
                    _producer,
                    (
                        latent_desc, rope_desc, table_ptr, lens_ptr, num_seqs, table_stride, page_rows,
                        latent_ring, rope_ring, full, empty, C, PAGE_TOKENS, BLOCK_SEQS,
                    ),
                ),
            ],
            [1],
            [40],
        )
