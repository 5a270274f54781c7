"""Run the kernels for Hopper on the CPU: their own Python code, a thread for each group of warps.

What this checks is the arithmetic, the masks, the addresses, and who waits for whom; layouts mean nothing here.
What would hang on a GPU fails after a time.
"""

from __future__ import annotations

import threading
import types

import gluon_emulation
import numpy as np
import torch
from gluon_emulation import GL, Emulated, Shared, Tensor, tensor


class Ring(Shared):
    """Shared memory of which a part can be taken, and that the copy engine fills."""

    @property
    def dtype(self):
        return self.array.dtype

    def load(self, layout):
        # NumPy has no fp8: bytes are e4m3
        if self.dtype == np.uint8:
            return tensor(torch.from_numpy(self.array.copy()).view(torch.float8_e4m3fn).float().numpy())
        return super().load(layout)

    def index(self, place):
        return Ring(self.array[int(place)])

    def slice(self, start, length, axis):
        return Ring(np.moveaxis(np.moveaxis(self.array, axis, 0)[start : start + length], 0, axis))

    def permute(self, order):
        return Ring(self.array.transpose(order))


class Barriers:
    """Barriers that complete a phase after so many arrivals; a wait is for the phase of a parity to be over."""

    def __init__(self, number, count):
        self.count, self.left, self.phase = count, [count] * number, [0] * number
        self.changed = threading.Condition()

    def index(self, place):
        return types.SimpleNamespace(owner=self, place=int(place))


def arrive(barrier, count):
    owner, place = barrier.owner, barrier.place
    with owner.changed:
        owner.left[place] -= count
        assert owner.left[place] >= 0, "more arrivals than are waited for"
        if not owner.left[place]:
            owner.left[place] = owner.count
            owner.phase[place] += 1
        owner.changed.notify_all()


def wait(barrier, parity):
    owner, place = barrier.owner, barrier.place
    with owner.changed:
        assert owner.changed.wait_for(lambda: owner.phase[place] % 2 != int(parity), timeout=20), "hangs"


def copy_tile(descriptor, coordinates, barrier, shared):
    """What the copy engine does: zeros outside of the matrix. The barrier completes with the last byte."""
    first_row, first_column = map(int, coordinates)
    assert first_row >= 0 and first_column >= 0
    found = descriptor.base[first_row:, first_column:][: shared.shape[0], : shared.shape[1]]
    shared.array[...] = 0
    shared.array[: found.shape[0], : found.shape[1]] = found
    barrier.owner.bytes[barrier.place] -= shared.array.nbytes
    assert barrier.owner.bytes[barrier.place] >= 0
    if not barrier.owner.bytes[barrier.place]:
        arrive(barrier, 1)


def expect(barrier, size):
    barrier.owner.bytes[barrier.place] = size


def warp_specialize(partitions, warps, registers):
    errors = []

    def run(function, arguments):
        try:
            with np.errstate(all="ignore"):
                function(*arguments)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def product(a, b, acc, use_acc=True, is_async=False):
    left = a.array if isinstance(a, Shared) else a
    return tensor((acc if use_acc else 0) + np.matmul(left.astype(np.float32), b.array.astype(np.float32)))


def barriers(number, count):
    made = Barriers(number, count)
    made.bytes = [0] * number
    return made


class Descriptor:
    """What the kernel asks of a descriptor of the copy engine."""

    def __init__(self, found):
        # NumPy has no fp8
        self.base = (found.base.view(torch.uint8) if found.base.itemsize == 1 else found.base).numpy()
        self.block_shape, self.layout, self.dtype = list(found.block_shape), None, self.base.dtype
        self.block_type = types.SimpleNamespace(nbytes=self.base.itemsize * int(np.prod(self.block_shape)))


adding = threading.Lock()


def atomic_add(pointer, values, sem):
    assert (pointer.offset >= 0).all() and sem == "relaxed"
    with adding:
        np.add.at(pointer.memory, pointer.offset, values)


def scalar(value):
    """Python's numbers become arrays, which have `.to`."""
    return value if isinstance(value, Tensor) else tensor(value)


class EmulatedHopper(Emulated):
    """As `Emulated`, with descriptors, and without cu_seqlens."""

    @staticmethod
    def _argument(value):
        if value is None:
            return None
        if hasattr(value, "block_shape"):
            return Descriptor(value)
        fp8 = isinstance(value, torch.Tensor) and value.dtype == torch.float8_e4m3fn
        return Emulated._argument(value.view(torch.uint8) if fp8 else value)

    def __getitem__(self, grid):
        # limits of registers mean nothing here
        return lambda *args, maxnreg=None, **options: super(EmulatedHopper, self).__getitem__(grid)(
            *args, **options
        )


def patch_language(monkeypatch):
    """Give `gl` what kernels for Hopper use beyond the others."""
    extra = {
        "allocate_shared_memory": lambda dtype, shape, layout: Ring(np.full(shape, np.nan, dtype)),
        "atomic_add": atomic_add,
        "convert_layout": lambda value, layout: value,
        "static_range": range,
        "num_warps": lambda: 4,
        "warp_specialize": warp_specialize,
        "load": load,
        "zeros_like": lambda value: tensor(np.zeros_like(value)),
        "range": range,
        "max": lambda value, axis: tensor(np.max(value, axis)),
        "constexpr": int,
    }
    for name, value in extra.items():
        monkeypatch.setattr(GL, name, value, raising=False)
    monkeypatch.setattr(Tensor, "type", types.SimpleNamespace(layout=None), raising=False)
    monkeypatch.setattr(Tensor, "permute", lambda value, order: value.transpose(order), raising=False)


def load(pointer, mask=None, other=None):
    """As in gluon_emulation.py, or one number."""
    if mask is None and not pointer.offset.ndim:
        return scalar(pointer.memory[int(pointer.offset)])
    return gluon_emulation.load(pointer, mask, other)


def advance(slot, phase, slots):
    return (slot + 1) % slots, phase ^ (slot + 1 == slots)


# what the modules of the kernels call by names of their own
REPLACED = {
    "mbarrier": types.SimpleNamespace(expect=expect, arrive=lambda b, count: arrive(b, count), wait=wait),
    "warpgroup_mma": product,
    "warpgroup_mma_wait": lambda number, deps: deps[0] if len(deps) == 1 else tuple(deps),
    "fence_async_shared": lambda: None,
    "copy_to_shared": lambda shared, pointer, mask: shared.store(load(pointer, mask, 0)),
    "async_copy": types.SimpleNamespace(commit_group=lambda: None, wait_group=lambda number: None),
}
