"""Save and load the state of a run by PyTorch's distributed checkpoints, which any number of ranks can read.

A save copies the state to the CPU and returns; a thread writes it to `checkpoint-N.partial`. When the parts of all
ranks are on the disk, the first rank adds `complete.json` and renames the folder. Whatever ends the run
before that leaves the checkpoint before it as the last one.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from ic_train.checkpoints.folders import COMPLETE, PARTIAL, PREFIX, remove, remove_old
from ic_train.distributed import any_process, rank, world_size

RNG_FILE, SCHEDULER_FILE = "rng_{rank}.pt", "scheduler.pt"
# PyTorch's own is no Exception
_FAILURES = (Exception, CheckpointException)
logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time.

    Args:
        output_dir: of the run.
        group: process group for tensors on the CPU, used by nothing else; None for one process alone.
        keep: whole checkpoints that are kept; None: all.
        background: whether training goes on while a checkpoint is written.

    Attributes:
        saved_step: the last one that this writer has saved whole; None: none yet.
        failed_steps: those that it could not save.
    """

    def __init__(self, output_dir: str | Path, group: Any, *, keep: int | None, background: bool) -> None:
        self.output_dir = Path(output_dir)
        self.group = group
        self.keep = keep
        self.background = background
        self.saved_step: int | None = None
        self.failed_steps: list[int] = []
        self._writing: tuple[int, Future[Any]] | None = None
        self._alone = ThreadPoolExecutor(1) if group is None else None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        files: dict[str, str],
        record: dict[str, Any],
        rng_states: dict[str, Any] | None = None,
    ) -> None:
        """Begin to save; what was begun before is finished first. A step that is saved already is left as it is.

        A save that fails, as on a full disk, is logged and leaves nothing behind: training goes on, and the
        checkpoint before stays the last one.

        Args:
            step: optimiser steps done.
            model: prepared by accelerate, or plain.
            optimizer: likewise.
            scheduler: of the learning rate.
            files: more files of the checkpoint, by name.
            record: what `complete.json` is to say.
            rng_states: this rank's, of `random_states`; None: the present ones.
        """
        self.finish()
        if step == self.saved_step:
            return
        partial = self.output_dir / f"{PREFIX}{step}{PARTIAL}"
        weights, states = get_state_dict(model, optimizer, options=_options(model))
        problem = self._write_small_files(partial, scheduler, files, rng_states or random_states())
        if any_process(problem is not None, self.group):
            self._give_up(step, problem)
            return
        state = {"model": weights, "optimizer": states}
        record = {**record, "step": step, "ranks": world_size(), "files": sorted(files)}
        if self._alone is not None:
            state = _copied(state)
            future = self._alone.submit(self._write_alone, state, partial, record)
        else:
            future = dcp.async_save(
                state,
                checkpoint_id=partial,
                process_group=self.group,
                async_checkpointer_type=AsyncCheckpointerType.THREAD,
            )
            future = self._then_complete(future, partial, record)
        self._writing = (step, future)
        if not self.background:
            self.finish()

    def finish(self) -> bool:
        """Wait for what is being written; whether it is whole. All ranks call it."""
        if self._writing is None:
            return True
        (step, future), self._writing = self._writing, None
        problem: BaseException | None = None
        try:
            future.result()
        except _FAILURES as error:
            # whatever the storage raises: the run is worth more than one checkpoint
            problem = error
        if any_process(problem is not None, self.group):
            self._give_up(step, problem)
            return False
        self.saved_step = step
        return True

    def _write_small_files(
        self, partial: Path, scheduler: Any, files: dict[str, str], rng_states: dict[str, Any]
    ) -> OSError | None:
        try:
            if rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            if self.group is not None:
                dist.barrier(self.group)
            partial.mkdir(parents=True, exist_ok=True)
            _save(rng_states, partial / RNG_FILE.format(rank=rank()))
            if rank() == 0:
                _save(scheduler.state_dict(), partial / SCHEDULER_FILE)
                for name, text in files.items():
                    (partial / name).write_text(text)
                    _to_disk(partial / name)
        except OSError as error:
            return error
        except RuntimeError as error:
            # torch.save's own word for a full disk
            return OSError(str(error))
        return None

    def _write_alone(self, state: dict[str, Any], partial: Path, record: dict[str, Any]) -> None:
        dcp.save(state, checkpoint_id=partial, no_dist=True)
        _complete(partial, record, self.output_dir, self.keep)

    def _then_complete(self, written: Any, partial: Path, record: dict[str, Any]) -> Future[Any]:
        """The same future, after which the first rank has given the folder its name."""
        completed: Future[Any] = Future()

        def complete(done: Any) -> None:
            try:
                done.result()
                # the first rank's write ends when all ranks' parts are there
                if rank() == 0:
                    _complete(partial, record, self.output_dir, self.keep)
            except _FAILURES as error:
                completed.set_exception(error)
            else:
                completed.set_result(None)

        written.add_done_callback(complete)
        return completed

    def _give_up(self, step: int, problem: BaseException | None) -> None:
        """Clean up, and say why on every rank that knows."""
        self.failed_steps.append(step)
        if rank() == 0:
            shutil.rmtree(self.output_dir / f"{PREFIX}{step}{PARTIAL}", ignore_errors=True)
        if problem is not None or rank() == 0:
            logger.error(
                "rank %d: %s%d was not saved: %s. Training goes on; the checkpoint before it is untouched",
                *(rank(), PREFIX, step, "another rank says why" if problem is None else _reason(problem)),
            )


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Load weights, optimiser and schedule, on whatever number of ranks.

    Args:
        folder: a whole checkpoint.
        model: prepared like the one that was saved; sharded over any number of ranks.
        optimizer: likewise.
        scheduler: of the learning rate.

    Raises:
        ValueError: the checkpoint is damaged or is of another model.
    """
    weights, states = get_state_dict(model, optimizer, options=_options(model))
    state = {"model": weights, "optimizer": states}
    try:
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except _FAILURES as error:
        raise ValueError(
            f"{folder} cannot be loaded: {_reason(error)}; it is damaged or of another model, give an earlier one"
        ) from error
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=_options(model),
    )
    read(folder / SCHEDULER_FILE, lambda file: scheduler.load_state_dict(torch.load(file, weights_only=True)))


def read(file: Path, load: Callable[[Path], Any]) -> Any:
    """What `load` makes of a file of a checkpoint.

    Raises:
        ValueError: the file is damaged or missing; names it.
    """
    try:
        return load(file)
    except Exception as error:
        # each format has its own kinds, whose texts are about the format
        kind = type(error).__name__
        raise ValueError(
            f"{file} cannot be read: {kind}; the checkpoint is damaged, give an earlier one"
        ) from error


def _options(model: nn.Module) -> StateDictOptions:
    """Frozen weights are those of the model that adapters were added to: it has them already."""
    frozen = any(not parameter.requires_grad for parameter in model.parameters())
    return StateDictOptions(ignore_frozen_params=frozen, strict=not frozen)


def _complete(partial: Path, record: dict[str, Any], output_dir: Path, keep: int | None) -> None:
    folder = partial.with_name(partial.name.removesuffix(PARTIAL))
    with (partial / COMPLETE).open("w") as file:
        json.dump({**record, "saved_unix_s": round(time.time())}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    # the data's names, before the one that says that they are all there
    _to_disk(partial)
    # what a removal that was interrupted has left
    remove(folder)
    partial.rename(folder)
    _to_disk(output_dir)
    remove_old(output_dir, keep)


def _save(content: Any, file: Path) -> None:
    torch.save(content, file)
    _to_disk(file)


def _to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's names, would survive a power failure."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        # some network file systems cannot for a folder
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(opened)


def _reason(error: BaseException) -> str:
    """The last line of an error, which says what went wrong."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _copied(state: Any) -> Any:
    """The state with its tensors copied to the CPU: training changes them while they are written."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: _copied(value) for name, value in state.items()}
    if isinstance(state, list):
        return [_copied(value) for value in state]
    return state


def random_states() -> dict[str, Any]:
    """This rank's random states, as a checkpoint has them."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    states: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "cpu": torch.random.get_rng_state(),
        "ranks": world_size(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng(folder: Path) -> None:
    """Set this rank's random states to those of a checkpoint; on another number of ranks they start anew.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / RNG_FILE.format(rank=rank())
    states: dict[str, Any] = {"ranks": None}
    if file.is_file():
        states = read(file, lambda saved: torch.load(saved, weights_only=True))
    if states["ranks"] != world_size():
        # data comes by number and the model drops nothing out: only what a user adds draws random numbers
        logger.warning(
            "%s was saved by another number of ranks than %d: random states start anew", folder, world_size()
        )
        return
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.random.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
