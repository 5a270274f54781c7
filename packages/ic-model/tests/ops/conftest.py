"""Tests of the ops run in three tiers, and one test body serves two of them.

- interpreter: Triton's interpreter on the CPU, `TRITON_INTERPRET=1` set before Triton is imported.
- gpu: on a CUDA device, with `-m gpu`.
- aot: compiled ahead of time for every chip, with `-m aot`; needs no GPU.

A test that takes the fixture `device` exists once for each of the first two: with "cpu", deselected
unless the interpreter is on, and with "cuda", marked `gpu`. One that takes `dtype` as well exists for each
dtype of the tier. A test that takes no `device` and still needs the interpreter is marked `interpreter`.

New memory is NaN, or the largest integer, in all of them: `poisoned_memory` in the conftest above.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch

from ic_model.ops.dispatch import interpreting

HERE = Path(__file__).parent

# the interpreter computes bfloat16 dots wrongly, and has no float8
DTYPES = {
    "cpu": (torch.float32, torch.float16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}
MARKS = {"cpu": pytest.mark.interpreter, "cuda": pytest.mark.gpu}


def pytest_configure(config: pytest.Config) -> None:
    """Name the marks where the repository's pytest.ini is not in use, as on a machine with a GPU."""
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")
    config.addinivalue_line("markers", "interpreter: needs TRITON_INTERPRET=1")
    config.addinivalue_line("markers", "aot: compiles ahead of time")


def pytest_report_header() -> str:
    """Which Triton the tests see: the tiers run on more than one."""
    return f"triton: {metadata.version('triton')}{', interpreted' if interpreting() else ''}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make the tiers' variants of a test, of `device` alone or with `dtype`, unless the test names its own."""
    named = {
        name.strip()
        for mark in metafunc.definition.iter_markers("parametrize")
        for name in (mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0])
    }
    if "device" not in metafunc.fixturenames or "device" in named:
        return
    if "dtype" in metafunc.fixturenames and "dtype" not in named:
        pairs = [
            pytest.param(
                device, dtype, marks=MARKS[device], id=f"{device}-{str(dtype).removeprefix('torch.')}"
            )
            for device, dtypes in DTYPES.items()
            for dtype in dtypes
        ]
        metafunc.parametrize(("device", "dtype"), pairs)
    else:
        metafunc.parametrize("device", [pytest.param(name, marks=MARKS[name], id=name) for name in DTYPES])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what belongs to another tier; a skip would look like a test that ran."""
    interpreter = interpreting()

    def belongs(item: pytest.Item) -> bool:
        if HERE not in item.path.parents:
            return True
        if item.get_closest_marker("interpreter"):
            return interpreter
        # interpreted functions cannot be compiled
        return not (interpreter and item.get_closest_marker("aot"))

    others = [item for item in items if not belongs(item)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if belongs(item)]


@pytest.fixture
def dtypes(device: str) -> tuple[torch.dtype, ...]:
    """The dtypes of the tier: float32 and float16, and bfloat16 on a GPU."""
    return DTYPES[device]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers whatever ran before it."""
    torch.manual_seed(0)
