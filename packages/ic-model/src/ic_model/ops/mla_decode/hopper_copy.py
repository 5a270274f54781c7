"""Bringing tiles to shared memory on Hopper: one warp asks the copy engine, others widen fp8 to float16."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from ic_model.ops.mla_decode.hopper_list import advance, segment, work_list

# Triton 3.9 has renamed it, and 3.6 to 3.8 have the old name only
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def tile_ring(
    dtype: gl.constexpr, SLOTS: gl.constexpr, STEP: gl.constexpr, PARTS: gl.constexpr, COLUMNS: gl.constexpr
):
    """Shared memory for tiles: latent columns in parts, and rope columns."""
    WIDTH: gl.constexpr = dtype.primitive_bitwidth
    swizzle: gl.constexpr = min(COLUMNS * WIDTH // 8, 128)
    rope_swizzle: gl.constexpr = 64 * WIDTH // 8
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle, WIDTH, 2)
    rope_layout: gl.constexpr = gl.NVMMASharedLayout(rope_swizzle, WIDTH, 2)
    latent = gl.allocate_shared_memory(dtype, [SLOTS * PARTS, STEP, COLUMNS], layout)
    return latent, gl.allocate_shared_memory(dtype, [SLOTS, STEP, 64], rope_layout)


@gluon.jit
def produce(
    latent_desc, rope_desc, table_ptr, lens_ptr, num_seqs, table_stride, page_rows,
    latent_ring, rope_ring, full, empty,
    C: gl.constexpr, TILE: gl.constexpr, PAGE_TOKENS: gl.constexpr, BLOCK_SEQS: gl.constexpr,
):
    """Ask for the tiles of the share, one after the other, each as soon as there is room for it."""
    SLOTS: gl.constexpr = rope_ring.shape[0]
    # fp8 tiles come in pieces, which leaves more of the ring in flight
    STEP: gl.constexpr = rope_ring.shape[1]
    PARTS: gl.constexpr = latent_ring.shape[0] // SLOTS
    COLUMNS: gl.constexpr = latent_ring.shape[2]
    NUM_BYTES: gl.constexpr = PARTS * latent_desc.block_type.nbytes + rope_desc.block_type.nbytes
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    seqs, lens, seq_tiles, ends, tile, share_end = work_list(lens_ptr, num_seqs, TILE, BLOCK_SEQS, layout)
    slot, phase = 0, 0
    while tile < share_end:
        seq, seq_start, length = segment(seqs, lens, seq_tiles, ends, tile)
        segment_end = gl.minimum(share_end, seq_start + (length + TILE - 1) // TILE)
        table = table_ptr + seq.to(gl.int64) * table_stride
        for i in range(tile - seq_start, segment_end - seq_start):
            token = i * TILE
            row = gl.load(table + token // PAGE_TOKENS) * page_rows + token % PAGE_TOKENS
            for step in gl.static_range(TILE // STEP):
                barrier = full.index(slot)
                mbarrier.wait(empty.index(slot), phase ^ 1)
                mbarrier.expect(barrier, NUM_BYTES)
                for part in gl.static_range(PARTS):
                    target = latent_ring.index(slot * PARTS + part)
                    async_load(latent_desc, [row + step * STEP, part * COLUMNS], barrier, target)
                async_load(rope_desc, [row + step * STEP, C], barrier, rope_ring.index(slot))
                slot, phase = advance(slot, phase, SLOTS)
        tile = segment_end


@gluon.jit
def widen(
    lens_ptr, num_seqs, latent_ring, rope_ring, ring_full, ring_empty, latent_wide, rope_wide, full, empty,
    TILE: gl.constexpr, BLOCK_SEQS: gl.constexpr,
):
    """Widen fp8 pieces of tiles to float16; every e4m3 number is one."""
    SLOTS: gl.constexpr = rope_ring.shape[0]
    WIDE_SLOTS: gl.constexpr = rope_wide.shape[0]
    STEP: gl.constexpr = rope_ring.shape[1]
    PARTS: gl.constexpr = latent_ring.shape[0] // SLOTS
    dtype: gl.constexpr = latent_wide.dtype
    WARPS: gl.constexpr = gl.num_warps()
    # each row of a piece once
    WARP_ROWS: gl.constexpr = min(STEP // WARPS, 8)
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [WARP_ROWS, 32 // WARP_ROWS], [WARPS, 1], [1, 0])
    list_layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    _seqs, _lens, _tiles, _ends, tile, share_end = work_list(lens_ptr, num_seqs, TILE, BLOCK_SEQS, list_layout)
    slot, phase, wide_slot, wide_phase = 0, 0, 0, 0
    for _ in range(tile, share_end):
        for step in gl.static_range(TILE // STEP):
            mbarrier.wait(ring_full.index(slot), phase)
            if step == 0:
                mbarrier.wait(empty.index(wide_slot), wide_phase ^ 1)
            k_rope = rope_ring.index(slot).load(layout)
            for part in gl.static_range(PARTS):
                latent = latent_ring.index(slot * PARTS + part).load(layout)
                wide = latent_wide.index(wide_slot * PARTS + part)
                wide.slice(step * STEP, STEP, 0).store(latent.to(dtype))
            rope_wide.index(wide_slot).slice(step * STEP, STEP, 0).store(k_rope.to(dtype))
            # only now has everything arrived in registers: the copy engine does not wait for loads under way
            fence_async_shared()
            mbarrier.arrive(ring_empty.index(slot), count=1)
            slot, phase = advance(slot, phase, SLOTS)
        mbarrier.arrive(full.index(wide_slot), count=1)
        wide_slot, wide_phase = advance(wide_slot, wide_phase, WIDE_SLOTS)
