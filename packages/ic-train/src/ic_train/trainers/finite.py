"""An end where the loss is no number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ic_train.distributed import any_process, cpu_group

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient is no number; nothing was saved since both were."""


class StopsOnNonFinite(_Base):
    """What is noted as no number ends training at the next line of the log, on all ranks.

    Attributes:
        group: process group for tensors on the CPU; None for one process alone.
    """

    group: Any = None
    _not_finite: torch.Tensor | None = None
    _last_finite_step = 0

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log, unless there is nothing left to train."""
        if "loss" in logs:
            self._stop_on_nonfinite()
        super().log(logs, *args, **kwargs)

    def note_if_not_finite(self, value: torch.Tensor) -> None:
        """Remember a loss that is no number, for the next line of the log or the next save."""
        # stays on the device: reading it here would make every step wait for the GPU
        bad = ~torch.isfinite(value)
        self._not_finite = bad if self._not_finite is None else self._not_finite | bad

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm; one that is no number means weights that will be none, though the loss still was one."""
        norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(norm, torch.Tensor):
            self.note_if_not_finite(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        return norm

    def _stop_on_nonfinite(self) -> None:
        """Raise on all ranks where the loss of any is no number."""
        bad = self._not_finite is not None and bool(self._not_finite)
        if any_process(bad, self.group):
            raise NonFiniteLossError(
                "the loss or its gradient became infinite or no number after step "
                f"{self._last_finite_step}, at or before step {self.state.global_step}; nothing was saved since. "
                "Resume from the last checkpoint with a lower learning_rate or max_grad_norm, or another seed"
            )
        self._last_finite_step = self.state.global_step


class FiniteLoss(StopsOnNonFinite):
    """The same for a trainer that keeps transformers' own checkpoints; stands before it in a class's bases."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train.

        Raises:
            NonFiniteLossError: the loss or its gradient became no number.
        """
        self.group = cpu_group()
        result = super().train(*args, **kwargs)
        self._stop_on_nonfinite()
        return result

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train on a batch."""
        loss = super().training_step(*args, **kwargs)
        self.note_if_not_finite(loss.detach())
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._stop_on_nonfinite()
        super()._save_checkpoint(model, trial)
