"""What kernels for Hopper that attend in registers share: the online softmax, zeros behind an end."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

NEG_INF = gl.constexpr(float("-inf"))


@gluon.jit
def weigh(
    scores, largest, total, scale_log2, last_seen, dtype: gl.constexpr, MASKED: gl.constexpr,
):
    """The online softmax of one tile: its weights, laid out as its scores, and the running maximum, sum and decay.

    The decay is that of what came before the tile. Key i of the tile is seen by queries whose `last_seen` is at
    least i, which is read only where MASKED.
    """
    if MASKED:
        KEYS: gl.constexpr = scores.shape[1]
        keys = gl.arange(0, KEYS, layout=gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(keys[None, :] <= last_seen[:, None], scores, NEG_INF)
    new_largest = gl.maximum(largest, gl.max(scores, 1) * scale_log2)
    anchor = new_largest
    if MASKED:
        # a query that has seen nothing yet keeps -inf; subtracting 0 instead avoids inf - inf
        anchor = gl.where(new_largest == NEG_INF, 0.0, new_largest)
    decay = gl.exp2(largest - anchor)
    weights = gl.exp2(scores * scale_log2 - anchor[:, None])
    total = total * decay + gl.sum(weights, 1)
    return weights.to(dtype), new_largest, total, decay


@gluon.jit
def clear_rows(buffer, valid):
    """Zero the rows from `valid` on: what lies there may be NaN, and 0 * NaN is NaN."""
    ROWS: gl.constexpr = buffer.shape[0]
    COLUMNS: gl.constexpr = buffer.shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    for column in gl.static_range(0, COLUMNS, 64):
        part = buffer.slice(column, 64, 1)
        values = part.load(layout)
        part.store(gl.where((rows < valid)[:, None], values, gl.zeros_like(values)))
        # before any barrier that comes after the store: the tensor cores read what other warps wrote
        fence_async_shared()
