"""Triton kernels of the backward pass, FlashAttention-2's scheme (arXiv 2307.08691, algorithm 2), deterministic.

With P the softmax weights, recomputed from the log-sum-exp, and delta the row sums of dO * O:

    dV = P^T dO        dS = P * (dO V^T - delta)        dK = scale * dS^T Q        dQ = scale * dS K

One kernel owns a block of keys and walks over the queries (dK, dV), the other owns a block of queries and walks
over the keys (dQ). Each recomputes P and dS; the alternative, one kernel, would have many programs add to the
same dQ in whatever order they come.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ic_model.ops.mla_prefill.blocks import (
    LOG2_E,
    UNSPECIALIZED,
    head_pointer,
    load_rows,
    load_tile,
    locate,
    sequence,
    store_tile,
    written_rows,
)


@triton.jit(do_not_specialize=("tokens_q", "lse_stride_b", "lse_stride_n"))
def delta_kernel(
    out_ptr, d_out_ptr, delta_ptr, tokens_q,
    out_stride_b, out_stride_t, out_stride_n, d_out_stride_b, d_out_stride_t, d_out_stride_n,
    lse_stride_b, lse_stride_n,
    V_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
):
    """Row sums of dO * O, float32, laid out as the log-sum-exp. Grid: (blocks of tokens, heads, batch)."""
    first = tl.program_id(0) * BLOCK_QUERIES
    head = tl.program_id(1)
    batch = tl.program_id(2)
    out_base = head_pointer(out_ptr, batch, 0, head, out_stride_b, out_stride_t, out_stride_n)
    d_out_base = head_pointer(d_out_ptr, batch, 0, head, d_out_stride_b, d_out_stride_t, d_out_stride_n)
    out = load_tile(out_base, first, tokens_q, out_stride_t, BLOCK_QUERIES, 0, V_DIM, BLOCK_V, True)
    d_out = load_tile(d_out_base, first, tokens_q, d_out_stride_t, BLOCK_QUERIES, 0, V_DIM, BLOCK_V, True)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    rows = first + tl.arange(0, BLOCK_QUERIES)
    base = delta_ptr + tl.cast(batch, tl.int64) * lse_stride_b + tl.cast(head, tl.int64) * lse_stride_n
    tl.store(base + rows, delta, mask=rows < tokens_q)


@triton.jit
def _load_row_sums(lse_base, delta_base, rows, rows_end):
    """Log-sum-exp in base 2 and delta of some queries; those that saw nothing or do not exist weigh nothing."""
    there = rows < rows_end
    lse = tl.load(lse_base + rows, mask=there, other=float("-inf")) * LOG2_E
    delta = tl.load(delta_base + rows, mask=there, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse), delta


@triton.jit
def _keys_step(
    q_base, d_out_base, q_desc_0, q_desc_1, d_out_desc, batch, q_start, head, lse_base, delta_base,
    q_stride_t, d_out_stride_t, first_query, q_len, keys, diagonal, k_0, k_1, v, d_k_0, d_k_1, d_v, scale_log2,
    QK_DIM: tl.constexpr, BLOCK_QK_0: tl.constexpr, BLOCK_QK_1: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_QUERIES: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):
    """Add what one block of queries gives to dK and dV; scores stand as `[BLOCK_KEYS, BLOCK_QUERIES]`."""
    TWO_PIECES: tl.constexpr = BLOCK_QK_1 > 0
    queries = first_query + tl.arange(0, BLOCK_QUERIES)
    q_0 = load_rows(
        q_base, q_desc_0, batch, q_start, head, first_query, q_len, q_stride_t,
        BLOCK_QUERIES, 0, BLOCK_QK_0, BLOCK_QK_0, MASKED, DESCRIPTORS,
    )
    scores = tl.dot(k_0, tl.trans(q_0), input_precision=PRECISION)
    q_1 = q_0
    if TWO_PIECES:
        q_1 = load_rows(
            q_base, q_desc_1, batch, q_start, head, first_query, q_len, q_stride_t,
            BLOCK_QUERIES, BLOCK_QK_0, QK_DIM - BLOCK_QK_0, BLOCK_QK_1, MASKED, DESCRIPTORS,
        )
        scores = tl.dot(k_1, tl.trans(q_1), acc=scores, input_precision=PRECISION)
    d_out = load_rows(
        d_out_base, d_out_desc, batch, q_start, head, first_query, q_len, d_out_stride_t,
        BLOCK_QUERIES, 0, V_DIM, BLOCK_V, MASKED, DESCRIPTORS,
    )
    lse, delta = _load_row_sums(lse_base, delta_base, queries, q_len)
    weights = tl.exp2(scores * scale_log2 - lse[None, :])
    if MASKED and CAUSAL:
        weights = tl.where(keys[:, None] <= queries[None, :] + diagonal, weights, 0.0)
    d_v = tl.dot(weights.to(d_out.dtype), d_out, acc=d_v, input_precision=PRECISION)
    d_weights = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
    d_scores = (weights * (d_weights - delta[None, :])).to(q_0.dtype)
    d_k_0 = tl.dot(d_scores, q_0, acc=d_k_0, input_precision=PRECISION)
    if TWO_PIECES:
        d_k_1 = tl.dot(d_scores, q_1, acc=d_k_1, input_precision=PRECISION)
    return d_k_0, d_k_1, d_v


@triton.jit(do_not_specialize=UNSPECIALIZED)
def keys_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, q_desc_0, q_desc_1, d_out_desc, lse_ptr, delta_ptr, d_k_ptr, d_v_ptr,
    cu_q_ptr, cu_k_ptr,
    scale_log2, softmax_scale, num_seqs, tokens_q, tokens_k,
    q_stride_b, q_stride_t, q_stride_n, k_stride_b, k_stride_t, k_stride_n, v_stride_b, v_stride_t, v_stride_n,
    d_out_stride_b, d_out_stride_t, d_out_stride_n, d_k_stride_b, d_k_stride_t, d_k_stride_n,
    d_v_stride_b, d_v_stride_t, d_v_stride_n, lse_stride_b, lse_stride_n,
    GROUP: tl.constexpr, QK_DIM: tl.constexpr, BLOCK_QK_0: tl.constexpr, BLOCK_QK_1: tl.constexpr,
    V_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):
    """Gradients of K and V for one block of keys of one key head, over all query heads of its group in order.

    Grid: (blocks of keys of all sequences, key heads). Early blocks, which the most queries see, come first.
    """
    seq, block, k_start, k_len = locate(tl.program_id(0), cu_k_ptr, num_seqs, tokens_k, BLOCK_KEYS, PACKED)
    q_start, q_len = sequence(seq, cu_q_ptr, tokens_q, PACKED)
    batch = seq
    if PACKED:
        batch = 0
    kv_head = tl.program_id(1)
    first_key = block * BLOCK_KEYS
    keys = first_key + tl.arange(0, BLOCK_KEYS)
    diagonal = k_len - q_len
    # queries from `begin` on see some key of the block, those from `whole` on see all, as many as fill a block
    begin = 0
    whole = 0
    if CAUSAL:
        begin = tl.maximum(first_key - diagonal, 0) // BLOCK_QUERIES * BLOCK_QUERIES
        whole = tl.cdiv(tl.maximum(first_key + BLOCK_KEYS - 1 - diagonal, 0), BLOCK_QUERIES) * BLOCK_QUERIES
    queries_end = tl.where(first_key < k_len, q_len, 0)
    whole_end = queries_end // BLOCK_QUERIES * BLOCK_QUERIES
    whole = tl.minimum(whole, whole_end)
    # masked: the blocks on the diagonal, and the last one where it is not full
    before = tl.cdiv(tl.maximum(whole - begin, 0), BLOCK_QUERIES)
    resume = tl.maximum(whole_end, begin)
    after = tl.cdiv(tl.maximum(queries_end - resume, 0), BLOCK_QUERIES)

    TWO_PIECES: tl.constexpr = BLOCK_QK_1 > 0
    WIDTH_1: tl.constexpr = QK_DIM - BLOCK_QK_0
    k_base = head_pointer(k_ptr, batch, k_start, kv_head, k_stride_b, k_stride_t, k_stride_n)
    v_base = head_pointer(v_ptr, batch, k_start, kv_head, v_stride_b, v_stride_t, v_stride_n)
    k_0 = load_tile(k_base, first_key, k_len, k_stride_t, BLOCK_KEYS, 0, BLOCK_QK_0, BLOCK_QK_0, True)
    d_k_0 = tl.zeros([BLOCK_KEYS, BLOCK_QK_0], tl.float32)
    k_1 = k_0
    d_k_1 = d_k_0
    if TWO_PIECES:
        k_1 = load_tile(k_base, first_key, k_len, k_stride_t, BLOCK_KEYS, BLOCK_QK_0, WIDTH_1, BLOCK_QK_1, True)
        d_k_1 = tl.zeros([BLOCK_KEYS, BLOCK_QK_1], tl.float32)
    v = load_tile(v_base, first_key, k_len, v_stride_t, BLOCK_KEYS, 0, V_DIM, BLOCK_V, True)
    d_v = tl.zeros([BLOCK_KEYS, BLOCK_V], tl.float32)

    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_base = head_pointer(q_ptr, batch, q_start, head, q_stride_b, q_stride_t, q_stride_n)
        d_out_base = head_pointer(d_out_ptr, batch, q_start, head, d_out_stride_b, d_out_stride_t, d_out_stride_n)
        row_offset = tl.cast(batch, tl.int64) * lse_stride_b + tl.cast(head, tl.int64) * lse_stride_n + q_start
        lse_base = lse_ptr + row_offset
        delta_base = delta_ptr + row_offset
        for step in tl.range(0, before + after, num_stages=1):
            query = tl.where(step < before, begin + step * BLOCK_QUERIES, resume + (step - before) * BLOCK_QUERIES)
            d_k_0, d_k_1, d_v = _keys_step(
                q_base, d_out_base, q_desc_0, q_desc_1, d_out_desc, batch, q_start, head, lse_base, delta_base,
                q_stride_t, d_out_stride_t, query, q_len, keys, diagonal, k_0, k_1, v, d_k_0,
                d_k_1, d_v, scale_log2,
                QK_DIM, BLOCK_QK_0, BLOCK_QK_1, V_DIM, BLOCK_V, BLOCK_QUERIES, CAUSAL, True,
                DESCRIPTORS, PRECISION,
            )
        for query in tl.range(tl.maximum(whole, begin), whole_end, BLOCK_QUERIES):
            d_k_0, d_k_1, d_v = _keys_step(
                q_base, d_out_base, q_desc_0, q_desc_1, d_out_desc, batch, q_start, head, lse_base, delta_base,
                q_stride_t, d_out_stride_t, query, q_len, keys, diagonal, k_0, k_1, v, d_k_0,
                d_k_1, d_v, scale_log2,
                QK_DIM, BLOCK_QK_0, BLOCK_QK_1, V_DIM, BLOCK_V, BLOCK_QUERIES, CAUSAL, False,
                DESCRIPTORS, PRECISION,
            )

    rows_end = written_rows(seq, num_seqs, k_start, k_len, tokens_k, PACKED)
    exists = (keys < k_len)[:, None]
    d_k_base = head_pointer(d_k_ptr, batch, k_start, kv_head, d_k_stride_b, d_k_stride_t, d_k_stride_n)
    d_v_base = head_pointer(d_v_ptr, batch, k_start, kv_head, d_v_stride_b, d_v_stride_t, d_v_stride_n)
    d_k_0 = tl.where(exists, d_k_0 * softmax_scale, 0.0)
    store_tile(d_k_base, d_k_0, first_key, rows_end, d_k_stride_t, BLOCK_KEYS, 0, BLOCK_QK_0, BLOCK_QK_0)
    if TWO_PIECES:
        d_k_1 = tl.where(exists, d_k_1 * softmax_scale, 0.0)
        store_tile(d_k_base, d_k_1, first_key, rows_end, d_k_stride_t, BLOCK_KEYS, BLOCK_QK_0, WIDTH_1, BLOCK_QK_1)
    d_v = tl.where(exists, d_v, 0.0)
    store_tile(d_v_base, d_v, first_key, rows_end, d_v_stride_t, BLOCK_KEYS, 0, V_DIM, BLOCK_V)


@triton.jit
def _queries_step(
    k_base, v_base, k_desc_0, k_desc_1, v_desc, batch, k_start, kv_head, k_stride_t, v_stride_t, first_key, k_len,
    queries, diagonal, q_0, q_1, d_out, lse, delta, d_q_0, d_q_1, scale_log2,
    QK_DIM: tl.constexpr, BLOCK_QK_0: tl.constexpr, BLOCK_QK_1: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_KEYS: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):
    """Add what one block of keys gives to dQ; scores stand as `[BLOCK_QUERIES, BLOCK_KEYS]`."""
    TWO_PIECES: tl.constexpr = BLOCK_QK_1 > 0
    k_0 = load_rows(
        k_base, k_desc_0, batch, k_start, kv_head, first_key, k_len, k_stride_t,
        BLOCK_KEYS, 0, BLOCK_QK_0, BLOCK_QK_0, MASKED, DESCRIPTORS,
    )
    scores = tl.dot(q_0, tl.trans(k_0), input_precision=PRECISION)
    k_1 = k_0
    if TWO_PIECES:
        k_1 = load_rows(
            k_base, k_desc_1, batch, k_start, kv_head, first_key, k_len, k_stride_t,
            BLOCK_KEYS, BLOCK_QK_0, QK_DIM - BLOCK_QK_0, BLOCK_QK_1, MASKED, DESCRIPTORS,
        )
        scores = tl.dot(q_1, tl.trans(k_1), acc=scores, input_precision=PRECISION)
    v = load_rows(
        v_base, v_desc, batch, k_start, kv_head, first_key, k_len, v_stride_t,
        BLOCK_KEYS, 0, V_DIM, BLOCK_V, MASKED, DESCRIPTORS,
    )
    weights = tl.exp2(scores * scale_log2 - lse[:, None])
    if MASKED:
        keys = first_key + tl.arange(0, BLOCK_KEYS)
        visible = (keys < k_len)[None, :]
        if CAUSAL:
            visible = visible & (keys[None, :] <= queries[:, None] + diagonal)
        weights = tl.where(visible, weights, 0.0)
    d_weights = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
    d_scores = (weights * (d_weights - delta[:, None])).to(k_0.dtype)
    d_q_0 = tl.dot(d_scores, k_0, acc=d_q_0, input_precision=PRECISION)
    if TWO_PIECES:
        d_q_1 = tl.dot(d_scores, k_1, acc=d_q_1, input_precision=PRECISION)
    return d_q_0, d_q_1


@triton.jit(do_not_specialize=UNSPECIALIZED)
def queries_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, k_desc_0, k_desc_1, v_desc, lse_ptr, delta_ptr, d_q_ptr, cu_q_ptr, cu_k_ptr,
    scale_log2, softmax_scale, num_seqs, tokens_q, tokens_k,
    q_stride_b, q_stride_t, q_stride_n, k_stride_b, k_stride_t, k_stride_n, v_stride_b, v_stride_t, v_stride_n,
    d_out_stride_b, d_out_stride_t, d_out_stride_n, d_q_stride_b, d_q_stride_t, d_q_stride_n,
    lse_stride_b, lse_stride_n,
    GROUP: tl.constexpr, QK_DIM: tl.constexpr, BLOCK_QK_0: tl.constexpr, BLOCK_QK_1: tl.constexpr,
    V_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):
    """Gradient of Q for one block of queries of one head.

    Grid: (blocks of queries of all sequences, heads), late blocks first.
    """
    seq, block, q_start, q_len = locate(tl.program_id(0), cu_q_ptr, num_seqs, tokens_q, BLOCK_QUERIES, PACKED)
    k_start, k_len = sequence(seq, cu_k_ptr, tokens_k, PACKED)
    batch = seq
    if PACKED:
        batch = 0
    head = tl.program_id(1)
    kv_head = head // GROUP
    blocks = tl.cdiv(q_len, BLOCK_QUERIES)
    if block < blocks:
        block = blocks - 1 - block
    first_query = block * BLOCK_QUERIES
    queries = first_query + tl.arange(0, BLOCK_QUERIES)
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
    q_base = head_pointer(q_ptr, batch, q_start, head, q_stride_b, q_stride_t, q_stride_n)
    k_base = head_pointer(k_ptr, batch, k_start, kv_head, k_stride_b, k_stride_t, k_stride_n)
    v_base = head_pointer(v_ptr, batch, k_start, kv_head, v_stride_b, v_stride_t, v_stride_n)
    d_out_base = head_pointer(d_out_ptr, batch, q_start, head, d_out_stride_b, d_out_stride_t, d_out_stride_n)
    row_offset = tl.cast(batch, tl.int64) * lse_stride_b + tl.cast(head, tl.int64) * lse_stride_n + q_start
    q_0 = load_tile(q_base, first_query, q_len, q_stride_t, BLOCK_QUERIES, 0, BLOCK_QK_0, BLOCK_QK_0, True)
    d_q_0 = tl.zeros([BLOCK_QUERIES, BLOCK_QK_0], tl.float32)
    q_1 = q_0
    d_q_1 = d_q_0
    if TWO_PIECES:
        q_1 = load_tile(
            q_base, first_query, q_len, q_stride_t, BLOCK_QUERIES, BLOCK_QK_0, WIDTH_1, BLOCK_QK_1, True
        )
        d_q_1 = tl.zeros([BLOCK_QUERIES, BLOCK_QK_1], tl.float32)
    d_out = load_tile(d_out_base, first_query, q_len, d_out_stride_t, BLOCK_QUERIES, 0, V_DIM, BLOCK_V, True)
    lse, delta = _load_row_sums(lse_ptr + row_offset, delta_ptr + row_offset, queries, q_len)
    for key in tl.range(0, whole, BLOCK_KEYS):
        d_q_0, d_q_1 = _queries_step(
            k_base, v_base, k_desc_0, k_desc_1, v_desc, batch, k_start, kv_head, k_stride_t,
            v_stride_t, key, k_len,
            queries, diagonal, q_0, q_1, d_out, lse, delta, d_q_0, d_q_1, scale_log2,
            QK_DIM, BLOCK_QK_0, BLOCK_QK_1, V_DIM, BLOCK_V, BLOCK_KEYS, CAUSAL, False, DESCRIPTORS, PRECISION,
        )
    for key in tl.range(whole, keys_end, BLOCK_KEYS, num_stages=1):
        d_q_0, d_q_1 = _queries_step(
            k_base, v_base, k_desc_0, k_desc_1, v_desc, batch, k_start, kv_head, k_stride_t,
            v_stride_t, key, k_len,
            queries, diagonal, q_0, q_1, d_out, lse, delta, d_q_0, d_q_1, scale_log2,
            QK_DIM, BLOCK_QK_0, BLOCK_QK_1, V_DIM, BLOCK_V, BLOCK_KEYS, CAUSAL, True, DESCRIPTORS, PRECISION,
        )

    rows_end = written_rows(seq, num_seqs, q_start, q_len, tokens_q, PACKED)
    d_q_base = head_pointer(d_q_ptr, batch, q_start, head, d_q_stride_b, d_q_stride_t, d_q_stride_n)
    store_tile(
        d_q_base, d_q_0 * softmax_scale, first_query, rows_end, d_q_stride_t, BLOCK_QUERIES, 0,
        BLOCK_QK_0, BLOCK_QK_0
    )
    if TWO_PIECES:
        store_tile(
            d_q_base, d_q_1 * softmax_scale, first_query, rows_end, d_q_stride_t, BLOCK_QUERIES, BLOCK_QK_0,
            WIDTH_1, BLOCK_QK_1,
        )
