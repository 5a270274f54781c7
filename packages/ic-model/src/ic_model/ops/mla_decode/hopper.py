"""MLA decoding for Hopper in Gluon: a producer warp keeps the copy engine busy, crews of four warps attend.

The list of tiles, the shares and the partial results are those of `kernel.py`. What plain Triton cannot say is who
waits for whom: its loop asks for the next tile only when the last one has arrived, so that memory idles in
between. Here one warp does nothing but ask: a tile's place in the ring is refilled as soon as the last product
that reads it is done, while the next tile is on its way already. That is what the bandwidth of an H100 or H200
takes (bytes in flight = bandwidth * latency). With fp8 rows one more group of warps widens the tiles to float16 in
between, because the tensor cores take a transposed operand (the values) in 16 bits only.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ic_model.ops.mla_decode.hopper_attend import scores, values
from ic_model.ops.mla_decode.hopper_copy import produce, tile_ring, widen
from ic_model.ops.mla_decode.hopper_list import ring_barriers


@gluon.jit
def decode_hopper_kernel(
    latent_desc, rope_desc, q_ptr, q_rope_ptr, table_ptr, lens_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    scale_log2, kv_scale, num_seqs, num_heads, num_rows, q_stride_b, q_stride_t, q_stride_n, rope_stride_b,
    rope_stride_t, rope_stride_n, page_rows, table_stride,
    QUERY_TOKENS: gl.constexpr, C: gl.constexpr, PAGE_TOKENS: gl.constexpr,
    BLOCK_ROWS: gl.constexpr, BLOCK_SEQS: gl.constexpr, TILE: gl.constexpr, STEP: gl.constexpr,
    PARTS: gl.constexpr, SLOTS: gl.constexpr, WIDE_SLOTS: gl.constexpr, MESSAGES: gl.constexpr,
    VALUE_REGISTERS: gl.constexpr, WIDEN_WARPS: gl.constexpr, PDL: gl.constexpr,
):
    """Attend to one program's share of the list of tiles; grid and results are those of `kernel.decode_kernel`."""
    FP8: gl.constexpr = latent_desc.dtype == gl.float8e4nv
    dtype: gl.constexpr = gl.float16 if FP8 else latent_desc.dtype
    ROWS_FIRST: gl.constexpr = BLOCK_ROWS >= 64
    COLUMNS: gl.constexpr = C // PARTS
    q_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_latent = gl.allocate_shared_memory(dtype, [PARTS, BLOCK_ROWS, COLUMNS], q_layout)
    q_rope = gl.allocate_shared_memory(dtype, [BLOCK_ROWS, 64], q_layout)
    N: gl.constexpr = TILE if ROWS_FIRST else BLOCK_ROWS
    M: gl.constexpr = BLOCK_ROWS if ROWS_FIRST else TILE
    weights_layout: gl.constexpr = gl.NVMMASharedLayout(min(N * 2, 128), 16, 2)
    weights = gl.allocate_shared_memory(dtype, [MESSAGES, M, N], weights_layout)
    factors = gl.allocate_shared_memory(gl.float32, [MESSAGES, BLOCK_ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    told, heard = ring_barriers(MESSAGES, PARTS)
    ring_latent, ring_rope = tile_ring(latent_desc.dtype, SLOTS, STEP, PARTS, COLUMNS)
    if FP8:
        ring_full, ring_empty = ring_barriers(SLOTS, 1)
        latent, rope = tile_ring(dtype, WIDE_SLOTS, TILE, PARTS, COLUMNS)
        full, empty = ring_barriers(WIDE_SLOTS, PARTS)
    else:
        latent, rope = ring_latent, ring_rope
        full, empty = ring_barriers(SLOTS, PARTS)
        ring_full, ring_empty = full, empty
    if PDL:
        # everything above overlaps with the end of the kernel before
        gdc_wait()
        gdc_launch_dependents()
    LEFT: gl.constexpr = 0
    RIGHT: gl.constexpr = 1
    # the groups' arguments are spelled out: in a variable, constants would not be constants any more
    if FP8:
        gl.static_assert(PARTS == 1, "fp8: two crews of values and one that widens do not fit the registers")
        gl.warp_specialize(
            [
                (
                    scores,
                    (
                        q_ptr, q_rope_ptr, lens_ptr, lse_ptr, partial_lse_ptr, scale_log2, kv_scale, num_seqs,
                        num_heads, num_rows, q_stride_b, q_stride_t, q_stride_n, rope_stride_b, rope_stride_t,
                        rope_stride_n, latent, rope, full, q_latent, q_rope, weights, factors, told, heard,
                        QUERY_TOKENS, BLOCK_SEQS, ROWS_FIRST,
                    ),
                ),
                (
                    values,
                    (
                        lens_ptr, out_ptr, partial_ptr, num_seqs, num_rows,
                        latent, empty, weights, factors, told, heard,
                        LEFT, PARTS, BLOCK_SEQS, ROWS_FIRST,
                    ),
                ),
                (
                    widen,
                    (
                        lens_ptr, num_seqs, ring_latent, ring_rope, ring_full, ring_empty,
                        latent, rope, full, empty,
                        TILE, BLOCK_SEQS,
                    ),
                ),
                (
                    produce,
                    (
                        latent_desc, rope_desc, table_ptr, lens_ptr, num_seqs, table_stride, page_rows,
                        ring_latent, ring_rope, ring_full, ring_empty, C, TILE, PAGE_TOKENS, BLOCK_SEQS,
                    ),
                ),
            ],
            [4, WIDEN_WARPS, 1],
            [VALUE_REGISTERS, 96, 40],
        )
    elif PARTS == 2:
        gl.warp_specialize(
            [
                (
                    scores,
                    (
                        q_ptr, q_rope_ptr, lens_ptr, lse_ptr, partial_lse_ptr, scale_log2, kv_scale, num_seqs,
                        num_heads, num_rows, q_stride_b, q_stride_t, q_stride_n, rope_stride_b, rope_stride_t,
                        rope_stride_n, latent, rope, full, q_latent, q_rope, weights, factors, told, heard,
                        QUERY_TOKENS, BLOCK_SEQS, ROWS_FIRST,
                    ),
                ),
                (
                    values,
                    (
                        lens_ptr, out_ptr, partial_ptr, num_seqs, num_rows,
                        latent, empty, weights, factors, told, heard,
                        LEFT, PARTS, BLOCK_SEQS, ROWS_FIRST,
                    ),
                ),
                (
                    values,
                    (
                        lens_ptr, out_ptr, partial_ptr, num_seqs, num_rows,
                        latent, empty, weights, factors, told, heard,
                        RIGHT, PARTS, BLOCK_SEQS, ROWS_FIRST,
                    ),
                ),
                (
                    produce,
                    (
                        latent_desc, rope_desc, table_ptr, lens_ptr, num_seqs, table_stride, page_rows,
                        ring_latent, ring_rope, ring_full, ring_empty, C, TILE, PAGE_TOKENS, BLOCK_SEQS,
                    ),
                ),
            ],
            [4, 4, 1],
            [VALUE_REGISTERS, VALUE_REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (
                    scores,
                    (
                        q_ptr, q_rope_ptr, lens_ptr, lse_ptr, partial_lse_ptr, scale_log2, kv_scale, num_seqs,
                        num_heads, num_rows, q_stride_b, q_stride_t, q_stride_n, rope_stride_b, rope_stride_t,
                        rope_stride_n, latent, rope, full, q_latent, q_rope, weights, factors, told, heard,
                        QUERY_TOKENS, BLOCK_SEQS, ROWS_FIRST,
                    ),
                ),
                (
                    values,
                    (
                        lens_ptr, out_ptr, partial_ptr, num_seqs, num_rows,
                        latent, empty, weights, factors, told, heard,
                        LEFT, PARTS, BLOCK_SEQS, ROWS_FIRST,
                    ),
                ),
                (
                    produce,
                    (
                        latent_desc, rope_desc, table_ptr, lens_ptr, num_seqs, table_stride, page_rows,
                        ring_latent, ring_rope, ring_full, ring_empty, C, TILE, PAGE_TOKENS, BLOCK_SEQS,
                    ),
                ),
            ],
            [4, 1],
            [VALUE_REGISTERS, 40],
        )
