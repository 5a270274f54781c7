"""Forward pass for Hopper in Gluon: a producer warp copies, warpgroups attend; rows of 192 and of 128.

What plain Triton cannot say is who waits for whom: its loop computes the softmax of a tile while the tensor
cores idle. Here two consumers have half of the queries each and go their own way, so that one's softmax falls
into the other's products; the scores of the next tile and the values of the last one are started together
(FlashAttention-3, arXiv 2407.08608, sections 3.1 and 3.2). One warp does nothing but keep the copy engine busy: a
place in a ring is refilled as soon as the last product that reads it is done.

Results are those of `kernel.forward_kernel`, and the backward kernels take them as they are.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from ic_model.ops.hopper_softmax import NEG_INF, clear_rows, weigh

LN_2 = gl.constexpr(0.6931471805599453)
# what changes from batch to batch: otherwise each would compile anew for a number that 16 divides, and for 1
UNSPECIALIZED = (
    "num_seqs", "tokens_q", "tokens_k", "q_batch_rows", "k_batch_rows", "v_batch_rows",
    "lse_stride_b", "lse_stride_n",
)
# renamed between Triton 3.6 and 3.9
_copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _locate(flat_block, cu_ptr, num_seqs, tokens, BLOCK: gl.constexpr, PACKED: gl.constexpr):
    """As `blocks.locate`: sequence, block within it, first token and tokens of the sequence."""
    if PACKED:
        # a tensor of the number 0, as below
        seq = num_seqs - num_seqs
        end = num_seqs
        while end - seq > 1:
            middle = (seq + end) // 2
            if gl.load(cu_ptr + middle) // BLOCK + middle <= flat_block:
                seq = middle
            else:
                end = middle
        start = gl.load(cu_ptr + seq).to(gl.int32)
        length = gl.load(cu_ptr + seq + 1).to(gl.int32) - start
        block = flat_block - (start // BLOCK + seq)
    else:
        blocks = (tokens + BLOCK - 1) // BLOCK
        seq = flat_block // blocks
        block = flat_block % blocks
        start = tokens - tokens
        length = tokens
    return seq, block, start, length


@gluon.jit
def _advance(slot, phase, SLOTS: gl.constexpr):
    """The next place in a ring, and the parity that its barriers have then."""
    wraps = (slot + 1 == SLOTS).to(gl.int32)
    return (slot + 1) * (1 - wraps), phase ^ wraps


@gluon.jit
def _producer(
    q_desc_0, q_desc_1, k_desc_0, k_desc_1, v_desc, q_row, q_column, k_row, k_column, v_row, v_column, tiles,
    q_0, q_1, q_full, k_0, k_1, k_full, k_empty, v, v_full, v_empty,
):
    """Ask for the queries, then for keys and values in turn, each as soon as there is room for it."""
    SLOTS: gl.constexpr = k_0.shape[0]
    KEYS: gl.constexpr = k_0.shape[1]
    PIECE: gl.constexpr = k_0.shape[2]
    PARTS: gl.constexpr = q_0.shape[0]
    for part in gl.static_range(PARTS):
        barrier = q_full.index(part)
        row = q_row + part * q_0.shape[1]
        mbarrier.expect(barrier, q_desc_0.block_type.nbytes + q_desc_1.block_type.nbytes)
        _copy_tile(q_desc_0, [row, q_column], barrier, q_0.index(part))
        _copy_tile(q_desc_1, [row, q_column + PIECE], barrier, q_1.index(part))
    slot, phase = 0, 0
    for tile in range(tiles):
        key = tile * KEYS
        barrier = k_full.index(slot)
        mbarrier.wait(k_empty.index(slot), phase ^ 1)
        mbarrier.expect(barrier, k_desc_0.block_type.nbytes + k_desc_1.block_type.nbytes)
        _copy_tile(k_desc_0, [k_row + key, k_column], barrier, k_0.index(slot))
        _copy_tile(k_desc_1, [k_row + key, k_column + PIECE], barrier, k_1.index(slot))
        barrier = v_full.index(slot)
        mbarrier.wait(v_empty.index(slot), phase ^ 1)
        mbarrier.expect(barrier, v_desc.block_type.nbytes)
        _copy_tile(v_desc, [v_row + key, v_column], barrier, v.index(slot))
        slot, phase = _advance(slot, phase, SLOTS)


@gluon.jit
def _score(q_0, q_1, k_0, k_1, layout: gl.constexpr):
    """Start the scores of one tile, `[queries, keys]`."""
    QUERIES: gl.constexpr = q_0.shape[0]
    KEYS: gl.constexpr = k_0.shape[0]
    scores = gl.zeros([QUERIES, KEYS], gl.float32, layout)
    scores = warpgroup_mma(q_0, k_0.permute([1, 0]), scores, use_acc=False, is_async=True)
    return warpgroup_mma(q_1, k_1.permute([1, 0]), scores, is_async=True)


@gluon.jit
def _step(
    q_0, q_1, k_0, k_1, k_full, k_empty, v, v_full, v_empty, slot, phase, last_slot, last_phase,
    weights, largest, total, out, scale_log2, last_seen, turns, turn,
    PART: gl.constexpr, MASKED: gl.constexpr, TURNS: gl.constexpr,
):
    """Scores and softmax of one tile while the values of the one before are multiplied.

    With TURNS the consumers start their products in turn, so that one's softmax falls into the other's products.
    """
    KEYS: gl.constexpr = k_0.shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16])
    dtype: gl.constexpr = weights.dtype
    weights_layout: gl.constexpr = weights.type.layout
    mbarrier.wait(k_full.index(slot), phase)
    if TURNS:
        mbarrier.wait(turns.index(PART), turn)
    scores = _score(q_0, q_1, k_0.index(slot), k_1.index(slot), score_layout)
    mbarrier.wait(v_full.index(last_slot), last_phase)
    out = warpgroup_mma(weights, v.index(last_slot), out, is_async=True)
    if TURNS:
        mbarrier.arrive(turns.index(1 - PART), count=1)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(slot), count=1)
    new_weights, largest, total, decay = weigh(scores, largest, total, scale_log2, last_seen, dtype, MASKED)
    new_weights = gl.convert_layout(new_weights, weights_layout)
    # the product reads the old weights from registers until it is done; naming the new ones asks the compiler
    # not to put the softmax off until after the wait
    out, weights, new_weights = warpgroup_mma_wait(0, deps=[out, weights, new_weights])
    mbarrier.arrive(v_empty.index(last_slot), count=1)
    out = out * gl.convert_layout(decay, gl.SliceLayout(1, out.type.layout))[:, None]
    return new_weights, largest, total, out


@gluon.jit
def _consumer(
    out_ptr, lse_ptr, scale_log2, first_query, q_len, rows_end, k_len, tiles, whole_tiles, out_stride_t,
    q_0_parts, q_1_parts, q_full, k_0, k_1, k_full, k_empty, v, v_full, v_empty, turns,
    PART: gl.constexpr, CAUSAL: gl.constexpr, TURNS: gl.constexpr,
):
    """Attend with one part of the queries to all tiles, and write its rows. There is at least one tile."""
    SLOTS: gl.constexpr = k_0.shape[0]
    KEYS: gl.constexpr = k_0.shape[1]
    QUERIES: gl.constexpr = q_0_parts.shape[1]
    V_DIM: gl.constexpr = v.shape[2]
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = k_0.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, V_DIM, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    first_query = first_query + PART * QUERIES
    q_0 = q_0_parts.index(PART)
    q_1 = q_1_parts.index(PART)
    queries = first_query + gl.arange(0, QUERIES, layout=gl.SliceLayout(1, score_layout))
    last_seen = gl.full([QUERIES], 0, gl.int32, gl.SliceLayout(1, score_layout)) + (k_len - 1)
    if CAUSAL:
        last_seen = gl.minimum(last_seen, queries + (k_len - q_len))

    mbarrier.wait(q_full.index(PART), 0)
    mbarrier.wait(k_full.index(0), 0)
    scores = _score(q_0, q_1, k_0.index(0), k_1.index(0), score_layout)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(0), count=1)
    largest = gl.full([QUERIES], NEG_INF, gl.float32, gl.SliceLayout(1, score_layout))
    total = gl.zeros([QUERIES], gl.float32, gl.SliceLayout(1, score_layout))
    weights, largest, total, _ = weigh(scores, largest, total, scale_log2, last_seen, dtype, True)
    weights = gl.convert_layout(weights, weights_layout)
    out = gl.zeros([QUERIES, V_DIM], gl.float32, out_layout)
    last_slot, last_phase = 0, 0
    slot, phase = _advance(last_slot, last_phase, SLOTS)
    turn = 0
    if TURNS and PART == 1:
        mbarrier.arrive(turns.index(0), count=1)
    # tiles that every query sees whole come first: a mask in their loop would cost time in each
    for _ in range(1, whole_tiles):
        weights, largest, total, out = _step(
            q_0, q_1, k_0, k_1, k_full, k_empty, v, v_full, v_empty, slot, phase, last_slot, last_phase,
            weights, largest, total, out, scale_log2, last_seen, turns, turn, PART, False, TURNS,
        )
        turn = turn ^ 1
        last_slot, last_phase = slot, phase
        slot, phase = _advance(slot, phase, SLOTS)
    for tile in range(gl.maximum(whole_tiles, 1), tiles):
        weights, largest, total, out = _step(
            q_0, q_1, k_0, k_1, k_full, k_empty, v, v_full, v_empty, slot, phase, last_slot, last_phase,
            weights, largest, total, out, scale_log2, last_seen - tile * KEYS, turns, turn, PART, True, TURNS,
        )
        turn = turn ^ 1
        last_slot, last_phase = slot, phase
        slot, phase = _advance(slot, phase, SLOTS)
    mbarrier.wait(v_full.index(last_slot), last_phase)
    # no tile but the last one reaches past the sequence; each consumer clears for itself, with the same numbers
    valid = k_len - (tiles - 1) * KEYS
    if valid < KEYS:
        clear_rows(v.index(last_slot), valid)
    out = warpgroup_mma(weights, v.index(last_slot), out, is_async=True)
    out, weights = warpgroup_mma_wait(0, deps=[out, weights])

    seen = (queries < q_len) & (total > 0)
    lse = gl.where(seen, (largest + gl.log2(gl.where(seen, total, 1.0))) * LN_2, NEG_INF)
    gl.store(lse_ptr + queries, lse, mask=queries < rows_end)
    factor = gl.where(seen, 1.0 / gl.where(seen, total, 1.0), 0.0)
    factor = gl.convert_layout(factor, gl.SliceLayout(1, out_layout))[:, None]
    # not only times 0: a query past the end has read nothing, but what saw it may be infinite
    out = gl.where(factor > 0, out * factor, 0.0)
    # by way of the queries' place, which nobody reads any more: rows are written whole
    q_0.store(out.to(dtype))
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    rows = first_query + gl.arange(0, QUERIES, layout=gl.SliceLayout(1, store_layout))
    columns = gl.arange(0, V_DIM, layout=gl.SliceLayout(0, store_layout))
    pointers = out_ptr + (rows.to(gl.int64) * out_stride_t)[:, None] + columns[None, :]
    gl.store(pointers, q_0.load(store_layout), mask=(rows < rows_end)[:, None])


@gluon.jit
def _barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    """As many barriers, each for so many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def forward_hopper_kernel(
    q_desc_0, q_desc_1, k_desc_0, k_desc_1, v_desc, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr,
    scale_log2, num_seqs, tokens_q, tokens_k, q_batch_rows, k_batch_rows, v_batch_rows,
    q_stride_n, k_stride_n, v_stride_n, out_stride_b, out_stride_t, out_stride_n, lse_stride_b, lse_stride_n,
    GROUP: gl.constexpr, CONSUMERS: gl.constexpr, SLOTS: gl.constexpr,
    CAUSAL: gl.constexpr, PACKED: gl.constexpr, TURNS: gl.constexpr,
):
    """Out and log-sum-exp of one block of queries of one head; grid as `kernel.forward_kernel`.

    Descriptors: matrices of all tokens of all batch entries, whose rows hold all heads. A batch entry begins at a
    multiple of so many rows, a head at a multiple of the head's stride in columns.
    """
    QUERIES: gl.constexpr = CONSUMERS * q_desc_0.block_shape[0]
    KEYS: gl.constexpr = k_desc_0.block_shape[0]
    dtype: gl.constexpr = k_desc_0.dtype
    PART: gl.constexpr = q_desc_0.block_shape[0]
    WIDTH_0: gl.constexpr = k_desc_0.block_shape[1]
    WIDTH_1: gl.constexpr = k_desc_1.block_shape[1]
    V_DIM: gl.constexpr = v_desc.block_shape[1]
    q_0 = gl.allocate_shared_memory(dtype, [CONSUMERS, PART, WIDTH_0], q_desc_0.layout)
    q_1 = gl.allocate_shared_memory(dtype, [CONSUMERS, PART, WIDTH_1], q_desc_1.layout)
    k_0 = gl.allocate_shared_memory(dtype, [SLOTS, KEYS, WIDTH_0], k_desc_0.layout)
    k_1 = gl.allocate_shared_memory(dtype, [SLOTS, KEYS, WIDTH_1], k_desc_1.layout)
    v = gl.allocate_shared_memory(dtype, [SLOTS, KEYS, V_DIM], v_desc.layout)
    q_full = _barriers(CONSUMERS, 1)
    k_full = _barriers(SLOTS, 1)
    v_full = _barriers(SLOTS, 1)
    k_empty = _barriers(SLOTS, CONSUMERS)
    v_empty = _barriers(SLOTS, CONSUMERS)
    # made only where they are used: what nothing waits for ends with its initialisation, and the compiler puts
    # what it hands to the groups into the same memory, where a late initialisation overwrites it
    turns = q_full
    if TURNS:
        turns = _barriers(2, 1)

    seq, block, q_start, q_len = _locate(gl.program_id(0), cu_q_ptr, num_seqs, tokens_q, QUERIES, PACKED)
    k_start = q_start
    k_len = tokens_k
    batch = seq
    rows_end = q_len
    if PACKED:
        k_start = gl.load(cu_k_ptr + seq).to(gl.int32)
        k_len = gl.load(cu_k_ptr + seq + 1).to(gl.int32) - k_start
        batch = seq - seq
        # the last sequence writes also the rows that belong to nobody, as zeros
        if seq == num_seqs - 1:
            rows_end = tokens_q - q_start
    head = gl.program_id(1)
    kv_head = head // GROUP
    blocks = (q_len + QUERIES - 1) // QUERIES
    if block < blocks:
        # late blocks see more keys: first, so that no long one is left for the end
        block = blocks - 1 - block
    first_query = block * QUERIES
    diagonal = k_len - q_len
    keys_end = k_len
    whole = k_len
    if CAUSAL:
        keys_end = gl.minimum(k_len, gl.minimum(first_query + QUERIES, q_len) + diagonal)
        whole = gl.minimum(k_len, first_query + 1 + diagonal)
    keys_end = gl.where(first_query < q_len, gl.maximum(keys_end, 0), 0)
    whole_tiles = gl.minimum(keys_end, gl.maximum(whole, 0)) // KEYS
    # where nothing is seen, one tile that is masked away leaves less to tell apart
    tiles = gl.maximum((keys_end + KEYS - 1) // KEYS, 1)
    out_ptr += batch.to(gl.int64) * out_stride_b + head.to(gl.int64) * out_stride_n
    out_ptr += q_start.to(gl.int64) * out_stride_t
    lse_ptr += batch.to(gl.int64) * lse_stride_b + head.to(gl.int64) * lse_stride_n + q_start
    q_row = batch * q_batch_rows + q_start + first_query
    k_row = batch * k_batch_rows + k_start
    v_row = batch * v_batch_rows + k_start
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (
                        out_ptr, lse_ptr, scale_log2, first_query, q_len, rows_end, k_len, tiles, whole_tiles,
                        out_stride_t, q_0, q_1, q_full, k_0, k_1, k_full, k_empty, v, v_full, v_empty,
                        turns, 0, CAUSAL, TURNS,
                    ),
                ),
                (
                    _consumer,
                    (
                        out_ptr, lse_ptr, scale_log2, first_query, q_len, rows_end, k_len, tiles, whole_tiles,
                        out_stride_t, q_0, q_1, q_full, k_0, k_1, k_full, k_empty, v, v_full, v_empty,
                        turns, 1, CAUSAL, TURNS,
                    ),
                ),
                (
                    _producer,
                    (
                        q_desc_0, q_desc_1, k_desc_0, k_desc_1, v_desc, q_row, head * q_stride_n,
                        k_row, kv_head * k_stride_n, v_row, kv_head * v_stride_n, tiles,
                        q_0, q_1, q_full, k_0, k_1, k_full, k_empty, v, v_full, v_empty,
                    ),
                ),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (
                        out_ptr, lse_ptr, scale_log2, first_query, q_len, rows_end, k_len, tiles, whole_tiles,
                        out_stride_t, q_0, q_1, q_full, k_0, k_1, k_full, k_empty, v, v_full, v_empty,
                        turns, 0, CAUSAL, TURNS,
                    ),
                ),
                (
                    _producer,
                    (
                        q_desc_0, q_desc_1, k_desc_0, k_desc_1, v_desc, q_row, head * q_stride_n,
                        k_row, kv_head * k_stride_n, v_row, kv_head * v_stride_n, tiles,
                        q_0, q_1, q_full, k_0, k_1, k_full, k_empty, v, v_full, v_empty,
                    ),
                ),
            ],
            [1],
            [24],
        )
