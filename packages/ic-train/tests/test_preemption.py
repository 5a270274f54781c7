"""Told to end, a run does so between two batches of a step, and goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import training_runs
from training_runs import PATIENT, Run, launch_all, make_toys, steps_of

from ic_train.checkpoints.folders import RESUMED_FILE
from ic_train.preemption import REQUEUE_FILE

pytestmark = PATIENT

# ranks 0 and 1, each with 6 batches a step
LONG = ["--gradient_accumulation_steps", "6", "--max_steps", "4", "--save_steps", "100"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    toys = make_toys(tmp_path_factory.mktemp("preemption"))
    folder = toys["runs"]
    branch = ["--resume", str(folder / "told" / "checkpoint-2"), "--save_total_limit", "1"]
    launches: list[tuple[int | str, list[Run]]] = [
        (
            2,
            [
                Run("whole", LONG),
                Run("early", LONG, {"TEST_SIGNAL": "0 0 1"}),
                Run("full", LONG, {"TEST_SIGNAL": "0 1 1", "TEST_FULL": "1"}),
                Run("told", LONG, {"TEST_SIGNAL": "1 2 2"}),
            ],
        ),
        (2, [Run("told", [*LONG, "--resume", "auto"]), Run("told", [*LONG, *branch])]),
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training_runs, "WORKER", Path(__file__).parent / "signalled_worker.py")
        errors = launch_all(toys, launches)
    return {
        "errors": errors,
        "folder": folder,
        "log": (folder / "plan-whole.log").read_text(errors="replace"),
    }


def test_a_run_ends_in_the_middle_of_a_step_and_resumes_exactly(runs: dict[str, Any]) -> None:
    whole, told = runs["folder"] / "whole", runs["folder"] / "told"
    assert not {"whole", "told"} & runs["errors"].keys(), runs["errors"]
    # one rank got the signal, in the third of six batches of the third step
    for word in ("SIGUSR1", "signal"):
        assert f"\n{word}: saving after step 2 and ending" in runs["log"]
    assert [step["step"] for step in steps_of(told)] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm", "learning_rate"):
        assert [step[name] for step in steps_of(told)] == [step[name] for step in steps_of(whole)], name
    for rank in range(2):
        ends = [torch.load(run / "checkpoint-4" / f"rng_{rank}.pt") for run in (whole, told)]
        # the batches before the signal have drawn numbers, too
        assert torch.equal(ends[0]["cpu"], ends[1]["cpu"])
    assert not (told / REQUEUE_FILE).exists()


def test_the_first_step_of_a_start_is_done_in_any_case(runs: dict[str, Any]) -> None:
    early = runs["folder"] / "early"
    assert "early" not in runs["errors"], runs["errors"].get("early")
    assert [folder.name for folder in early.glob("checkpoint-*")] == ["checkpoint-1"]
    assert (early / REQUEUE_FILE).read_text() == "SIGUSR1\n"


def test_a_run_that_cannot_save_does_not_ask_to_go_on_and_each_rank_says_why(runs: dict[str, Any]) -> None:
    full = runs["folder"] / "full"
    assert runs["errors"]["full"].startswith("error: step 1 was not saved when SIGUSR1 came; make room in ")
    assert not (full / REQUEUE_FILE).exists() and not list(full.glob("checkpoint-*"))
    assert "rank 0: checkpoint-1 was not saved: another rank says why" in runs["log"]
    assert "rank 1: checkpoint-1 was not saved: [Errno 28] No space left on device" in runs["log"]


def test_what_a_run_did_not_go_on_from_is_set_aside(runs: dict[str, Any]) -> None:
    told = runs["folder"] / "told"
    # the third start went back to 2, and kept one of its own
    found = sorted(folder.name for folder in told.glob("*checkpoint-*"))
    assert found == ["abandoned-checkpoint-4", "checkpoint-4"]
    assert (told / RESUMED_FILE).read_text().strip() == str(told / "checkpoint-2")
