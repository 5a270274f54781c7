"""Triton kernel of exact attention over packed or dense sequences: forward.

FlashAttention-2 (arXiv 2307.08691, algorithm 1): a program owns a block of queries of one head and walks over the
keys with a running maximum and sum. Blocks of keys that every query of the block sees come first, without a
mask; those on the diagonal and at the end of the sequence follow, masked. Queries and keys are taken as two
pieces along their dimension, 192 = 128 + 64, since a tile's sides are powers of two and padding to 256 would
cost a third more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ic_model.ops.mla_prefill.blocks import (
    LN_2,
    UNSPECIALIZED,
    head_pointer,
    load_rows,
    load_tile,
    locate,
    sequence,
    store_tile,
    written_rows,
)


@triton.jit
def _attend(
    q_0, q_1, k_0, k_1, v, visible, largest, total, out, scale_log2,
    TWO_PIECES: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):
    """One block of keys of the online softmax.

    Args:
        q_0, q_1: `[BLOCK_QUERIES, piece]`; k_0, k_1: `[BLOCK_KEYS, piece]`; v: `[BLOCK_KEYS, BLOCK_V]`.
        visible: `[BLOCK_QUERIES, BLOCK_KEYS]`, read only where MASKED.
        largest, total: `[BLOCK_QUERIES]` running maximum (times scale_log2) and sum.
        out: `[BLOCK_QUERIES, BLOCK_V]`, not yet divided by the sum.
    """
    scores = tl.dot(q_0, tl.trans(k_0), input_precision=PRECISION)
    if TWO_PIECES:
        scores = tl.dot(q_1, tl.trans(k_1), acc=scores, input_precision=PRECISION)
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1) * scale_log2)
    anchor = new_largest
    if MASKED:
        # a query that has seen nothing yet keeps -inf; subtracting 0 instead avoids inf - inf
        anchor = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    weights = tl.exp2(scores * scale_log2 - anchor[:, None])
    decay = tl.exp2(largest - anchor)
    total = total * decay + tl.sum(weights, 1)
    out = tl.dot(weights.to(v.dtype), v, acc=out * decay[:, None], input_precision=PRECISION)
    return new_largest, total, out


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, k_desc_0, k_desc_1, v_desc, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr,
    scale_log2, num_seqs, tokens_q, tokens_k,
    q_stride_b, q_stride_t, q_stride_n, k_stride_b, k_stride_t, k_stride_n, v_stride_b, v_stride_t, v_stride_n,
    out_stride_b, out_stride_t, out_stride_n, lse_stride_b, lse_stride_n,
    GROUP: tl.constexpr, QK_DIM: tl.constexpr, BLOCK_QK_0: tl.constexpr, BLOCK_QK_1: tl.constexpr,
    V_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, DESCRIPTORS: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Out and log-sum-exp of one block of queries of one head.

    Grid: (blocks of queries of all sequences, heads). tokens_q and tokens_k are those of a batch entry. Strides in
    elements, the last one is 1; lse is float32 `[batch, heads, tokens]`.
    """
    seq, block, q_start, q_len = locate(tl.program_id(0), cu_q_ptr, num_seqs, tokens_q, BLOCK_QUERIES, PACKED)
    k_start, k_len = sequence(seq, cu_k_ptr, tokens_k, PACKED)
    batch = seq
    if PACKED:
        batch = 0
    head = tl.program_id(1)
    out_base = head_pointer(out_ptr, batch, q_start, head, out_stride_b, out_stride_t, out_stride_n)
    lse_base = lse_ptr + tl.cast(batch, tl.int64) * lse_stride_b + tl.cast(head, tl.int64) * lse_stride_n + q_start
    rows_end = written_rows(seq, num_seqs, q_start, q_len, tokens_q, PACKED)
    blocks = tl.cdiv(q_len, BLOCK_QUERIES)
    if block < blocks:
        # late blocks see more keys: first, so that no long one is left for the end
        block = blocks - 1 - block
    first_query = block * BLOCK_QUERIES
    queries = first_query + tl.arange(0, BLOCK_QUERIES)
    # that many keys does query 0 of the sequence see, less one
    diagonal = k_len - q_len
    if CAUSAL:
        keys_end = tl.minimum(k_len, tl.minimum(first_query + BLOCK_QUERIES, q_len) + diagonal)
        whole = tl.minimum(k_len, first_query + 1 + diagonal)
    else:
        keys_end = k_len
        whole = k_len
    keys_end = tl.where(first_query < q_len, tl.maximum(keys_end, 0), 0)
    whole = tl.minimum(keys_end, tl.maximum(whole, 0)) // BLOCK_KEYS * BLOCK_KEYS

    TWO_PIECES: tl.constexpr = BLOCK_QK_1 > 0
    WIDTH_1: tl.constexpr = QK_DIM - BLOCK_QK_0
    kv_head = head // GROUP
    q_base = head_pointer(q_ptr, batch, q_start, head, q_stride_b, q_stride_t, q_stride_n)
    k_base = head_pointer(k_ptr, batch, k_start, kv_head, k_stride_b, k_stride_t, k_stride_n)
    v_base = head_pointer(v_ptr, batch, k_start, kv_head, v_stride_b, v_stride_t, v_stride_n)
    q_0 = load_tile(q_base, first_query, q_len, q_stride_t, BLOCK_QUERIES, 0, BLOCK_QK_0, BLOCK_QK_0, True)
    q_1 = q_0
    if TWO_PIECES:
        q_1 = load_tile(
            q_base, first_query, q_len, q_stride_t, BLOCK_QUERIES, BLOCK_QK_0, WIDTH_1, BLOCK_QK_1, True
        )
    largest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    out = tl.zeros([BLOCK_QUERIES, BLOCK_V], tl.float32)

    for key in tl.range(0, whole, BLOCK_KEYS, warp_specialize=WARP_SPECIALIZE):
        k_0 = load_rows(
            k_base, k_desc_0, batch, k_start, kv_head, key, k_len, k_stride_t,
            BLOCK_KEYS, 0, BLOCK_QK_0, BLOCK_QK_0, False, DESCRIPTORS,
        )
        k_1 = k_0
        if TWO_PIECES:
            k_1 = load_rows(
                k_base, k_desc_1, batch, k_start, kv_head, key, k_len, k_stride_t,
                BLOCK_KEYS, BLOCK_QK_0, WIDTH_1, BLOCK_QK_1, False, DESCRIPTORS,
            )
        v = load_rows(
            v_base, v_desc, batch, k_start, kv_head, key, k_len, v_stride_t,
            BLOCK_KEYS, 0, V_DIM, BLOCK_V, False, DESCRIPTORS,
        )
        largest, total, out = _attend(
            q_0, q_1, k_0, k_1, v, None, largest, total, out, scale_log2, TWO_PIECES, False, PRECISION
        )
    for key in tl.range(whole, keys_end, BLOCK_KEYS, num_stages=1):
        k_0 = load_tile(k_base, key, k_len, k_stride_t, BLOCK_KEYS, 0, BLOCK_QK_0, BLOCK_QK_0, True)
        k_1 = k_0
        if TWO_PIECES:
            k_1 = load_tile(k_base, key, k_len, k_stride_t, BLOCK_KEYS, BLOCK_QK_0, WIDTH_1, BLOCK_QK_1, True)
        v = load_tile(v_base, key, k_len, v_stride_t, BLOCK_KEYS, 0, V_DIM, BLOCK_V, True)
        keys = key + tl.arange(0, BLOCK_KEYS)
        visible = (keys < k_len)[None, :]
        if CAUSAL:
            visible = visible & (keys[None, :] <= queries[:, None] + diagonal)
        largest, total, out = _attend(
            q_0, q_1, k_0, k_1, v, visible, largest, total, out, scale_log2, TWO_PIECES, True, PRECISION
        )

    seen = (queries < q_len) & (total > 0)
    lse = tl.where(seen, (largest + tl.log2(tl.where(seen, total, 1.0))) * LN_2, float("-inf"))
    factor = tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)
    # not only times 0: a query past the end has read nothing, but what saw it may be infinite
    out = tl.where(seen[:, None], out * factor[:, None], 0.0)
    store_tile(out_base, out, first_query, rows_end, out_stride_t, BLOCK_QUERIES, 0, V_DIM, BLOCK_V)
    tl.store(lse_base + queries, lse, mask=queries < rows_end)
