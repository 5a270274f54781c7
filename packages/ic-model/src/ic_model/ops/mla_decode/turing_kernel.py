"""MLA decoding for Turing (RTX 20xx, T4) in Gluon: tensor cores that plain Triton no longer reaches there.

Triton compiles `tl.dot` to scalar multiply-adds below compute capability 8.0 (its pull request 5066): 9.1 TFLOP/s
on an RTX 2070 Super, where 16 heads take 14.3 TFLOP/s to keep up with the memory. Gluon still reaches the chip's
own `mma.sync.m16n8k8` (float16 in, float32 sums: 36 TFLOP/s there). The list of tiles, the shares and the partial
results are those of `kernel.py`, and so is the kernel that combines them.

A block of warps is `[SPLITS, ROW_WARPS]`. Warps of one split own a stretch of the latent columns: they sum the
scores over those columns, and they own the same columns of the output. So a number of a latent row goes from
memory to one place in shared memory and from there to those warps only, once for the scores and once for the
values; what the splits exchange is their parts of the scores. There is no asynchronous copy on this chip: the
next tile is on its way into registers while the present one is worked on.

Letters: C kv_lora_rank, R qk_rope_head_dim. A *row* is one head of one query token.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# what Gluon offers for functions of one's own has no public name in Triton 3.6 to 3.9
from triton.experimental.gluon.language._core import _unwrap_if_constexpr, builtin

from ic_model.ops.mla_decode.kernel import tiles_per_program

LN_2 = gl.constexpr(0.6931471805599453)
NEG_INF = gl.constexpr(float("-inf"))


@builtin
def _mma(a: Any, b: Any, acc: Any, _semantic: Any = None) -> Any:
    """`a @ b + acc` for every split. Gluon's own `mma_v2` refuses Turing's instruction, the compiler does not."""
    handle = _semantic.dot(
        a, b, acc, input_precision=None, max_num_imprecise_acc=None, out_dtype=acc.dtype
    ).handle
    return gl.tensor(handle, acc.type)


@builtin
def _as_halves(buffer: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """The same shared memory as float16; the method for it changed its name between Triton 3.6 and 3.9."""
    shape = [_unwrap_if_constexpr(size) for size in shape]
    return _semantic.memdesc_reinterpret(buffer, gl.float16, shape, _unwrap_if_constexpr(layout))


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _zero():
    """0, but the compiler does not know.

    What is added to it is worked out where it is needed. Left to itself, the compiler works out all addresses of
    queries and results before the loops, and keeps a hundred registers through them.
    """
    zero = gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    return gl.multiple_of(zero, 16)


@gluon.constexpr_function
def _copy_layout(pairs, splits, row_warps):
    """Of a tile's columns on their way to shared memory: 16 bytes per thread, side by side along a row."""
    lanes = min(pairs // 4, 32)
    return gl.BlockedLayout([1, 1, 4], [1, 32 // lanes, lanes], [splits, row_warps, 1], [2, 1, 0])


@gluon.constexpr_function
def _buffer_layout(columns, element_bytes):
    """Of a tile's columns in shared memory: eight rows of an 8x8 matrix of float16 lie in different banks."""
    rows_per_phase = max(128 // (columns * element_bytes), 1)
    return gl.SwizzledSharedLayout(16 // element_bytes, rows_per_phase, 8 // rows_per_phase, [2, 1, 0])


@gluon.constexpr_function
def _parts_buffer_layout(tokens):
    """Of scores in shared memory, float32: a thread's two beside its neighbours', four rows in different banks."""
    rows_per_phase = max(32 // tokens, 1)
    return gl.SwizzledSharedLayout(8, rows_per_phase, 4 // rows_per_phase, [2, 1, 0])


@gluon.constexpr_function
def _parts_layout(splits, row_warps, tokens):
    """Of all splits' scores in the registers of every split: as the tensor cores leave them, times the splits."""
    powers = [1 << bit for bit in range(10)]
    registers = [[0, 0, 1], [0, 8, 0]]
    registers += [[0, 0, power] for power in powers if 8 <= power < tokens]
    registers += [[power, 0, 0] for power in powers if power < splits]
    lanes = [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    warps = [[0, 16 * power, 0] for power in powers if power < row_warps]
    warps += [[0, 0, 0] for power in powers if power < splits]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [splits, 16 * row_warps, tokens])


@gluon.jit
def _axis(SIZE: gl.constexpr, AXIS: gl.constexpr, layout: gl.constexpr):
    """0 to SIZE along one axis of three."""
    if AXIS == 0:
        return gl.arange(0, SIZE, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    elif AXIS == 1:
        return gl.arange(0, SIZE, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    else:
        return gl.arange(0, SIZE, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]


@gluon.jit
def _work_list(lens_ptr, num_seqs, BLOCK_TOKENS: gl.constexpr, BLOCK_SEQS: gl.constexpr, WARPS: gl.constexpr):
    """Sequence numbers, lengths, tiles, where each sequence's tiles end in the list, and this program's share."""
    seqs = gl.arange(0, BLOCK_SEQS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    lens = gl.load(lens_ptr + seqs, mask=seqs < num_seqs, other=0)
    seq_tiles = (lens + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    ends = gl.associative_scan(seq_tiles, 0, _add)
    tiles = gl.sum(seq_tiles, 0)
    share = tiles_per_program(tiles, gl.max(seq_tiles, 0), gl.num_programs(0))
    first = gl.minimum(gl.program_id(0) * share, tiles)
    end = gl.minimum(first + share, tiles)
    return seqs, lens, seq_tiles, ends, first, end


@gluon.jit
def _segment(seqs, lens, seq_tiles, ends, tile, share_end):
    """The sequence that a tile of the list belongs to, the place of its first tile, and its length in tokens.

    Past the end of the share the length is 0, so that nothing is read.
    """
    seq = gl.sum((ends <= tile).to(gl.int32), 0)
    seq_start = gl.sum(gl.where(seqs < seq, seq_tiles, 0), 0)
    length = gl.sum(gl.where(seqs == seq, lens, 0), 0)
    return seq, seq_start, gl.where(tile < share_end, length, 0)


@gluon.jit
def _tile_buffer(TOKENS: gl.constexpr, COLUMNS: gl.constexpr, SPLITS: gl.constexpr):
    """Shared memory for columns of a tile, as pairs and as what they are."""
    pairs = gl.allocate_shared_memory(
        gl.int32, [SPLITS, TOKENS, COLUMNS // 2], _buffer_layout(COLUMNS // 2, 4)
    )
    return pairs, _as_halves(pairs, [SPLITS, TOKENS, COLUMNS], _buffer_layout(COLUMNS, 2))


@gluon.jit
def _load_columns(
    start, first_token, length, TOKEN_STRIDE: gl.constexpr, COLUMNS_END: gl.constexpr,
    COLUMNS: gl.constexpr, TOKENS: gl.constexpr, SPLITS: gl.constexpr, ROW_WARPS: gl.constexpr,
):  # fmt: skip
    """Columns of a tile's rows as pairs, `[SPLITS, TOKENS, COLUMNS / 2]` int32.

    Rows past the length, which may hold anything, are 0. Pairs, because Triton takes float16 apart as soon as it
    is loaded, that is, it would wait for the rows that are to arrive during the next tile's work.
    """
    layout: gl.constexpr = _copy_layout(COLUMNS // 2, SPLITS, ROW_WARPS)
    token = _axis(TOKENS, 1, layout)
    pair = _axis(SPLITS, 0, layout) * (COLUMNS // 2) + _axis(COLUMNS // 2, 2, layout)
    there = first_token + token < length
    if COLUMNS_END < SPLITS * COLUMNS:
        there = there & (pair < COLUMNS_END // 2)
    start = start.to(gl.pointer_type(gl.int32), bitcast=True)
    return gl.load(start + (token * (TOKEN_STRIDE // 2) + pair), mask=there, other=0)


@gluon.jit
def _load_tile(
    kv_ptr, page, page_stride, first_token, length,
    TOKEN_STRIDE: gl.constexpr, C: gl.constexpr, R: gl.constexpr, PAGE_TOKENS: gl.constexpr,
    BLOCK_C: gl.constexpr, TOKENS: gl.constexpr, SPLITS: gl.constexpr, ROW_WARPS: gl.constexpr,
):  # fmt: skip
    """The latent and the rotated columns of a tile."""
    start = kv_ptr + page.to(gl.int64) * page_stride + first_token % PAGE_TOKENS * TOKEN_STRIDE
    latent = _load_columns(
        start, first_token, length, TOKEN_STRIDE, C, BLOCK_C // SPLITS, TOKENS, SPLITS, ROW_WARPS
    )
    k_rope = _load_columns(
        start + C, first_token, length, TOKEN_STRIDE, R, R // SPLITS, TOKENS, SPLITS, ROW_WARPS
    )
    return latent, k_rope


@gluon.jit
def _load_queries(
    start, num_rows, num_heads, stride_t, stride_n, columns_end,
    COLUMNS: gl.constexpr, ROWS: gl.constexpr, SPLITS: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Columns of a block of query rows, `[SPLITS, ROWS, COLUMNS]`, straight to the tensor cores' registers."""
    row = gl.program_id(1) * ROWS + _zero() + _axis(ROWS, 1, layout)
    column = _axis(SPLITS, 0, layout) * COLUMNS + _axis(COLUMNS, 2, layout)
    pointers = start + ((row // num_heads) * stride_t + (row % num_heads) * stride_n) + column
    return gl.load(pointers, mask=(row < num_rows) & (column < columns_end), other=0.0)


@gluon.jit
def _score(q_latent, q_rope, latent_buffer, rope_buffer, parts_buffer, mma_layout: gl.constexpr):
    """Scores of one tile, `[ROWS, TOKENS]`, the same in every split: the splits' parts meet in shared memory."""
    SPLITS: gl.constexpr = parts_buffer.shape[0]
    ROWS: gl.constexpr = parts_buffer.shape[1]
    TOKENS: gl.constexpr = parts_buffer.shape[2]
    keys_layout: gl.constexpr = gl.DotOperandLayout(1, mma_layout, 2)
    scores = gl.zeros([SPLITS, ROWS, TOKENS], gl.float32, mma_layout)
    scores = _mma(q_latent, latent_buffer.permute([0, 2, 1]).load(keys_layout), scores)
    scores = _mma(q_rope, rope_buffer.permute([0, 2, 1]).load(keys_layout), scores)
    parts_buffer.store(scores)
    whole = gl.sum(parts_buffer.load(_parts_layout(SPLITS, ROWS // 16, TOKENS)), 0)
    return gl.convert_layout(whole, gl.SliceLayout(0, mma_layout), assert_trivial=True)


@gluon.jit
def _weigh(scores, largest, total, out, first_token, last_seen, scale_log2, mma_layout: gl.constexpr):
    """The online softmax of one tile: its weights, and maximum, sum and output with what came before decayed."""
    SPLITS: gl.constexpr = out.shape[0]
    ROWS: gl.constexpr = scores.shape[0]
    TOKENS: gl.constexpr = scores.shape[1]
    scores_layout: gl.constexpr = gl.SliceLayout(0, mma_layout)
    token = first_token + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, scores_layout))
    scores = gl.where(token[None, :] <= last_seen[:, None], scores, NEG_INF)
    new_largest = gl.maximum(largest, gl.max(scores, 1) * scale_log2)
    # a row that has seen nothing yet keeps -inf; subtracting 0 instead avoids inf - inf
    anchor = gl.where(new_largest == NEG_INF, 0.0, new_largest)
    decay = gl.exp2(largest - anchor)
    weights = gl.exp2(scores * scale_log2 - anchor[:, None])
    # summed over the tokens only once, at the end: until then every thread keeps its own
    total = total * decay[:, None] + weights
    out = out * gl.expand_dims(decay[:, None], 0)
    # the layout of sums is that of operands on this chip: nothing moves
    weights = gl.expand_dims(weights.to(gl.float16), 0).broadcast_to([SPLITS, ROWS, TOKENS])
    weights = gl.convert_layout(weights, gl.DotOperandLayout(0, mma_layout, 2), assert_trivial=True)
    return weights, new_largest, total, out


@gluon.jit
def _store_segment(
    out, largest, total, seq, begins, finishes,
    out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, kv_scale, num_rows, C: gl.constexpr, mma_layout: gl.constexpr,
):  # fmt: skip
    """Write what a program has of a sequence: the result where it has all of it, else a partial result."""
    ROWS: gl.constexpr = out.shape[1]
    COLUMNS: gl.constexpr = out.shape[2]
    BLOCK_C: gl.constexpr = out.shape[0] * COLUMNS
    rows_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, mma_layout))
    row_block = gl.program_id(1)
    row = _zero() + gl.arange(0, ROWS, layout=rows_layout)
    out_row = _zero() + _axis(ROWS, 1, mma_layout)
    column = _axis(out.shape[0], 0, mma_layout) * COLUMNS + (_zero() + _axis(COLUMNS, 2, mma_layout))

    row_total = gl.sum(total, 1)
    lse = largest + gl.log2(row_total)
    factor = kv_scale / gl.where(row_total > 0, row_total, 1.0)
    out = out * gl.expand_dims(factor[:, None], 0)
    if begins & finishes:
        flat = seq.to(gl.int64) * num_rows + row_block * ROWS
        there = row_block * ROWS + out_row < num_rows
        if C != BLOCK_C:
            there = there & (column < C)
        gl.store(out_ptr + flat * C + (out_row * C + column), out.to(out_ptr.dtype.element_ty), mask=there)
        gl.store(lse_ptr + flat + row, lse * LN_2, mask=row_block * ROWS + row < num_rows)
    else:
        slot = ((row_block * gl.num_programs(0) + gl.program_id(0)) * 2 + begins.to(gl.int32)).to(gl.int64)
        gl.store(partial_ptr + slot * (BLOCK_C * ROWS) + (column * ROWS + out_row), out)
        gl.store(partial_lse_ptr + slot * ROWS + row, lse)


@gluon.jit(do_not_specialize=["num_seqs", "num_query_tokens", "num_heads", "num_rows", "table_stride"])
def decode_turing_kernel(
    q_ptr, kv_ptr, table_ptr, lens_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    scale_log2, kv_scale, num_seqs, num_query_tokens, num_heads, num_rows,
    q_stride_b, q_stride_t, q_stride_n, page_stride, table_stride,
    TOKEN_STRIDE: gl.constexpr, C: gl.constexpr, R: gl.constexpr,
    PAGE_TOKENS: gl.constexpr, SPLITS: gl.constexpr, ROW_WARPS: gl.constexpr,
    BLOCK_C: gl.constexpr, BLOCK_TOKENS: gl.constexpr, BLOCK_SEQS: gl.constexpr,
):  # fmt: skip
    """Attend to one program's share of the list of tiles; grid and results are those of `kernel.decode_kernel`.

    A tile lies in one page. BLOCK_C and R are powers of two, and C is at most BLOCK_C.
    """
    ROWS: gl.constexpr = 16 * ROW_WARPS
    LATENT: gl.constexpr = BLOCK_C // SPLITS
    ROPE: gl.constexpr = R // SPLITS
    mma_layout: gl.constexpr = gl.NVMMADistributedLayout([2, 1], [SPLITS, ROW_WARPS, 1], [1, 16, 8])
    q_layout: gl.constexpr = gl.DotOperandLayout(0, mma_layout, 2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, mma_layout))
    latent_pairs, latent_buffer = _tile_buffer(BLOCK_TOKENS, LATENT, SPLITS)
    rope_pairs, rope_buffer = _tile_buffer(BLOCK_TOKENS, ROPE, SPLITS)
    parts_buffer = gl.allocate_shared_memory(
        gl.float32, [SPLITS, ROWS, BLOCK_TOKENS], _parts_buffer_layout(BLOCK_TOKENS)
    )
    seqs, lens, seq_tiles, ends, tile, share_end = _work_list(
        lens_ptr, num_seqs, BLOCK_TOKENS, BLOCK_SEQS, SPLITS * ROW_WARPS
    )
    query_token = (gl.program_id(1) * ROWS + gl.arange(0, ROWS, layout=rows_layout)) // num_heads

    seq, seq_start, length = _segment(seqs, lens, seq_tiles, ends, tile, share_end)
    table = table_ptr + seq.to(gl.int64) * table_stride
    token = (tile - seq_start) * BLOCK_TOKENS
    page = gl.load(table + token // PAGE_TOKENS, mask=token < length, other=0)
    latent, k_rope = _load_tile(
        kv_ptr, page, page_stride, token, length,
        TOKEN_STRIDE, C, R, PAGE_TOKENS, BLOCK_C, BLOCK_TOKENS, SPLITS, ROW_WARPS,
    )  # fmt: skip
    while tile < share_end:
        seq_end = seq_start + (length + BLOCK_TOKENS - 1) // BLOCK_TOKENS
        segment_end = gl.minimum(share_end, seq_end)
        tokens_end = (segment_end - seq_start) * BLOCK_TOKENS
        first_token = (tile - seq_start) * BLOCK_TOKENS
        # the page numbers are fetched a tile ahead of the rows, also those of the sequence that comes next
        next_seq, next_start, next_length = _segment(seqs, lens, seq_tiles, ends, segment_end, share_end)
        next_table = table_ptr + next_seq.to(gl.int64) * table_stride
        next_page = gl.load(next_table, mask=next_length > 0, other=0)
        following = first_token + BLOCK_TOKENS
        page = gl.load(table + following // PAGE_TOKENS, mask=following < tokens_end, other=0)

        q_start = q_ptr + seq.to(gl.int64) * q_stride_b
        q_latent = _load_queries(
            q_start, num_rows, num_heads, q_stride_t, q_stride_n, C, LATENT, ROWS, SPLITS, q_layout
        )
        q_rope = _load_queries(
            q_start + C, num_rows, num_heads, q_stride_t, q_stride_n, R, ROPE, ROWS, SPLITS, q_layout
        )
        out = gl.zeros([SPLITS, ROWS, LATENT], gl.float32, mma_layout)
        largest = gl.full([ROWS], float("-inf"), gl.float32, rows_layout)
        total = gl.zeros([ROWS, BLOCK_TOKENS], gl.float32, gl.SliceLayout(0, mma_layout))
        last_seen = length - num_query_tokens + query_token
        for token in range(first_token, tokens_end, BLOCK_TOKENS):
            latent_pairs.store(latent)
            rope_pairs.store(k_rope)
            # the tile after this one, of this sequence or the next
            following = token + BLOCK_TOKENS
            ends_here = following >= tokens_end
            latent, k_rope = _load_tile(
                kv_ptr, gl.where(ends_here, next_page, page), page_stride,
                gl.where(ends_here, 0, following), gl.where(ends_here, next_length, length),
                TOKEN_STRIDE, C, R, PAGE_TOKENS, BLOCK_C, BLOCK_TOKENS, SPLITS, ROW_WARPS,
            )  # fmt: skip
            following += BLOCK_TOKENS
            page = gl.load(table + following // PAGE_TOKENS, mask=following < tokens_end, other=0)

            scores = _score(q_latent, q_rope, latent_buffer, rope_buffer, parts_buffer, mma_layout)
            weights, largest, total, out = _weigh(
                scores, largest, total, out, token, last_seen, scale_log2, mma_layout
            )
            out = _mma(weights, latent_buffer.load(gl.DotOperandLayout(1, mma_layout, 2)), out)

        _store_segment(
            out, largest, total, seq, tile == seq_start, segment_end == seq_end,
            out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, kv_scale, num_rows, C, mma_layout,
        )  # fmt: skip
        tile = segment_end
        seq = next_seq
        seq_start = next_start
        length = next_length
        table = next_table
