"""Which implementation runs, what happens when it cannot, and what is said about it."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.compiler.errors import CompilationError
from triton.runtime.errors import InterpreterError, OutOfResources

from ic_model.ops import dispatch as dispatching
from ic_model.ops.dispatch import Implementation, dispatch, kernel_refuses


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """What failed in another test is not remembered here."""
    monkeypatch.setattr(dispatching, "_failed", set())
    monkeypatch.setattr(dispatching, "_warned", set())


def implementation(name, *, refusal=None, error=None):
    """An implementation that counts its calls and returns its name with what it was called with."""

    def function(*args, **kwargs):
        function.calls += 1
        if error is not None:
            raise error
        return name, args, kwargs

    function.calls = 0
    return Implementation(name, lambda: function, lambda *args, **kwargs: refusal)


REFERENCE = implementation("reference")


def names(*implementations, asked=None, args=(), **kwargs):
    return dispatch("op", [*implementations, REFERENCE], asked, *args, **kwargs)[0]


def test_first_that_does_not_refuse():
    fast, slow = implementation("fast", refusal="too small"), implementation("slow")
    assert names(fast, slow) == "slow"
    assert names(fast) == "reference"
    assert fast.load().calls == 0


def test_arguments_reach_refusal_and_function():
    seen = []
    picky = Implementation(
        "picky", lambda: lambda x, *, op, scale: x * scale, lambda *a, **k: seen.append((a, k))
    )
    assert dispatch("op", [picky, REFERENCE], None, 3, op=1, scale=2) == 6
    assert seen == [((3,), {"op": 1, "scale": 2})]


def test_by_name():
    fast, slow = implementation("fast"), implementation("slow")
    assert names(fast, slow, asked="slow") == "slow"
    assert names(fast, slow, asked="reference") == "reference"
    with pytest.raises(
        ValueError, match="implementation is 'fats'; op accepts 'fast', 'slow', 'reference' or None"
    ):
        names(fast, slow, asked="fats")


def test_by_name_refused():
    with pytest.raises(ValueError, match="implementation is 'fast', which cannot compute this op: too small"):
        names(implementation("fast", refusal="too small"), asked="fast")


@pytest.mark.parametrize("error", [OutOfResources(81920, 65536, "shared memory"), ValueError("x")], ids=str)
def test_by_name_errors_propagate(error):
    with pytest.raises(type(error)):
        names(implementation("fast", error=error), asked="fast")


CANNOT_RUN = [
    OutOfResources(81920, 65536, "shared memory"),
    CompilationError("kernel", None, "no such thing"),
    ImportError("No module named 'triton.experimental'"),
    RuntimeError("Triton Error [CUDA]: invalid argument"),
    RuntimeError("PassManager::run failed"),
    RuntimeError("0 active drivers ([]). There should only be one."),
]


@pytest.mark.parametrize("error", CANNOT_RUN, ids=lambda error: str(error).split()[0])
def test_next_is_taken_and_said_once(error, caplog):
    fast = implementation("fast", error=error)
    with caplog.at_level(logging.WARNING, "ic_model.ops"):
        assert names(fast, implementation("slow")) == "slow"
        assert names(fast, implementation("slow")) == "slow"
    (record,) = caplog.records
    assert record.name == "ic_model.ops" and "\n" not in record.getMessage()
    assert record.getMessage().startswith(
        f"op: fast does not run here, taking the next implementation: {type(error).__name__}: "
    )


def test_what_failed_is_not_tried_again_for_the_same_kind(caplog):
    fast = implementation("fast", error=OutOfResources(81920, 65536, "shared memory"))
    for tokens in (5, 7):
        assert names(fast, args=(torch.zeros(tokens, 576),), scale=0.5 * tokens) == "reference"
    assert fast.load().calls == 1
    assert names(fast, args=(torch.zeros(5, 320),), scale=0.5) == "reference"
    assert fast.load().calls == 2
    # another shape, the same reason: not said again
    assert len(caplog.records) == 1


def test_numbers_of_sequences_tokens_and_pages_are_no_other_kind():
    fast = implementation("fast", error=OutOfResources(81920, 65536, "shared memory"))
    for sequences, pages in ((1, 9), (2, 5), (128, 700)):
        tables = {
            "block_table": torch.zeros(sequences, pages, dtype=torch.int32),
            "seq_lens": torch.zeros(sequences, dtype=torch.int32),
            "slot_mapping": torch.zeros(sequences, dtype=torch.int64),
        }
        assert names(fast, args=(torch.zeros(sequences, 576),), **tables) == "reference"
    assert fast.load().calls == 1
    assert len(dispatching._failed) == 1


@pytest.fixture
def cuda(monkeypatch):
    """Tensors that say that they are on a GPU, `cuda(index, *shape)`; GPU 0 is the current one."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with FakeTensorMode():
        yield lambda index, *shape: torch.empty(shape, device=f"cuda:{index}")


@pytest.mark.parametrize("asked", [None, "fast"])
def test_runs_on_the_device_of_the_tensors(cuda, monkeypatch, asked):
    entered = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", Device)
    names(implementation("fast"), asked=asked, args=(torch.zeros(3), None, cuda(0, 2, 3)))
    names(implementation("fast"), asked=asked, args=(torch.zeros(3),))
    assert not entered, "the device is the current one, or there is none"
    looking = Implementation("fast", lambda: lambda *_, **__: entered[:], lambda *_, **__: None)
    inside = dispatch("op", [looking, REFERENCE], asked, None, cache=cuda(1, 2, 3))
    assert inside == [torch.device("cuda", 1)]
    assert entered == [*inside, "left"]


@pytest.mark.gpu
def test_the_current_device_stays_what_it_was():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    where = Implementation("fast", lambda: lambda _: torch.cuda.current_device(), lambda _: None)
    assert dispatch("op", [where, REFERENCE], None, torch.zeros(3, device="cuda:1")) == 1
    assert torch.cuda.current_device() == 0


def test_the_reference_on_a_gpu_is_said_once(cuda, caplog):
    refusing = [implementation("fast", refusal="too small"), implementation("slow", refusal="too odd")]
    for tokens in (5, 7):
        assert names(*refusing, args=(cuda(0, tokens, 576),)) == "reference"
    (record,) = caplog.records
    assert record.getMessage() == (
        "op: no kernel takes these tensors, taking the slow reference: fast: too small; slow: too odd"
    )
    assert names(*refusing, args=(cuda(0, 5, 320),)) == "reference"
    assert len(caplog.records) == 2


def test_the_reference_is_not_remarked_upon_elsewhere(cuda, caplog):
    refusing = implementation("fast", refusal="too small")
    assert names(refusing, args=(torch.zeros(5, 576),)) == "reference"
    assert names(refusing, asked="reference", args=(cuda(0, 5, 576),)) == "reference"
    assert not caplog.records


@pytest.mark.parametrize(
    "error",
    [
        ValueError("page_tokens is 3"),
        AssertionError(),
        InterpreterError("the kernel is wrong"),
        RuntimeError("The size of tensor a (3) must match"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[-14:]}",
)
def test_other_errors_propagate(error, caplog):
    with pytest.raises(type(error)):
        names(implementation("fast", error=error))
    assert not caplog.records


def test_errors_of_the_reference_propagate():
    broken = implementation("reference", error=OutOfResources(2, 1, "shared memory"))
    with pytest.raises(OutOfResources):
        dispatch("op", [broken], None)


def test_kernels_refuse_tensors_out_of_reach(monkeypatch):
    tensor = torch.zeros(3)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert kernel_refuses(tensor) == "the tensors are on the CPU"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernel_refuses(tensor, tensor) is None
    assert kernel_refuses(tensor, tensor.to("meta")) == "the tensors are on cpu, meta"
    assert kernel_refuses(tensor.to("meta")) == "the tensors are on meta, which is no NVIDIA GPU"
    monkeypatch.setattr(dispatching, "_has_triton", lambda: False)
    assert kernel_refuses(tensor) == "Triton is not installed"


class OnCuda:
    """As much of a CUDA tensor as is looked at."""

    def __init__(self, dtype):
        self.device, self.dtype = torch.device("cuda", 0), dtype


@pytest.mark.parametrize(
    ("capability", "dtype", "refusal"),
    [
        (70, torch.float16, "compute capability 70 is below 75"),
        (75, torch.float16, None),
        (75, torch.bfloat16, "compute capability 75 has no bfloat16"),
        (80, torch.bfloat16, None),
    ],
)
def test_kernels_refuse_old_chips(capability, dtype, refusal, monkeypatch):
    monkeypatch.setattr(dispatching, "_capability", lambda device: capability)
    assert kernel_refuses(OnCuda(dtype)) == refusal


def test_everything_but_the_kernels_imports_without_triton():
    folders = sorted(path.parent for path in Path(dispatching.__file__).parent.glob("*/reference.py"))
    modules = ["ic_model", "ic_model.ops.launch", "ic_model.ops.dispatch", "ic_model.ops.aot"]
    modules += [f"ic_model.ops.{folder.name}" for folder in folders]
    program = f"import sys; sys.modules['triton'] = None; import {', '.join(modules)}"
    subprocess.run([sys.executable, "-c", program], check=True)
