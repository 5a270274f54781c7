"""Ending in time: a signal before the time limit becomes a checkpoint, a marker file and a normal end.

SLURM sends SIGUSR1 (`#SBATCH --signal=USR1@300`). Every rank notes it; after the batch that it came in all of them
agree, save, and stop. A step of many accumulated batches may take longer than the time that is left, and is given
up: what is saved is the step before, and the resumed run does this one again. `requeue` in the output folder tells
the batch script to submit the job again. No rank exits with an error while others may still be saving: `srun`
would kill them.
"""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ic_train.distributed import any_process, rank

if TYPE_CHECKING:
    from ic_train.trainers.restartable import Restartable

REQUEUE_FILE = "requeue"
SIGNALS = (signal.SIGUSR1,)
logger = logging.getLogger(__name__)


class StopOnSignal(TrainerCallback):
    """Saves and stops after the batch in which a signal came to any rank.

    The run's first step is always done: one that is given up at every start would be begun for ever.

    Args:
        group: process group for tensors on the CPU; None for one process alone.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.stopped = False
        self._received: str | None = None
        self._first_step = 0
        self._before: dict[signal.Signals, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen, and forget the marker of the run before."""
        self._first_step = state.global_step
        if state.is_world_process_zero:
            (Path(args.output_dir) / REQUEUE_FILE).unlink(missing_ok=True)
        # Python hands signals to the main thread only
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._note) for one in SIGNALS}

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Agree among the ranks, between two accumulated batches."""
        if state.global_step > self._first_step:
            self._stop_if_told(state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Agree among the ranks."""
        self._stop_if_told(state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop listening."""
        for one, handler in self._before.items():
            signal.signal(one, handler)
        self._before = {}

    def hand_over(self, trainer: Restartable) -> None:
        """Ask the batch script for another start, where the run is saved; all ranks call it after training.

        Args:
            trainer: that was stopped.

        Raises:
            ValueError: the last step is not saved; another start could lose the same work again.
        """
        step, output = trainer.state.global_step, trainer.args.output_dir
        if trainer.writer.saved_step != step:
            raise ValueError(
                f"step {step} was not saved when {self._received or 'a signal'} came; make room in {output}, and "
                "start again with `--resume auto`: it goes on from the last whole checkpoint"
            )
        if rank() == 0:
            self.mark(output)

    def mark(self, output_dir: str | Path) -> None:
        """Write the marker; after the checkpoint is whole."""
        (Path(output_dir) / REQUEUE_FILE).write_text(f"{self._received or 'signal'}\n")

    def _stop_if_told(self, state: TrainerState, control: TrainerControl) -> None:
        if any_process(self._received is not None, self.group):
            self.stopped = state.global_step < state.max_steps
            control.should_save = True
            control.should_training_stop = True
            logger.warning(
                "%s: saving after step %d and ending", self._received or "signal", state.global_step
            )

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name
