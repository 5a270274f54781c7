"""Whole checkpoints in the background, exact resume, and an end where the loss is no number: for any trainer.

transformers' own checkpoints are written while training waits, hold a folder that a crash leaves half written, and
cannot be read by another number of ranks.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ic_train.checkpoints.folders import leave_others
from ic_train.checkpoints.saving import (
    CheckpointWriter,
    load_checkpoint,
    random_states,
    read,
    restore_rng,
)
from ic_train.distributed import rank
from ic_train.trainers.finite import NonFiniteLossError, StopsOnNonFinite


class Restartable(StopsOnNonFinite):
    """Stands before a Trainer in a class's bases; `keep_whole` is called once that one is made."""

    writer: CheckpointWriter
    record: dict[str, Any]
    files: dict[str, str]
    # those that the present step began with, and the steps done by then
    _step_began: tuple[int, dict[str, Any]] | None = None

    def keep_whole(
        self, *, group: Any, writer: CheckpointWriter, record: dict[str, Any], files: dict[str, str]
    ) -> None:
        """Say where checkpoints go.

        Args:
            group: process group for tensors on the CPU, for what the ranks agree on; None for one process alone.
            writer: of checkpoints.
            record: what every checkpoint says of the run.
            files: that every checkpoint has beside the state, by name.
        """
        self.group = group
        self.writer = writer
        self.record = record
        self.files = files

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; what is being saved is whole when this returns, or is among the writer's failed steps.

        Raises:
            NonFiniteLossError: the loss or its gradient became no number.
            ValueError: the checkpoint to resume from is damaged, or the output folder cannot be written.
        """
        if checkpoint := kwargs.get("resume_from_checkpoint"):
            # transformers would begin at step 0 without it, and does not say what it cannot read
            read(Path(checkpoint) / TRAINER_STATE_NAME, lambda file: TrainerState.load_from_json(str(file)))
        result = super().train(*args, **kwargs)
        self._stop_on_nonfinite()
        self.writer.finish()
        return result

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Train on a batch."""
        done = self.state.global_step
        if self._step_began is None or self._step_began[0] != done:
            self._step_began = (done, random_states())
        return super().training_step(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._stop_on_nonfinite()
        self.state.stateful_callbacks["TrainerControl"] = self.control.state()
        state = json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True) + "\n"
        self.writer.save(
            self.state.global_step,
            self.model_wrapped,
            _plain(self.optimizer),
            self.lr_scheduler,
            {**self.files, TRAINER_STATE_NAME: state},
            self.record,
            rng_states=self._states_of_step_begun(),
        )

    def _states_of_step_begun(self) -> dict[str, Any] | None:
        """The random states to do a step again from that is given up between its batches; None: it is done."""
        began = self._step_began
        return began[1] if began is not None and began[0] == self.state.global_step else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: weights come with the optimiser's states, once the model is sharded."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_checkpoint(Path(checkpoint), self.model_wrapped, _plain(self.optimizer), self.lr_scheduler)
            # not before: what cannot be loaded is no reason to leave the others
            self._leave_others(Path(checkpoint))

    def _leave_others(self, checkpoint: Path) -> None:
        if rank() == 0:
            try:
                leave_others(self.args.output_dir, checkpoint)
            except OSError as error:
                raise ValueError(f"{self.args.output_dir} cannot be written: {error}") from error

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_rng(Path(checkpoint))

    def _stop_on_nonfinite(self) -> None:
        try:
            super()._stop_on_nonfinite()
        except NonFiniteLossError:
            # what is being saved is of before
            self.writer.finish()
            raise


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
