"""Which implementation runs, what happens when it cannot, and what is said about it."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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
