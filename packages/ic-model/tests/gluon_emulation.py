"""Run Gluon kernels on the CPU, one program after the other, in NumPy: Triton's interpreter does not know Gluon.

The kernel's own Python code runs, with `gl` replaced by what is needed of it so far. Layouts mean nothing here:
what this checks is the arithmetic, the masks and the addresses. It is an error to reach outside of a tensor's
memory, or to store two values in one place.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

TYPES = {name: np.dtype(name) for name in ("int32", "int64", "float16", "float32")}


class Tensor(np.ndarray):
    """An array with a tensor's methods; scalars are arrays of no dimensions."""

    def __array_wrap__(self, array, context=None, return_scalar=False):
        return np.asarray(array).view(Tensor)

    def to(self, dtype):
        return self.astype(dtype)

    def broadcast_to(self, shape):
        return np.broadcast_to(self, shape).view(Tensor)


def tensor(value: Any, dtype: Any = None) -> Tensor:
    return np.asarray(value, dtype).view(Tensor)


class Pointer:
    """Elements of a tensor's memory."""

    def __init__(self, memory: np.ndarray, offset: Any = 0):
        self.memory, self.offset = memory, np.asarray(offset, np.int64)
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset):
        return Pointer(self.memory, self.offset + np.asarray(offset, np.int64))

    def to(self, dtype, bitcast):
        ratio = dtype.itemsize // self.memory.itemsize
        assert bitcast and not (self.offset % ratio).any(), "not aligned"
        return Pointer(self.memory.view(dtype), self.offset // ratio)


class Shared:
    """Shared memory, NaN before the first store."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape = array, array.shape

    def store(self, value):
        assert value.shape == self.shape and value.dtype == self.array.dtype
        self.array[...] = value

    def load(self, layout):
        return tensor(self.array.copy())

    def permute(self, order):
        return Shared(self.array.transpose(order))


def load(pointer, mask=None, other=None):
    mask = np.broadcast_to(True if mask is None else mask, pointer.offset.shape)
    assert pointer.offset.shape == mask.shape
    safe = np.where(mask, pointer.offset, 0)
    if (safe < 0).any():
        raise IndexError(f"address {safe.min()}")
    values = pointer.memory[safe]
    return tensor(values if other is None else np.where(mask, values, pointer.memory.dtype.type(other)))


def store(pointer, value, mask=None):
    offset, value, mask = np.broadcast_arrays(pointer.offset, value, True if mask is None else mask)
    assert value.dtype == pointer.memory.dtype
    if (offset[mask] < 0).any():
        raise IndexError(f"address {offset[mask].min()}")
    assert len(set(offset[mask].tolist())) == mask.sum(), "two values for one place"
    pointer.memory[offset[mask]] = value[mask]


def poisoned(dtype, shape, layout):
    return Shared(np.full(shape, np.nan if dtype.kind == "f" else 0x7E007E00, dtype))


def as_halves(buffer, shape, layout):
    return Shared(buffer.array.view(np.float16).reshape(shape))


def mma(a, b, acc):
    return tensor(acc + np.matmul(a.astype(np.float32), b.astype(np.float32)))


GL = types.SimpleNamespace(
    **TYPES,
    arange=lambda start, end, layout: tensor(np.arange(start, end, dtype=np.int32)),
    zeros=lambda shape, dtype, layout: tensor(np.zeros(shape, dtype)),
    full=lambda shape, value, dtype, layout: tensor(np.full(shape, value, dtype)),
    load=load,
    store=store,
    where=lambda *args: tensor(np.where(*args)),
    sum=lambda value, axis: tensor(np.sum(value, axis, dtype=value.dtype)),
    max=lambda value, axis: tensor(np.max(value, axis)),
    maximum=lambda a, b: tensor(np.maximum(a, b)),
    minimum=lambda a, b: tensor(np.minimum(a, b)),
    exp2=lambda value: tensor(np.exp2(value)),
    log2=lambda value: tensor(np.log2(value)),
    expand_dims=lambda value, axis: tensor(np.expand_dims(value, axis)),
    associative_scan=lambda value, axis, function: tensor(np.cumsum(value, axis, dtype=value.dtype)),
    convert_layout=lambda value, layout, assert_trivial: value,
    allocate_shared_memory=poisoned,
    pointer_type=lambda dtype: dtype,
    NVMMADistributedLayout=lambda *args: None,
    DotOperandLayout=lambda *args: None,
    SliceLayout=lambda *args: None,
    BlockedLayout=lambda *args: None,
)


class Emulated:
    """Stands in for a Gluon kernel: launched like it, with tensors on the CPU."""

    def __init__(self, kernel: Any, replaced: dict[str, Callable]):
        self.spaces: dict[int, dict[str, Any]] = {}
        self.kernel = types.FunctionType(kernel.fn.__code__, self._space(kernel.fn.__globals__, replaced))

    def _space(self, names: dict[str, Any], replaced: dict[str, Callable]) -> dict[str, Any]:
        """What a module's functions find instead of its names; those of other modules find theirs."""
        if id(names) in self.spaces:
            return self.spaces[id(names)]
        space = self.spaces[id(names)] = {"gl": GL}
        for name, value in names.items():
            if name in space or name.startswith("__"):
                continue
            function = getattr(value, "fn", None)
            if name in replaced:
                value = replaced[name]
            elif isinstance(function, types.FunctionType):
                own = self._space(function.__globals__, replaced)
                value = types.FunctionType(function.__code__, own, name, function.__defaults__)
            space[name] = getattr(value, "value", value)
        return space

    def __getitem__(self, grid):
        def launch(*args, num_warps, **constants):
            pointers = [self._argument(value) for value in args]
            for index in itertools.product(*map(range, grid)):
                GL.program_id = lambda axis, index=index: tensor(index[axis], np.int32)
                GL.num_programs = lambda axis: tensor(grid[axis], np.int32)
                with np.errstate(all="ignore"):
                    self.kernel(*pointers, **constants)

        return launch

    @staticmethod
    def _argument(value):
        if not isinstance(value, torch.Tensor):
            return tensor(value, np.float32 if isinstance(value, float) else np.int32)
        # the memory behind the tensor, from its first element on
        size = value.untyped_storage().nbytes() // value.element_size() - value.storage_offset()
        return Pointer(value.as_strided((size,), (1,)).numpy())
