"""Experiment trackers behind `report_to`: Weights & Biases, MLflow, TensorBoard, or none.

transformers' own callbacks talk to them. Here they get what a run has to be found again by, the same run on a
resume, and a guard: a tracker that cannot be reached is logged, and training goes on. `metrics.jsonl` in the
output folder has every line whatever the trackers do.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import MLflowCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler

METRICS_FILE, MLFLOW_RUN_FILE, WANDB_RUN_FILE = "metrics.jsonl", "mlflow_run_id", "wandb_run_id"
# a tracker that failed is left alone for so long: each try may wait for a timeout
PAUSE_S = 120.0
# their own defaults retry for minutes, in which a GPU would idle
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "WANDB_INIT_TIMEOUT": "30",
    "WANDB_FINISH_TIMEOUT": "60",
    # checks for packages and code, which has nothing to do with a training run
    "WANDB_DISABLE_CODE": "true",
}
logger = logging.getLogger(__name__)


class LocalMetrics(TrainerCallback):
    """Appends every line of the log to `metrics.jsonl`."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append; a full disk is logged and training goes on."""
        if not state.is_world_process_zero:
            return
        line = {"step": state.global_step, "unix_s": round(time.time(), 1), **(logs or {})}
        try:
            with (Path(args.output_dir) / METRICS_FILE).open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            logger.error("%s was not written: %s", METRICS_FILE, error)


class GuardedTracker(TrainerCallback):
    """A tracker's callback whose failures do not end the run.

    Args:
        tracker: the callback.
        facts: what the run is to be found again by.
        pause_s: how long a tracker that failed is left alone.
    """

    def __init__(self, tracker: TrainerCallback, facts: dict[str, Any], *, pause_s: float = PAUSE_S) -> None:
        self.tracker = tracker
        self.facts = facts
        self.pause_s = pause_s
        self._again_at = self._describe_again_at = 0.0
        self._described = False
        self._mlflow_run_id = os.environ.get("MLFLOW_RUN_ID")

    @property
    def name(self) -> str:
        """The tracker's name, for messages."""
        return type(self.tracker).__name__.removesuffix("Callback")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the tracker up and describe the run."""
        if self._try("on_train_begin", args, state, control, **kwargs):
            self._describe(args, state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Send a line of the log, and the run's description if the tracker has not had it."""
        if self._try("on_log", args, state, control, **kwargs):
            self._describe(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the run, in a pause, too: it would stay open for good."""
        self._again_at = 0.0
        self._try("on_train_end", args, state, control, **kwargs)

    def _try(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> bool:
        """Whether the tracker took the event."""
        if time.monotonic() < self._again_at:
            return False
        try:
            getattr(self.tracker, event)(args, state, control, **kwargs)
        except Exception as error:
            # each tracker has its own kinds, and none is worth a run
            self._again_at = time.monotonic() + self.pause_s
            self._keep_run_id()
            reason = str(error).strip().splitlines() or [""]
            logger.error(
                "%s cannot be reached: %s: %s. Training goes on without it, trying again after %.0f s; %s has "
                "every line",
                *(self.name, type(error).__name__, reason[0], self.pause_s, METRICS_FILE),
            )
            return False
        return True

    def _keep_run_id(self) -> None:
        """MLflow removes the variable before it has found the run."""
        if (
            isinstance(self.tracker, MLflowCallback)
            and self._mlflow_run_id
            and import_module("mlflow").active_run() is None
        ):
            os.environ["MLFLOW_RUN_ID"] = self._mlflow_run_id

    def _describe(self, args: TrainingArguments, state: TrainerState) -> None:
        """Tell the tracker the facts, once; where it fails, the log's lines go on and this is tried again."""
        if self._described or not state.is_world_process_zero or time.monotonic() < self._describe_again_at:
            return
        try:
            if isinstance(self.tracker, WandbCallback):
                wandb = import_module("wandb")
                wandb.config.update(self.facts, allow_val_change=True)
            elif isinstance(self.tracker, MLflowCallback):
                mlflow = import_module("mlflow")
                run = mlflow.active_run()
                if run is not None:
                    # first: a resume has to find the run whatever else fails
                    (Path(args.output_dir) / MLFLOW_RUN_FILE).write_text(run.info.run_id)
                mlflow.set_tags({f"ic.{name}": str(value)[:5000] for name, value in self.facts.items()})
            self._described = True
        except Exception as error:
            self._describe_again_at = time.monotonic() + self.pause_s
            logger.error("%s did not take the run's description: %s", self.name, error)


def be_impatient() -> None:
    """Set how long trackers try, where the user has not."""
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)


def prepare_trackers(args: TrainingArguments) -> None:
    """Set what the trackers read from the environment, where the user has not.

    A resumed run goes on in the tracker's run of the same output folder.
    """
    output = Path(args.output_dir)
    be_impatient()
    os.environ.setdefault("WANDB_DIR", str(output))
    os.environ.setdefault("WANDB_RESUME", "allow")
    # the first process alone talks to trackers
    if "wandb" in args.report_to and args.process_index == 0 and "WANDB_RUN_ID" not in os.environ:
        os.environ["WANDB_RUN_ID"] = _wandb_run_id(output)
    if (output / MLFLOW_RUN_FILE).is_file():
        os.environ.setdefault("MLFLOW_RUN_ID", (output / MLFLOW_RUN_FILE).read_text().strip())


def _wandb_run_id(output: Path) -> str:
    """W&B's id of the run, which the output folder keeps: a folder made anew under an old name is a new run."""
    file = output / WANDB_RUN_FILE
    run_id = secrets.token_hex(8)
    if (output / "wandb").is_dir():
        # W&B has been here without the file, in a version that made the id of the path
        run_id = hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:16]
    try:
        if file.is_file() and (kept := file.read_text().strip()):
            return kept
        output.mkdir(parents=True, exist_ok=True)
        file.write_text(run_id)
    except OSError as error:
        logger.error("%s was not kept: %s. A resume will be another run of W&B", file, error)
    return run_id


def guard_trackers(handler: CallbackHandler, facts: dict[str, Any]) -> list[GuardedTracker]:
    """Replace the trackers' callbacks of a trainer by guarded ones; those that there are now."""
    guarded = []
    for place, callback in enumerate(handler.callbacks):
        if type(callback).__module__.startswith("transformers.integrations"):
            handler.callbacks[place] = GuardedTracker(callback, facts)
            guarded.append(handler.callbacks[place])
    return guarded
