"""The kernels for Hopper on the CPU: their own Python code, a thread for each group of warps.

What this checks is the arithmetic, the masks, the addresses, and who waits for whom; layouts mean nothing here.
What would hang on a GPU fails after a time.
"""

from __future__ import annotations

import threading
import types

import numpy as np
import pytest
import torch
from gluon_emulation import GL, Emulated, Shared, Tensor, tensor

from ic_model.ops.launch import overriding
from ic_model.ops.mla_prefill import hopper, hopper_backward, hopper_launch, launch, reference
from ic_model.ops.mla_prefill.problem import Problem
from ic_model.testing import assert_close

KEYS, QUERIES, SLOTS = 16, 32, 2


class Ring(Shared):
    """Shared memory of which a part can be taken, and descriptors filled."""

    dtype = np.dtype("float16")

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
        self.base = found.base.numpy()
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
        return Descriptor(value) if hasattr(value, "block_shape") else Emulated._argument(value)


@pytest.fixture
def emulated(monkeypatch):
    """The kernels' stand-ins; the forward one with small blocks."""
    replaced = {
        "_advance": lambda slot, phase, slots: ((slot + 1) % slots, phase ^ (slot + 1 == slots)),
        "_barriers": barriers,
        "_copy_tile": copy_tile,
        "_opaque": lambda number: number,
        "mbarrier": types.SimpleNamespace(expect=expect, arrive=lambda b, count: arrive(b, count), wait=wait),
        "warpgroup_mma": product,
        "warpgroup_mma_wait": lambda number, deps: deps[0] if len(deps) == 1 else tuple(deps),
        "fence_async_shared": lambda: None,
    }
    extra = {
        "allocate_shared_memory": lambda dtype, shape, layout: Ring(np.full(shape, np.nan, dtype)),
        "atomic_add": atomic_add,
        "convert_layout": lambda value, layout: value,
        "static_range": range,
        "num_warps": lambda: 4,
        "warp_specialize": warp_specialize,
        "zeros_like": lambda value: tensor(np.zeros_like(value)),
        "load": lambda pointer: scalar(pointer.memory[int(pointer.offset)]),
        "range": range,
        "max": lambda value, axis: tensor(np.max(value, axis)),
        "constexpr": int,
    }
    for name, value in extra.items():
        monkeypatch.setattr(GL, name, value, raising=False)
    monkeypatch.setattr(Tensor, "type", types.SimpleNamespace(layout=None), raising=False)
    monkeypatch.setattr(Tensor, "permute", lambda value, order: value.transpose(order), raising=False)
    for module, name in ((hopper, "forward_hopper_kernel"), (hopper_backward, "backward_hopper_kernel")):
        monkeypatch.setattr(module, name, EmulatedHopper(getattr(module, name), replaced))
    with overriding(
        "mla_prefill", {"block_queries": QUERIES, "block_keys": KEYS, "slots": SLOTS}, kernel="gluon"
    ):
        yield


@pytest.mark.parametrize(("consumers", "turns"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_packed_sequences(emulated, causal, consumers, turns):
    """Lengths about blocks; more keys than queries, fewer, none; rows of no sequence are NaN and get zeros."""
    lens_q, lens_k, spare = (1, 50, 17, 9, 0, 16), (40, 50, 7, 0, 11, 33), 37
    sizes = ((lens_q, 4, 192), (lens_k, 2, 192), (lens_k, 2, 128))
    q, k, v = (torch.randn(sum(lens) + spare, heads, dim).half() for lens, heads, dim in sizes)
    for part, lens in ((q, lens_q), (k, lens_k), (v, lens_k)):
        part[sum(lens) :] = torch.nan
    starts = [torch.tensor([0, *lens]).cumsum(0).int() for lens in (lens_q, lens_k)]
    options = {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1], "max_seqlen_q": 50, "max_seqlen_k": 50}
    options |= {"softmax_scale": 192**-0.5, "causal": causal, "return_lse": True}
    with overriding("mla_prefill", {"consumers": consumers, "turns": turns}, kernel="gluon"):
        out, lse = launch.mla_prefill(q, k, v, **options, gluon=True)
    expected = reference.mla_prefill(*(part.float() for part in (q, k, v)), **options)
    assert_close(out, expected[0], "fp16_attention")
    assert_close(lse, expected[1], "fp32_attention")


@pytest.mark.parametrize("queries", [37, 20])
def test_dense(emulated, queries):
    q, k, v = (
        torch.randn(2, tokens, 2, dim).half() for tokens, dim in ((queries, 192), (37, 192), (37, 128))
    )
    options = {"softmax_scale": 192**-0.5, "causal": True, "return_lse": True}
    out, lse = launch.mla_prefill_dense(q, k, v, **options, gluon=True)
    expected = reference.mla_prefill_dense(*(part.float() for part in (q, k, v)), **options)
    assert_close(out, expected[0], "fp16_attention")
    assert_close(lse, expected[1], "fp32_attention")


def gradients(q, k, v, d_out, **options):
    """Out, and the gradients of q, k and v."""
    leaves = [part.detach().requires_grad_() for part in (q, k, v)]
    function = launch.mla_prefill if "gluon" in options else reference.mla_prefill
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


@pytest.mark.interpreter
@pytest.mark.parametrize("heads", [(2, 1), (2, 2)], ids=["grouped", "plain"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_backward_of_packed_sequences(emulated, causal, heads):
    """Lengths about 64 queries and 128 keys; more keys than queries, fewer, none; NaN in rows of nobody."""
    lens_q, lens_k, spare = (1, 260, 70, 9, 0, 64, 128), (40, 260, 30, 0, 11, 193, 128), 150
    sizes = (
        (lens_q, heads[0], 192),
        (lens_k, heads[1], 192),
        (lens_k, heads[1], 128),
        (lens_q, heads[0], 128),
    )
    parts = [torch.randn(sum(lens) + spare, count, dim).half() for lens, count, dim in sizes]
    for part, (lens, _, _) in zip(parts, sizes, strict=True):
        part[sum(lens) :] = torch.nan
    starts = [torch.tensor([0, *lens]).cumsum(0).int() for lens in (lens_q, lens_k)]
    options = {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1], "max_seqlen_q": 260, "max_seqlen_k": 260}
    options |= {"softmax_scale": 192**-0.5, "causal": causal}
    found = gradients(*parts, **options, gluon=True)
    used = [part[: sum(lens)].float() for part, (lens, _, _) in zip(parts, sizes, strict=True)]
    expected = gradients(*used, **options)
    for name, actual, wanted in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert_close(actual[: len(wanted)], wanted, "fp16_attention", what=name)
        assert (actual[len(wanted) :] == 0).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("queries", [137, 120])
def test_backward_of_a_dense_batch(emulated, queries):
    parts = [
        torch.randn(2, tokens, 2, dim).half()
        for tokens, dim in ((queries, 192), (137, 192), (137, 128), (queries, 128))
    ]
    options = {"softmax_scale": 192**-0.5, "causal": True}
    problem = Problem(cu_q=None, cu_k=None, gluon=True, **options)
    out, lse = hopper_launch.forward_gluon(*parts[:3], problem)
    found = hopper_launch.backward_gluon(parts[3], *parts[:3], out, lse, problem)
    leaves = [part.float().requires_grad_() for part in parts[:3]]
    expected = torch.autograd.grad(reference.mla_prefill_dense(*leaves, **options), leaves, parts[3].float())
    for name, actual, wanted in zip(("dq", "dk", "dv"), found, expected, strict=True):
        assert_close(actual, wanted, "fp16_attention", what=name)
