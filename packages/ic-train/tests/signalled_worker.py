"""training_worker, in whose runs a rank gets SIGUSR1 within a chosen batch, or has a full disk."""

import errno
import os
import signal
from typing import Any

import torch

from ic_train.distributed import rank
from ic_train.trainers.long_context import LongContextTrainer

plain_loss, plain_save = LongContextTrainer.compute_loss, torch.save


def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Draw a random number, as a model with dropout would; `TEST_SIGNAL` is a rank, steps and batches done."""
    done = self.state.global_step
    before = getattr(self, "batches", (done, -1))
    self.batches = (done, before[1] + 1 if before[0] == done else 0)
    if os.environ.get("TEST_SIGNAL") == f"{rank()} {done} {self.batches[1]}":
        os.kill(os.getpid(), signal.SIGUSR1)
    torch.rand(())
    return plain_loss(self, *args, **kwargs)


def save(*args: Any, **kwargs: Any) -> None:
    """Save, unless this rank is the one of `TEST_FULL`."""
    if os.environ.get("TEST_FULL") == str(rank()):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    plain_save(*args, **kwargs)


LongContextTrainer.compute_loss, torch.save = compute_loss, save

import training_worker  # noqa: E402, F401
