"""MLflow that is down for a while is set up and described later, and one run goes through it all; run ids."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import wandb
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import MLflowCallback, WandbCallback

from ic_train.tracking import MLFLOW_RUN_FILE, WANDB_RUN_FILE, GuardedTracker, prepare_trackers

NOWHERE = "http://127.0.0.1:9"
FACTS = {"git_commit": "abc"}


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Trackers leave variables behind, and W&B what it read from them."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_")):
            del os.environ[name]
    os.environ |= {"DO_NOT_TRACK": "true", "WANDB_SILENT": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    # a busy machine starts its service slowly
    os.environ["WANDB__SERVICE_WAIT"] = "180"
    yield
    wandb.teardown()
    mlflow.end_run()
    os.environ.clear()
    os.environ.update(before)


class Trained:
    """The events of a run."""

    def __init__(self, output: Path, name: str, *, pause_s: float = 0.0) -> None:
        self.args = TrainingArguments(output_dir=str(output), report_to=[name], use_cpu=True)
        output.mkdir(exist_ok=True)
        prepare_trackers(self.args)
        callback = {"wandb": WandbCallback, "mlflow": MLflowCallback}[name]()
        self.guarded = GuardedTracker(callback, FACTS, pause_s=pause_s)
        self.state = TrainerState()

    def send(self, event: str, **values: object) -> None:
        getattr(self.guarded, event)(self.args, self.state, TrainerControl(), model=None, **values)


def test_mlflow_that_is_down_at_the_start_gets_description_and_resume_later(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/runs.db"
    os.environ["MLFLOW_TRACKING_URI"] = NOWHERE
    run = Trained(tmp_path / "out", "mlflow")
    run.send("on_train_begin")
    assert not (tmp_path / "out" / MLFLOW_RUN_FILE).exists()
    os.environ["MLFLOW_TRACKING_URI"] = store
    run.send("on_log", logs={"loss": 2.5})
    run_id = (tmp_path / "out" / MLFLOW_RUN_FILE).read_text()
    assert mlflow.get_run(run_id).data.tags["ic.git_commit"] == "abc"
    run.send("on_train_end")
    # down again where the resumed run begins
    os.environ["MLFLOW_TRACKING_URI"] = NOWHERE
    resumed = Trained(tmp_path / "out", "mlflow")
    resumed.send("on_train_begin")
    os.environ["MLFLOW_TRACKING_URI"] = store
    resumed.send("on_log", logs={"loss": 2.0})
    active = mlflow.active_run()
    assert active is not None and active.info.run_id == run_id


def test_a_run_is_closed_in_a_pause_and_a_description_does_not_cost_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/runs.db"
    run = Trained(tmp_path / "out", "mlflow", pause_s=1000.0)
    with monkeypatch.context() as patched:
        patched.setattr(mlflow, "set_tags", lambda tags: 1 / 0)
        run.send("on_train_begin")
    run_id = (tmp_path / "out" / MLFLOW_RUN_FILE).read_text()
    run.send("on_log", logs={"loss": 2.5})
    with monkeypatch.context() as patched:
        patched.setattr(mlflow, "log_metrics", lambda **_: 1 / 0)
        run.send("on_log", logs={"loss": 2.0})
    run.send("on_train_end")
    assert mlflow.active_run() is None
    mlflow.flush_async_logging()
    assert mlflow.get_run(run_id).data.metrics["loss"] == 2.5


def test_wandbs_run_is_the_folders_and_not_its_names(tmp_path: Path) -> None:
    def run_id(output: Path, report_to: str = "wandb") -> str | None:
        os.environ.pop("WANDB_RUN_ID", None)
        prepare_trackers(TrainingArguments(output_dir=str(output), report_to=[report_to], use_cpu=True))
        return os.environ.get("WANDB_RUN_ID")

    output = tmp_path / "try"
    first = run_id(output)
    assert first and run_id(output) == first
    shutil.rmtree(output)
    assert run_id(output) != first
    # W&B's files without ours: begun when the path was the name
    (tmp_path / "old" / "wandb").mkdir(parents=True)
    old = run_id(tmp_path / "old")
    (tmp_path / "old" / WANDB_RUN_FILE).unlink()
    assert run_id(tmp_path / "old") == old
    assert run_id(tmp_path / "untracked", "none") is None and not (tmp_path / "untracked").exists()
