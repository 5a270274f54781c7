"""Ending in time: a signal before the time limit becomes a checkpoint, a marker file and a normal end.

SLURM sends SIGUSR1 (`#SBATCH --signal=USR1@300`). Every rank notes it; at the end of a step all of them
agree, save, and stop. `requeue` in the output folder tells the batch script to submit the job again. No rank
exits with an error: `srun` would kill the others, which may still be saving.
"""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ic_train.distributed import any_process

REQUEUE_FILE = "requeue"
SIGNALS = (signal.SIGUSR1,)
logger = logging.getLogger(__name__)


class StopOnSignal(TrainerCallback):
    """Saves and stops at the end of the step in which a signal came to any rank.

    Args:
        group: process group for tensors on the CPU; None for one process alone.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.stopped = False
        self._received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen, and forget the marker of the run before."""
        if state.is_world_process_zero:
            (Path(args.output_dir) / REQUEUE_FILE).unlink(missing_ok=True)
        # Python hands signals to the main thread only
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._note) for one in SIGNALS}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Agree among the ranks."""
        if any_process(self._received is not None, self.group):
            self.stopped = state.global_step < state.max_steps
            control.should_save = True
            control.should_training_stop = True
            logger.warning(
                "%s: saving after step %d and ending", self._received or "signal", state.global_step
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop listening."""
        for one, handler in self._before.items():
            signal.signal(one, handler)
        self._before = {}

    def mark(self, output_dir: str | Path) -> None:
        """Write the marker; after the checkpoint is whole."""
        (Path(output_dir) / REQUEUE_FILE).write_text(f"{self._received or 'signal'}\n")

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name
