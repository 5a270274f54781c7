"""Backward pass for Hopper in Gluon: one kernel for dQ, dK and dV; rows of 192 and of 128.

Letters as in `backward.py`. Scores are computed once: a program owns 128 keys, keeps their dK and dV in registers,
and walks over blocks of 64 queries. Its two consumers have 64 keys each, a producer warp copies. Scores stand as
`[keys, queries]`, so that P and dS leave the softmax as left operands of the next products, in registers. Only dQ
needs dS of all keys: the consumers exchange it in shared memory and add pieces of 64 columns to a sum in float32,
which many programs add to in whatever order they come (FlashAttention-3, arXiv 2407.08608, section 3.3). Hence two
runs differ in their last bits; where that is forbidden, the kernels of `backward.py` do it.

Registers are what is short: of 240 per thread, dK takes 96 and dV 64. So the row sums are no operands of the
softmax, which would take 16 each: the products start from them,

    exp2(c (S - lse / scale)) = P        P * (dP - delta) = dS        with c = scale * log2(e).

The sum of dQ is laid out as the tensor cores hold it, 16 bytes of a thread beside those of the next one:
`hopper_sums.py` has the kernels before and after this one.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ic_model.ops.hopper_softmax import clear_rows
from ic_model.ops.mla_prefill.hopper import _advance, _barriers, _copy_tile, _locate

# what changes from batch to batch: otherwise each would compile anew for a number that 16 divides, and for 1
UNSPECIALIZED = (
    "num_seqs", "tokens_q", "tokens_k", "q_blocks", "q_batch_rows", "k_batch_rows", "v_batch_rows",
    "d_out_batch_rows",
)
# queries of a block, keys of a consumer, columns of a piece of dQ
SIDE = gl.constexpr(64)


@gluon.jit
def _block(step, begin, before, after, rest):
    """The block of a step: first those on the diagonal, then the last one if it is not full, then the rest."""
    later = gl.where(step < before + after, begin + before + rest, begin + step - after)
    return gl.where(step < before, begin + step, later)


@gluon.jit
def _producer(
    q_desc_0, q_desc_1, k_desc_0, k_desc_1, v_desc, d_out_desc, sums_desc, q_row, q_stride_n, d_out_row,
    d_out_stride_n, sums_row, q_blocks, first_head, k_row, k_column, v_row, v_column, begin, before, after, rest,
    q_0, q_1, d_out, sums, q_full, d_out_full, q_empty, k_0, k_1, v, k_full,
    GROUP: gl.constexpr,
):
    """Ask for the keys and values, then for a block of queries as soon as there is room for it."""
    SLOTS: gl.constexpr = q_0.shape[0]
    BLOCK: gl.constexpr = q_0.shape[1]
    WIDTH: gl.constexpr = q_0.shape[2]
    mbarrier.expect(
        k_full.index(0), 2 * (k_desc_0.block_type.nbytes + k_desc_1.block_type.nbytes + v_desc.block_type.nbytes)
    )
    for part in gl.static_range(2):
        row = k_row + part * k_0.shape[1]
        _copy_tile(k_desc_0, [row, k_column], k_full.index(0), k_0.index(part))
        _copy_tile(k_desc_1, [row, k_column + WIDTH], k_full.index(0), k_1.index(part))
        _copy_tile(v_desc, [v_row + part * k_0.shape[1], v_column], k_full.index(0), v.index(part))
    slot, phase = 0, 0
    for member in range(GROUP):
        head = first_head + member
        for step in range(before + after + rest):
            block = _block(step, begin, before, after, rest)
            mbarrier.wait(q_empty.index(slot), phase ^ 1)
            barrier = q_full.index(slot)
            mbarrier.expect(
                barrier, q_desc_0.block_type.nbytes + q_desc_1.block_type.nbytes + sums_desc.block_type.nbytes
            )
            row = q_row + block * BLOCK
            _copy_tile(q_desc_0, [row, head * q_stride_n], barrier, q_0.index(slot))
            _copy_tile(q_desc_1, [row, head * q_stride_n + WIDTH], barrier, q_1.index(slot))
            _copy_tile(sums_desc, [2 * (head * q_blocks + sums_row + block), 0], barrier, sums.index(slot))
            barrier = d_out_full.index(slot)
            mbarrier.expect(barrier, d_out_desc.block_type.nbytes)
            _copy_tile(
                d_out_desc, [d_out_row + block * BLOCK, head * d_out_stride_n], barrier, d_out.index(slot)
            )
            slot, phase = _advance(slot, phase, SLOTS)


@gluon.jit
def _opaque(number):
    """The same number, unknown to the compiler: else it keeps all addresses that follow from it in registers."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _add_piece(d_q_ptr, d_s, k_left, k_right, layout: gl.constexpr):
    """Add what all keys of the program give to `[64 queries, 64 columns]` of dQ."""
    piece = gl.zeros([SIDE, SIDE], gl.float32, layout)
    piece = warpgroup_mma(d_s.index(0).permute([1, 0]), k_left, piece, use_acc=False, is_async=True)
    piece = warpgroup_mma(d_s.index(1).permute([1, 0]), k_right, piece, is_async=True)
    piece = warpgroup_mma_wait(0, deps=[piece])
    # rows are warp, half and lane // 4, columns are 8 groups, lane % 4 and a pair: each thread's halves and pairs
    # side by side
    piece = piece.reshape([4, 2, 8, 8, 4, 2]).permute([0, 3, 2, 4, 1, 5]).reshape([SIDE * SIDE])
    _add(d_q_ptr, piece)


@gluon.jit
def _add(pointer, values):
    """Add a row of values to memory, four at a time."""
    gl.atomic_add(pointer + gl.arange(0, values.shape[0], layout=values.type.layout), values, sem="relaxed")


@gluon.jit
def _step(
    d_q_ptr, first_query, q_len, reach, k_left, scale_log2, turn, slot, phase, d_s_phase,
    q_0, q_1, d_out, sums, q_full, d_out_full, q_empty, k_0, k_1, v, p, d_s, d_s_full, d_s_empty,
    d_k_0, d_k_1, d_v, PART: gl.constexpr, MASKED: gl.constexpr,
):
    """Add what one block of queries gives to dK and dV, and what the keys give to its dQ."""
    WARPS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, SIDE, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, d_v.type.layout, 2)
    dtype: gl.constexpr = q_0.dtype
    part = _opaque(first_query * 0 + PART)
    left = _opaque(first_query * 0)
    q_0 = q_0.index(slot)
    q_1 = q_1.index(slot)
    d_out = d_out.index(slot)
    sums = sums.index(slot)
    mbarrier.wait(q_full.index(slot), phase)
    if MASKED:
        mbarrier.wait(d_out_full.index(slot), phase)
        # what lies past the sequence may be NaN, and 0 * NaN is NaN; each consumer clears with the same numbers
        valid = q_len - first_query
        if valid < SIDE:
            clear_rows(q_0, valid)
            clear_rows(q_1, valid)
            clear_rows(d_out, valid)
    scores = sums.slice(0, 1, 0).load(layout).broadcast_to([SIDE, SIDE])
    scores = warpgroup_mma(k_0.index(part), q_0.permute([1, 0]), scores, is_async=True)
    scores = warpgroup_mma(k_1.index(part), q_1.permute([1, 0]), scores, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    weights = gl.exp2(scores * scale_log2)
    seen = weights
    if MASKED:
        keys = gl.arange(0, SIDE, layout=gl.SliceLayout(1, layout))
        queries = gl.arange(0, SIDE, layout=gl.SliceLayout(0, layout))
        seen = (keys < k_left)[:, None] & (keys[:, None] <= (queries + reach)[None, :])
        weights = gl.where(seen, weights, 0.0)
    # by way of shared memory: 16 registers less than to keep them
    p.index(part).store(weights.to(dtype))
    fence_async_shared()
    d_weights = sums.slice(1, 1, 0).load(layout).broadcast_to([SIDE, SIDE])
    if not MASKED:
        mbarrier.wait(d_out_full.index(slot), phase)
    d_weights = warpgroup_mma(v.index(part), d_out.permute([1, 0]), d_weights, is_async=True)
    d_v = warpgroup_mma(p.index(part), d_out, d_v, is_async=True)
    d_weights = warpgroup_mma_wait(1, deps=[d_weights])
    d_scores = p.index(part).load(layout).to(gl.float32) * d_weights
    if MASKED:
        # what is not seen may be infinite or NaN
        d_scores = gl.where(seen, d_scores, 0.0)
    d_scores = d_scores.to(dtype)
    mbarrier.wait(d_s_empty.index(0), d_s_phase ^ 1)
    d_s.index(part).store(d_scores)
    fence_async_shared()
    mbarrier.arrive(d_s_full.index(0), count=1)
    d_scores = gl.convert_layout(d_scores, operand)
    d_k_0 = warpgroup_mma(d_scores, q_0, d_k_0, is_async=True)
    d_k_1 = warpgroup_mma(d_scores, q_1, d_k_1, is_async=True)
    mbarrier.wait(d_s_full.index(0), d_s_phase)
    # the first consumer has the first 64 columns of dQ, the second one the next, and they take turns with the last
    _add_piece(
        d_q_ptr + PART * SIDE * SIDE, d_s, k_0.index(left).slice(PART * SIDE, SIDE, 1),
        k_0.index(left + 1).slice(PART * SIDE, SIDE, 1), layout,
    )
    if turn == PART:
        _add_piece(d_q_ptr + 2 * SIDE * SIDE, d_s, k_1.index(left), k_1.index(left + 1), layout)
    d_v, d_k_0, d_k_1, d_scores = warpgroup_mma_wait(0, deps=[d_v, d_k_0, d_k_1, d_scores])
    mbarrier.arrive(d_s_empty.index(0), count=1)
    mbarrier.arrive(q_empty.index(slot), count=1)
    return d_k_0, d_k_1, d_v


@gluon.jit
def _store_rows(pointer, place, values, first_row, rows, rows_end, stride_t):
    """Store `[64, columns]` by way of shared memory, rows that do not exist as zeros, none past `rows_end`."""
    COLUMNS: gl.constexpr = values.shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [WARPS, 1], [1, 0])
    row = first_row + gl.arange(0, SIDE, layout=gl.SliceLayout(1, values.type.layout))
    values = gl.where((row < rows)[:, None], values, 0.0)
    place.store(values.to(place.dtype))
    row = first_row + gl.arange(0, SIDE, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    pointers = pointer + (row.to(gl.int64) * stride_t)[:, None] + columns[None, :]
    gl.store(pointers, place.load(layout), mask=(row < rows_end)[:, None])


@gluon.jit
def _consumer(
    d_q_ptr, q_blocks, d_k_ptr, d_v_ptr, d_k_stride_t, d_v_stride_t, scale_log2, softmax_scale, first_head,
    first_key, q_len, k_len, rows_end, begin, before, after, rest,
    q_0, q_1, d_out, sums, q_full, d_out_full, q_empty, k_0, k_1, v, k_full, p, d_s, d_s_full, d_s_empty,
    PART: gl.constexpr, GROUP: gl.constexpr, CAUSAL: gl.constexpr,
):
    """dK and dV of 64 keys over all blocks of queries, and half of the columns of their dQ."""
    SLOTS: gl.constexpr = q_0.shape[0]
    WIDTH_0: gl.constexpr = q_0.shape[2]
    WIDTH_1: gl.constexpr = q_1.shape[2]
    V_DIM: gl.constexpr = d_out.shape[2]
    WARPS: gl.constexpr = gl.num_warps()
    layout_0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH_0, 16])
    layout_1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH_1, 16])
    layout_v: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, V_DIM, 16])
    d_k_0 = gl.zeros([SIDE, WIDTH_0], gl.float32, layout_0)
    d_k_1 = gl.zeros([SIDE, WIDTH_1], gl.float32, layout_1)
    d_v = gl.zeros([SIDE, V_DIM], gl.float32, layout_v)
    k_left = k_len - first_key - PART * SIDE
    mbarrier.wait(k_full.index(0), 0)
    if k_len - first_key < 2 * SIDE:
        # each consumer clears all keys, with the same numbers: dQ reads those of both
        for part in gl.static_range(2):
            clear_rows(k_0.index(part), k_len - first_key - part * SIDE)
            clear_rows(k_1.index(part), k_len - first_key - part * SIDE)
    slot, phase, d_s_phase = 0, 0, 0
    for member in range(GROUP):
        sum_ptr = d_q_ptr + (first_head + member).to(gl.int64) * q_blocks * (3 * SIDE * SIDE)
        for step in range(before + after):
            block = _block(step, begin, before, after, rest)
            # key i of the consumer is seen by query j of the block where i <= j + reach
            reach = block * SIDE + (k_len - q_len) - first_key - PART * SIDE
            if not CAUSAL:
                reach = reach * 0 + SIDE
            d_k_0, d_k_1, d_v = _step(
                sum_ptr + block.to(gl.int64) * (3 * SIDE * SIDE), block * SIDE, q_len, reach, k_left,
                scale_log2, d_s_phase, slot, phase, d_s_phase,
                q_0, q_1, d_out, sums, q_full, d_out_full, q_empty, k_0, k_1, v, p, d_s, d_s_full, d_s_empty,
                d_k_0, d_k_1, d_v, PART, True,
            )
            slot, phase = _advance(slot, phase, SLOTS)
            d_s_phase = d_s_phase ^ 1
        for step in range(rest):
            block = begin + before + step
            d_k_0, d_k_1, d_v = _step(
                sum_ptr + block.to(gl.int64) * (3 * SIDE * SIDE), block * SIDE, q_len, 0, k_left,
                scale_log2, d_s_phase, slot, phase, d_s_phase,
                q_0, q_1, d_out, sums, q_full, d_out_full, q_empty, k_0, k_1, v, p, d_s, d_s_full, d_s_empty,
                d_k_0, d_k_1, d_v, PART, False,
            )
            slot, phase = _advance(slot, phase, SLOTS)
            d_s_phase = d_s_phase ^ 1
    # by way of the consumer's own values, which nobody reads any more: rows are written whole
    place = v.index(PART)
    key = first_key + PART * SIDE
    _store_rows(d_v_ptr, place, d_v, key, k_len, rows_end, d_v_stride_t)
    _store_rows(d_k_ptr, place, d_k_0 * softmax_scale, key, k_len, rows_end, d_k_stride_t)
    _store_rows(
        d_k_ptr + WIDTH_0, place.slice(0, WIDTH_1, 1), d_k_1 * softmax_scale, key, k_len, rows_end, d_k_stride_t
    )


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def backward_hopper_kernel(
    q_desc_0, q_desc_1, k_desc_0, k_desc_1, v_desc, d_out_desc, sums_desc, d_q_ptr, d_k_ptr, d_v_ptr,
    cu_q_ptr, cu_k_ptr, scale_log2, softmax_scale, num_seqs, tokens_q, tokens_k, q_blocks,
    q_batch_rows, k_batch_rows, v_batch_rows, d_out_batch_rows, q_stride_n, k_stride_n, v_stride_n, d_out_stride_n,
    d_k_stride_b, d_k_stride_t, d_k_stride_n, d_v_stride_b, d_v_stride_t, d_v_stride_n,
    GROUP: gl.constexpr, SLOTS: gl.constexpr, CAUSAL: gl.constexpr, PACKED: gl.constexpr,
):
    """dK and dV of one block of keys of one key head, and what these keys give to the sum of dQ.

    Grid: (blocks of keys of all sequences, key heads); early blocks, which the most queries see, come first.
    Descriptors of matrices as `forward_hopper_kernel` has them; sums_desc and d_q_ptr: see `hopper_sums.py`.
    """
    KEYS: gl.constexpr = 2 * k_desc_0.block_shape[0]
    dtype: gl.constexpr = k_desc_0.dtype
    WIDTH_0: gl.constexpr = k_desc_0.block_shape[1]
    WIDTH_1: gl.constexpr = k_desc_1.block_shape[1]
    V_DIM: gl.constexpr = v_desc.block_shape[1]
    k_0 = gl.allocate_shared_memory(dtype, [2, SIDE, WIDTH_0], k_desc_0.layout)
    k_1 = gl.allocate_shared_memory(dtype, [2, SIDE, WIDTH_1], k_desc_1.layout)
    v = gl.allocate_shared_memory(dtype, [2, SIDE, V_DIM], v_desc.layout)
    q_0 = gl.allocate_shared_memory(dtype, [SLOTS, SIDE, WIDTH_0], q_desc_0.layout)
    q_1 = gl.allocate_shared_memory(dtype, [SLOTS, SIDE, WIDTH_1], q_desc_1.layout)
    d_out = gl.allocate_shared_memory(dtype, [SLOTS, SIDE, V_DIM], d_out_desc.layout)
    sums = gl.allocate_shared_memory(gl.float32, [SLOTS, 2, SIDE], sums_desc.layout)
    p = gl.allocate_shared_memory(dtype, [2, SIDE, SIDE], k_desc_1.layout)
    d_s = gl.allocate_shared_memory(dtype, [2, SIDE, SIDE], k_desc_1.layout)
    k_full = _barriers(1, 1)
    q_full = _barriers(SLOTS, 1)
    d_out_full = _barriers(SLOTS, 1)
    q_empty = _barriers(SLOTS, 2)
    d_s_full = _barriers(1, 2)
    d_s_empty = _barriers(1, 2)

    seq, block, k_start, k_len = _locate(gl.program_id(0), cu_k_ptr, num_seqs, tokens_k, KEYS, PACKED)
    q_start = k_start
    q_len = tokens_q
    batch = seq
    rows_end = k_len
    sums_row = seq * ((tokens_q + SIDE - 1) // SIDE)
    if PACKED:
        q_start = gl.load(cu_q_ptr + seq).to(gl.int32)
        q_len = gl.load(cu_q_ptr + seq + 1).to(gl.int32) - q_start
        batch = seq - seq
        sums_row = q_start // SIDE + seq
        # the last sequence writes also the rows that belong to nobody, as zeros
        if seq == num_seqs - 1:
            rows_end = tokens_k - k_start
    kv_head = gl.program_id(1)
    first_key = block * KEYS
    diagonal = k_len - q_len
    # blocks of queries from `begin` on see some of the keys, those from `whole` on see all, but for the last one
    # where the sequence does not fill it
    begin = q_len - q_len
    whole = q_len - q_len
    if CAUSAL:
        begin = gl.maximum(first_key - diagonal, 0) // SIDE
        whole = (gl.maximum(first_key + KEYS - 1 - diagonal, 0) + SIDE - 1) // SIDE
    blocks = (gl.where(first_key < k_len, q_len, 0) + SIDE - 1) // SIDE
    if k_len - first_key < KEYS:
        whole = blocks
    full = gl.where(first_key < k_len, q_len, 0) // SIDE
    begin = gl.minimum(begin, blocks)
    before = gl.maximum(gl.minimum(whole, full) - begin, 0)
    rest = gl.maximum(full - begin - before, 0)
    after = blocks - begin - before - rest
    d_q_ptr += sums_row.to(gl.int64) * (3 * SIDE * SIDE)
    d_k_ptr += batch.to(gl.int64) * d_k_stride_b + kv_head.to(gl.int64) * d_k_stride_n
    d_k_ptr += k_start.to(gl.int64) * d_k_stride_t
    d_v_ptr += batch.to(gl.int64) * d_v_stride_b + kv_head.to(gl.int64) * d_v_stride_n
    d_v_ptr += k_start.to(gl.int64) * d_v_stride_t
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    d_q_ptr, q_blocks, d_k_ptr, d_v_ptr, d_k_stride_t, d_v_stride_t, scale_log2, softmax_scale,
                    kv_head * GROUP, first_key, q_len, k_len, rows_end, begin, before, after, rest,
                    q_0, q_1, d_out, sums, q_full, d_out_full, q_empty, k_0, k_1, v, k_full,
                    p, d_s, d_s_full, d_s_empty, 0, GROUP, CAUSAL,
                ),
            ),
            (
                _consumer,
                (
                    d_q_ptr, q_blocks, d_k_ptr, d_v_ptr, d_k_stride_t, d_v_stride_t, scale_log2, softmax_scale,
                    kv_head * GROUP, first_key, q_len, k_len, rows_end, begin, before, after, rest,
                    q_0, q_1, d_out, sums, q_full, d_out_full, q_empty, k_0, k_1, v, k_full,
                    p, d_s, d_s_full, d_s_empty, 1, GROUP, CAUSAL,
                ),
            ),
            (
                _producer,
                (
                    q_desc_0, q_desc_1, k_desc_0, k_desc_1, v_desc, d_out_desc, sums_desc,
                    batch * q_batch_rows + q_start, q_stride_n, batch * d_out_batch_rows + q_start, d_out_stride_n,
                    sums_row, q_blocks, kv_head * GROUP, batch * k_batch_rows + k_start + first_key,
                    kv_head * k_stride_n, batch * v_batch_rows + k_start + first_key, kv_head * v_stride_n,
                    begin, before, after, rest,
                    q_0, q_1, d_out, sums, q_full, d_out_full, q_empty, k_0, k_1, v, k_full, GROUP,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )
