"""Triton kernels of paged MLA decoding: split over the cached tokens, then combined.

The work of a step is one list: the tiles of `BLOCK_TOKENS` tokens of all sequences, one after the other. Each
program takes an equal share of that list whatever the lengths are (stream-K, arXiv 2301.03598), finds its place
in it from `seq_lens` on the device, and so never waits for the host. A sequence that lies in one program's share
is written out at once; what is spread over several goes to scratch memory, and a second kernel combines it by
log-sum-exp (flash decoding).

Letters: B batch, T query tokens, N heads, C kv_lora_rank, R qk_rope_head_dim, G programs along the list. A *row*
is one head of one query token; all rows of a sequence read the same latent rows, each of which is loaded once
and used for the scores and for the values.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tiles_per_program(tiles, longest, programs):
    """A program's share of the list: program g has the tiles from g times this on.

    The least that is enough, or up to a sixteenth more where that cuts the longest sequence, and all others of its
    length, in equal pieces or gives each program whole ones: reading is what takes the time, so that a few idle
    programs cost nothing, but each piece more is written out, read again and combined.

    Args:
        tiles: in the list.
        longest: tiles of the longest sequence.
        programs: along the list.
    """
    # operators only: the kernels in Gluon call it, too
    least = (tiles + programs - 1) // programs
    least = least + (least == 0)
    longest = longest + (longest == 0)
    sequences = (least + longest - 1) // longest
    pieces = longest // least
    pieces = pieces + (pieces == 0)
    even = (longest * sequences + pieces - 1) // pieces
    return least + (even - least) * (even * 16 <= least * 17)


@triton.jit
def _attend(
    latent, k_rope, q_latent, q_rope, visible, largest, total, out, scale_log2,
    MASKED: tl.constexpr, TOKENS_FIRST: tl.constexpr,
):
    """One tile of the online softmax.

    Args:
        latent: `[BLOCK_TOKENS, BLOCK_C]`; k_rope: `[BLOCK_TOKENS, BLOCK_R]`.
        q_latent, q_rope: `[BLOCK_C, BLOCK_ROWS]` and `[BLOCK_R, BLOCK_ROWS]` where tokens come first, else
            `[BLOCK_ROWS, ...]`.
        visible: which scores count, in the scores' shape; read only where MASKED.
        largest, total: `[BLOCK_ROWS]` running maximum (times scale_log2) and sum.
        out: `[BLOCK_C, BLOCK_ROWS]` or `[BLOCK_ROWS, BLOCK_C]`, not yet divided by the sum.
    """
    if TOKENS_FIRST:
        scores = tl.dot(latent, q_latent, input_precision="ieee")
        scores = tl.dot(k_rope, q_rope, acc=scores, input_precision="ieee")
    else:
        scores = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(q_rope, tl.trans(k_rope), acc=scores, input_precision="ieee")
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    axis: tl.constexpr = 0 if TOKENS_FIRST else 1
    new_largest = tl.maximum(largest, tl.max(scores, axis) * scale_log2)
    anchor = new_largest
    if MASKED:
        # a row that has seen nothing yet keeps -inf; subtracting 0 instead avoids inf - inf
        anchor = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    decay = tl.exp2(largest - anchor)
    if TOKENS_FIRST:
        weights = tl.exp2(scores * scale_log2 - anchor[None, :])
        total = total * decay + tl.sum(weights, 0)
        weights = weights.to(latent.dtype)
        out = tl.dot(tl.trans(latent), weights, acc=out * decay[None, :], input_precision="ieee")
    else:
        weights = tl.exp2(scores * scale_log2 - anchor[:, None])
        total = total * decay + tl.sum(weights, 1)
        out = tl.dot(weights.to(latent.dtype), latent, acc=out * decay[:, None], input_precision="ieee")
    return new_largest, total, out


@triton.jit
def _widen(rows, FP8: tl.constexpr, compute_dtype: tl.constexpr):
    """Latent rows as numbers to multiply; e4m3 comes as bytes, because not every chip knows the format."""
    if FP8:
        # the same fields as float16, with an exponent biased by 7 instead of 15: a factor of 2 ** 8
        bits = rows.to(tl.uint16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return (bits.to(tl.float16, bitcast=True) * 256.0).to(compute_dtype)
    return rows.to(compute_dtype)


@triton.jit
def _load_tile(
    kv_ptr, table, first_token, length, page_stride, token_stride,
    KV_LORA_RANK: tl.constexpr, ROPE_DIM: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, MASKED: tl.constexpr,
):
    """The tile's latent rows; rows past the length, which may hold anything, are zeros where MASKED."""
    offsets = tl.arange(0, BLOCK_TOKENS)
    tokens = first_token + offsets
    if PAGE_TOKENS % BLOCK_TOKENS == 0:
        page = tl.load(table + first_token // PAGE_TOKENS).to(tl.int64)
        rows = kv_ptr + page * page_stride + (first_token % PAGE_TOKENS + offsets)[:, None] * token_stride
    else:
        pages = tl.load(table + tokens // PAGE_TOKENS, mask=tokens < length, other=0).to(tl.int64)
        rows = kv_ptr + (pages * page_stride + (tokens % PAGE_TOKENS) * token_stride)[:, None]
    columns = tl.arange(0, BLOCK_C)[None, :]
    rope_columns = tl.arange(0, BLOCK_R)[None, :]
    if MASKED or BLOCK_C != KV_LORA_RANK or BLOCK_R != ROPE_DIM:
        there = (tokens < length)[:, None]
        latent = tl.load(rows + columns, mask=there & (columns < KV_LORA_RANK), other=0)
        rope_rows = rows + KV_LORA_RANK
        k_rope = tl.load(rope_rows + rope_columns, mask=there & (rope_columns < ROPE_DIM), other=0)
    else:
        latent = tl.load(rows + columns)
        k_rope = tl.load(rows + KV_LORA_RANK + rope_columns)
    return latent, k_rope


@triton.jit
def decode_kernel(
    q_ptr, q_rope_ptr, kv_ptr, table_ptr, lens_ptr,
    out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, scale_log2, kv_scale,
    num_seqs, num_heads, num_rows,
    q_stride_b, q_stride_t, q_stride_n, rope_stride_b, rope_stride_t, rope_stride_n,
    page_stride, token_stride, table_stride,
    QUERY_TOKENS: tl.constexpr, KV_LORA_RANK: tl.constexpr, ROPE_DIM: tl.constexpr, PAGE_TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_SEQS: tl.constexpr, TOKENS_FIRST: tl.constexpr, FP8: tl.constexpr, PDL: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Attend to one program's share of the list of tiles, for one block of rows.

    Grid: (programs along the list, blocks of rows). Out and lse are those of `mla_decode`; partial is
    `[row blocks, 2 * programs, BLOCK_C, BLOCK_ROWS]` float32, and partial_lse the same without BLOCK_C, in base
    2: a program has at most one segment that does not begin its sequence (slot 2 g) and at most one that
    begins but does not end it (slot 2 g + 1).
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    row_block = tl.program_id(1)
    compute_dtype: tl.constexpr = tl.float16 if FP8 else q_ptr.dtype.element_ty

    seqs = tl.arange(0, BLOCK_SEQS)
    lens = tl.load(lens_ptr + seqs, mask=seqs < num_seqs, other=0)
    seq_tiles = (lens + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    ends = tl.cumsum(seq_tiles, 0)
    tiles = tl.sum(seq_tiles, 0)
    share = tiles_per_program(tiles, tl.max(seq_tiles, 0), programs)
    tile = tl.minimum(program * share, tiles)
    share_end = tl.minimum(tile + share, tiles)

    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    query_token = rows // num_heads
    row_offsets = query_token * q_stride_t + (rows % num_heads) * q_stride_n
    rope_offsets = query_token * rope_stride_t + (rows % num_heads) * rope_stride_n
    columns = tl.arange(0, BLOCK_C)
    rope_columns = tl.arange(0, BLOCK_R)
    in_latent = (rows < num_rows)[:, None] & (columns < KV_LORA_RANK)[None, :]
    in_rope = (rows < num_rows)[:, None] & (rope_columns < ROPE_DIM)[None, :]

    while tile < share_end:
        seq = tl.sum((ends <= tile).to(tl.int32), 0)
        seq_start = tl.sum(tl.where(seqs < seq, seq_tiles, 0), 0)
        length = tl.sum(tl.where(seqs == seq, lens, 0), 0)
        seq_end = seq_start + (length + BLOCK_TOKENS - 1) // BLOCK_TOKENS
        segment_end = tl.minimum(share_end, seq_end)

        q_rows = q_ptr + seq.to(tl.int64) * q_stride_b + row_offsets[:, None]
        q_latent = tl.load(q_rows + columns[None, :], mask=in_latent, other=0.0).to(compute_dtype)
        rope_rows = q_rope_ptr + seq.to(tl.int64) * rope_stride_b + rope_offsets[:, None]
        q_rope = tl.load(rope_rows + rope_columns[None, :], mask=in_rope, other=0.0).to(compute_dtype)
        if TOKENS_FIRST:
            q_latent = tl.trans(q_latent)
            q_rope = tl.trans(q_rope)
            out = tl.zeros([BLOCK_C, BLOCK_ROWS], tl.float32)
        else:
            out = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
        largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_ROWS], tl.float32)

        first = tile - seq_start
        last = segment_end - seq_start
        # tiles that every query token sees whole
        whole = tl.maximum(first, tl.minimum(last, (length - QUERY_TOKENS + 1) // BLOCK_TOKENS))
        table = table_ptr + seq.to(tl.int64) * table_stride
        for i in tl.range(first, whole, num_stages=NUM_STAGES):
            latent, k_rope = _load_tile(
                kv_ptr, table, i * BLOCK_TOKENS, length, page_stride, token_stride,
                KV_LORA_RANK, ROPE_DIM, BLOCK_C, BLOCK_R, PAGE_TOKENS, BLOCK_TOKENS, False,
            )
            largest, total, out = _attend(
                _widen(latent, FP8, compute_dtype), _widen(k_rope, FP8, compute_dtype),
                q_latent, q_rope, None, largest, total, out, scale_log2, False, TOKENS_FIRST,
            )
        # pipelined as well: what goes straight to shared memory takes no registers on its way
        for i in tl.range(whole, last, num_stages=NUM_STAGES):
            latent, k_rope = _load_tile(
                kv_ptr, table, i * BLOCK_TOKENS, length, page_stride, token_stride,
                KV_LORA_RANK, ROPE_DIM, BLOCK_C, BLOCK_R, PAGE_TOKENS, BLOCK_TOKENS, True,
            )
            tokens = i * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
            last_seen = length - QUERY_TOKENS + query_token
            if TOKENS_FIRST:
                visible = tokens[:, None] <= last_seen[None, :]
            else:
                visible = tokens[None, :] <= last_seen[:, None]
            largest, total, out = _attend(
                _widen(latent, FP8, compute_dtype), _widen(k_rope, FP8, compute_dtype),
                q_latent, q_rope, visible, largest, total, out, scale_log2, True, TOKENS_FIRST,
            )

        lse = largest + tl.log2(total)
        factor = kv_scale / tl.where(total > 0, total, 1.0)
        if TOKENS_FIRST:
            out = out * factor[None, :]
        else:
            out = tl.trans(out * factor[:, None])
        begins = tile == seq_start
        if begins & (segment_end == seq_end):
            flat = seq.to(tl.int64) * num_rows + rows
            tl.store(
                out_ptr + flat[:, None] * KV_LORA_RANK + columns[None, :],
                tl.trans(out).to(out_ptr.dtype.element_ty),
                mask=in_latent,
            )
            tl.store(lse_ptr + flat, lse * LN_2, mask=rows < num_rows)
        else:
            slot = ((row_block * programs + program) * 2 + begins.to(tl.int32)).to(tl.int64)
            local_rows = tl.arange(0, BLOCK_ROWS)
            start = partial_ptr + slot * (BLOCK_C * BLOCK_ROWS)
            tl.store(start + columns[:, None] * BLOCK_ROWS + local_rows[None, :], out)
            tl.store(partial_lse_ptr + slot * BLOCK_ROWS + local_rows, lse)
        tile = segment_end


@triton.jit
def _combine_columns(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, programs, num_rows,
    row_block, seq, first, last, own_tiles, column,
    KV_LORA_RANK: tl.constexpr, PARTIAL_COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):
    """Combine the programs `first` to `last` for one block of columns, from `column` on."""
    # columns and rows in one dimension, as they lie in memory
    flat = tl.arange(0, BLOCK_COLUMNS * BLOCK_ROWS)
    row = flat % BLOCK_ROWS
    largest = tl.full([BLOCK_COLUMNS * BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_COLUMNS * BLOCK_ROWS], tl.float32)
    out = tl.zeros([BLOCK_COLUMNS * BLOCK_ROWS], tl.float32)
    splits_end = tl.where(own_tiles == 0, first, last + 1)
    for start in range(first, splits_end, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        there = (split <= last)[:, None]
        # the first program of a sequence holds its beginning
        slot = ((row_block * programs + split) * 2 + (split == first).to(tl.int32)).to(tl.int64)[:, None]
        lse = tl.load(partial_lse_ptr + slot * BLOCK_ROWS + row[None, :], mask=there, other=float("-inf"))
        part = tl.load(
            partial_ptr + (slot * PARTIAL_COLUMNS + column) * BLOCK_ROWS + flat[None, :], mask=there, other=0.0
        )
        new_largest = tl.maximum(largest, tl.max(lse, 0))
        anchor = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        decay = tl.exp2(largest - anchor)
        weights = tl.exp2(lse - anchor[None, :])
        total = total * decay + tl.sum(weights, 0)
        out = out * decay + tl.sum(part * weights, 0)
        largest = new_largest
    out = out / tl.where(total > 0, total, 1.0)
    lse = largest + tl.log2(total)
    # rows and columns apart again, so that what is written is contiguous, too
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = column + tl.arange(0, BLOCK_COLUMNS)
    out_rows = seq.to(tl.int64) * num_rows + rows
    there = (rows < num_rows)[:, None] & (columns < KV_LORA_RANK)[None, :]
    out = tl.trans(tl.reshape(out, [BLOCK_COLUMNS, BLOCK_ROWS])).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_rows[:, None] * KV_LORA_RANK + columns[None, :], out, mask=there)
    if column == 0:
        flat_rows = seq.to(tl.int64) * num_rows + row_block * BLOCK_ROWS + row
        once = (flat < BLOCK_ROWS) & (row_block * BLOCK_ROWS + row < num_rows)
        tl.store(lse_ptr + flat_rows, lse * LN_2, mask=once)


@triton.jit
def combine_kernel(
    partial_ptr, partial_lse_ptr, lens_ptr, out_ptr, lse_ptr,
    programs, num_seqs, num_rows,
    KV_LORA_RANK: tl.constexpr, PARTIAL_COLUMNS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_SEQS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, PDL: tl.constexpr,
):
    """Combine the partial results of one sequence for one block of rows.

    Grid: (programs among which the columns are shared out, blocks of rows, sequences). Also writes what belongs
    to an empty sequence: zeros and -inf. A partial result is `[PARTIAL_COLUMNS, BLOCK_ROWS]`, so that a program's
    part of it is contiguous.
    """
    row_block = tl.program_id(1)
    seq = tl.program_id(2)
    seqs = tl.arange(0, BLOCK_SEQS)
    # before the wait: the kernel that is waited for does not write lengths, and has itself waited for what does
    lens = tl.load(lens_ptr + seqs, mask=seqs < num_seqs, other=0)
    seq_tiles = (lens + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    share = tiles_per_program(tl.sum(seq_tiles, 0), tl.max(seq_tiles, 0), programs)
    seq_start = tl.sum(tl.where(seqs < seq, seq_tiles, 0), 0)
    own_tiles = tl.sum(tl.where(seqs == seq, seq_tiles, 0), 0)
    first = seq_start // share
    last = (seq_start + tl.maximum(own_tiles, 1) - 1) // share
    if PDL:
        # every program waits, so that the end of this kernel is also the end of the one before it
        gdc_wait()
        gdc_launch_dependents()
    if (own_tiles == 0) | (first < last):
        for column in range(
            tl.program_id(0) * BLOCK_COLUMNS, KV_LORA_RANK, tl.num_programs(0) * BLOCK_COLUMNS
        ):
            _combine_columns(
                partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, programs, num_rows, row_block, seq, first, last,
                own_tiles, column, KV_LORA_RANK, PARTIAL_COLUMNS, BLOCK_ROWS, BLOCK_SPLITS, BLOCK_COLUMNS,
            )
