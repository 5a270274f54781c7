"""What the forward and the backward kernels share: finding one's block, loading tiles.

Tensors are `[batch, tokens, heads, dim]`. Packed sequences are a batch of 1 with `cu_seqlens`; a dense batch has
none. `start` is a sequence's first token within its batch entry: 0 in a dense batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# what changes from batch to batch: otherwise each would compile anew for a number that 16 divides, and for 1
UNSPECIALIZED = ("num_seqs", "tokens_q", "tokens_k", "lse_stride_b", "lse_stride_n")


@triton.jit
def locate(flat_block, cu_ptr, num_seqs, tokens, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Sequence, block within it, first token and tokens of the sequence that a flat block index belongs to.

    Packed, sequence s owns the blocks from cu[s] // BLOCK + s on. That is enough for its tokens wherever it
    begins, and tokens // BLOCK + num_seqs blocks do for all, so that the host need not know the lengths.
    """
    if PACKED:
        seq = 0
        end = num_seqs
        while end - seq > 1:
            middle = (seq + end) // 2
            if tl.load(cu_ptr + middle) // BLOCK + middle <= flat_block:
                seq = middle
            else:
                end = middle
        # the copy engine takes 32 bits, and lengths may come in 64
        start = tl.load(cu_ptr + seq).to(tl.int32)
        length = tl.load(cu_ptr + seq + 1).to(tl.int32) - start
        block = flat_block - (start // BLOCK + seq)
    else:
        blocks = tl.cdiv(tokens, BLOCK)
        seq = flat_block // blocks
        block = flat_block % blocks
        start = 0
        length = tokens
    return seq, block, start, length


@triton.jit
def sequence(seq, cu_ptr, tokens, PACKED: tl.constexpr):
    """First token and tokens of a sequence."""
    if PACKED:
        # the copy engine takes 32 bits, and lengths may come in 64
        start = tl.load(cu_ptr + seq).to(tl.int32)
        length = tl.load(cu_ptr + seq + 1).to(tl.int32) - start
    else:
        start = 0
        length = tokens
    return start, length


@triton.jit
def written_rows(seq, num_seqs, start, length, tokens, PACKED: tl.constexpr):
    """Rows from `start` on that a sequence writes: the last one also those that belong to nobody, as zeros."""
    rows = length
    if PACKED:
        rows = tl.where(seq == num_seqs - 1, tokens - start, length)
    return rows


@triton.jit
def load_tile(
    base, first_row, rows_end, token_stride,
    BLOCK: tl.constexpr, FIRST_COLUMN: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """`[BLOCK, BLOCK_WIDTH]` from row `first_row` on; zeros past `rows_end` where MASKED, and past WIDTH."""
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_WIDTH)
    # the offset of the tile passes 2**31, those within it do not
    tile = base + tl.cast(first_row, tl.int64) * token_stride + FIRST_COLUMN
    pointers = tile + rows[:, None] * token_stride + columns[None, :]
    there = (first_row + rows < rows_end)[:, None]
    if MASKED and BLOCK_WIDTH != WIDTH:
        loaded = tl.load(pointers, mask=there & (columns < WIDTH)[None, :], other=0.0)
    elif MASKED:
        loaded = tl.load(pointers, mask=there, other=0.0)
    elif BLOCK_WIDTH != WIDTH:
        loaded = tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        loaded = tl.load(pointers)
    return loaded


@triton.jit
def load_rows(
    base, descriptor, batch, start, head, first_row, rows_end, token_stride,
    BLOCK: tl.constexpr, FIRST_COLUMN: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr,
):
    """As `load_tile`, by a descriptor of `[batch, tokens, heads, dim]` where there is one and no row is masked."""
    if DESCRIPTORS and not MASKED:
        loaded = descriptor.load([batch, start + first_row, head, FIRST_COLUMN]).reshape(BLOCK, BLOCK_WIDTH)
    else:
        loaded = load_tile(
            base, first_row, rows_end, token_stride, BLOCK, FIRST_COLUMN, WIDTH, BLOCK_WIDTH, MASKED
        )
    return loaded


@triton.jit
def store_tile(
    base, tile, first_row, rows_end, token_stride,
    BLOCK: tl.constexpr, FIRST_COLUMN: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):
    """Store `[BLOCK, BLOCK_WIDTH]` from row `first_row` on, in the pointer's dtype."""
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_WIDTH)
    start = base + tl.cast(first_row, tl.int64) * token_stride + FIRST_COLUMN
    mask = (first_row + rows < rows_end)[:, None]
    if BLOCK_WIDTH != WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    pointers = start + rows[:, None] * token_stride + columns[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def head_pointer(pointer, batch, start, head, batch_stride, token_stride, head_stride):
    """Where a head's rows of a sequence begin."""
    return (
        pointer
        + tl.cast(batch, tl.int64) * batch_stride
        + tl.cast(start, tl.int64) * token_stride
        + tl.cast(head, tl.int64) * head_stride
    )
