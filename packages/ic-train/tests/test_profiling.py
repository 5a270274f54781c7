"""The table of a profile, and a profiled run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_runs import Run, launch_all, make_toys, steps_of

from ic_train.profiling import TABLE_FILE, TRACE_FILE, StepProfile, table


def test_most_time_comes_first_and_shares_are_of_the_kernels() -> None:
    lines = table([("small", 4, 500.0), ("none", 2, 0.0), ("large", 2, 1500.0)], 2, 0.003).splitlines()
    assert lines[0] == "1.0 ms of kernels in steps of 1.5 ms; mean of 2"
    assert [line.split() for line in lines[2:]] == [
        ["0.750", "75.0%", "1.0", "large"],
        ["0.250", "25.0%", "2.0", "small"],
    ]


@pytest.mark.parametrize(("done", "said"), [(5, "mean of 2"), (9, "mean of 3"), (3, ""), (1, "")])
def test_a_run_that_ends_early_has_the_profile_of_what_it_did(tmp_path: Path, done: int, said: str) -> None:
    profile = StepProfile(3)
    run: Any = {
        "args": SimpleNamespace(device=torch.device("cpu"), output_dir=str(tmp_path)),
        "state": None,
        "control": None,
    }
    profile.on_train_begin(**run)
    for _ in range(done):
        with torch.profiler.record_function("a name that holds it"):
            torch.ones(8, 8) @ torch.ones(8, 8)
        profile.on_step_end(**run)
    profile.on_train_end(**run)
    assert (tmp_path / TABLE_FILE).exists() == (tmp_path / TRACE_FILE).exists() == bool(said)
    if said:
        lines = (tmp_path / TABLE_FILE).read_text().splitlines()
        assert lines[0].endswith(said)
        (products,) = [line.split() for line in lines if line.endswith("aten::mm")]
        assert products[2] == "1.0"
        assert not any("ProfilerStep" in line or "a name that" in line for line in lines)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    toys = make_toys(tmp_path_factory.mktemp("profile"))
    profiled = ["--max_steps", "5", "--profile_steps", "2", "--save_strategy", "no"]
    # fewer events to write down
    profiled += ["--gradient_accumulation_steps", "1"]
    short = ["--max_steps", "4", "--profile_steps", "2"]
    runs = [Run("profiled", profiled), Run("short", short), Run("negative", ["--profile_steps", "-1"])]
    errors = launch_all(toys, [(1, runs)])
    assert "profile_steps is 2, which needs max_steps of 5 or more; it is 4" in errors["short"]
    assert "profile_steps is -1; it must be at least 0" in errors["negative"]
    assert errors.keys() == {"short", "negative"}, errors
    return toys["runs"]


def test_a_run_leaves_its_profile(runs: Path) -> None:
    lines = (runs / "profiled" / TABLE_FILE).read_text().splitlines()
    assert lines[0].endswith("mean of 2")
    products = next(line.split() for line in lines if line.endswith("aten::mm"))
    # forward and backward of every projection; the same number in both steps
    assert float(products[2]) > 20 and float(products[2]).is_integer()
    with gzip.open(runs / "profiled" / TRACE_FILE) as file:
        assert any(event.get("name") == "aten::mm" for event in json.load(file)["traceEvents"])
    assert len(steps_of(runs / "profiled")) == 5
