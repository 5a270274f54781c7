"""What every group of warps of the kernel for Hopper knows: its place in the list of tiles, and in a ring."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ic_model.ops.mla_decode.kernel import tiles_per_program


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def advance(slot, phase, SLOTS: gl.constexpr):
    """The next place in a ring, and the parity that its barriers have then."""
    wraps = (slot + 1 == SLOTS).to(gl.int32)
    return (slot + 1) * (1 - wraps), phase ^ wraps


@gluon.jit
def work_list(lens_ptr, num_seqs, TILE: gl.constexpr, BLOCK_SEQS: gl.constexpr, layout: gl.constexpr):
    """The sequences: number, length, tiles, and where those end in the list; and this program's share of it."""
    seqs = gl.arange(0, BLOCK_SEQS, layout=layout)
    lens = gl.load(lens_ptr + seqs, mask=seqs < num_seqs, other=0)
    seq_tiles = (lens + TILE - 1) // TILE
    ends = gl.associative_scan(seq_tiles, 0, _add)
    tiles = gl.sum(seq_tiles, 0)
    share = tiles_per_program(tiles, gl.max(seq_tiles, 0), gl.num_programs(0))
    first = gl.minimum(gl.program_id(0) * share, tiles)
    return seqs, lens, seq_tiles, ends, first, gl.minimum(first + share, tiles)


@gluon.jit
def segment(seqs, lens, seq_tiles, ends, tile):
    """The sequence that a tile of the list belongs to, the place of its first tile, and its length in tokens."""
    seq = gl.sum((ends <= tile).to(gl.int32), 0)
    seq_start = gl.sum(gl.where(seqs < seq, seq_tiles, 0), 0)
    length = gl.sum(gl.where(seqs == seq, lens, 0), 0)
    return seq, seq_start, length


@gluon.jit
def ring_barriers(SLOTS: gl.constexpr, READERS: gl.constexpr):
    """For each place of a ring a barrier for "is full", and one for "its readers are done"."""
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    return full, empty
