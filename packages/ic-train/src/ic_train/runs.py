"""What runs of every kind have: a record of how they came to be, a point to resume from, a model at the end."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ic_train.checkpoints.folders import read_record, remove_old, resolve_resume
from ic_train.distributed import from_first_process, fsdp_was_asked_for, rank, world_size
from ic_train.long_context.arguments import LongContextModelArguments
from ic_train.long_context.models import save_model
from ic_train.results import commit, device_name, versions

RECORD_FILE, RUN_FILE = "training.json", "run.json"
logger = logging.getLogger(__name__)


def run_record(module: str, identity: dict[str, Any]) -> dict[str, Any]:
    """How a run came to be.

    Args:
        module: that accelerate launched.
        identity: what may not change when the run is resumed.
    """
    found = versions()
    for name in ("accelerate", "trl", "liger-kernel"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return {
        "command": " ".join([f"accelerate launch -m {module}", *sys.argv[1:]]),
        "identity": identity,
        "processes": world_size(),
        "sharded": fsdp_was_asked_for(),
        "gpu": device_name(),
        "versions": found,
        "commit": commit()[0],
    }


def resume_point(resume: str, output_dir: str, identity: dict[str, Any], group: Any) -> Path | None:
    """The checkpoint to go on from, or None; all ranks take the first one's.

    Args:
        resume: "auto", a checkpoint's folder, or empty.
        output_dir: of the run.
        identity: of the run; the checkpoint's has to be the same.
        group: process group for tensors on the CPU.

    Raises:
        ValueError: there is no such checkpoint, or it is of another run.
    """
    found: Any = None
    try:
        if rank() == 0:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            found = resolve_resume(resume, output_dir)
            remove_old(output_dir, None)
    except (ValueError, OSError) as error:
        found = str(error)
    found = from_first_process(found, group)
    if isinstance(found, str):
        raise ValueError(found)
    if found is not None:
        _check_same_run(read_record(found), identity, found)
        if rank() == 0:
            logger.warning("resuming from %s", found)
    return found


def save_final_model(
    trainer: Any, arguments: LongContextModelArguments, record: dict[str, Any], group: Any
) -> None:
    """Write the model in bfloat16 to the output folder, and how it came to be; all ranks call it.

    Args:
        trainer: Restartable, at its end.
        arguments: that its model was built by.
        record: of the run; the training's outcome is added.
        group: process group for tensors on the CPU.

    Raises:
        ValueError: the folder cannot be written.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(trainer.model_wrapped, options=options)
    problem = None
    if rank() == 0:
        folder = Path(trainer.args.output_dir)
        record |= {
            "optimizer": {
                # of an enumeration the name that its argument takes
                name: str(getattr(value := getattr(trainer.args, name), "value", value))
                for name in ("optim", "learning_rate", "weight_decay", "adam_beta2", "lr_scheduler_type")
            },
            "precision": "bf16" if trainer.args.bf16 else "fp32",
            "failed_saves": trainer.writer.failed_steps,
            "log": trainer.state.log_history,
        }
        try:
            save_model(folder, arguments, weights)
            (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n")
            logger.warning("saved %s after %.0f s", folder, record["wall_s"])
        except (OSError, SafetensorError) as error:
            problem = (
                f"{folder} cannot be written: {error}; make room, and make the model of the last checkpoint: "
                "`python -m ic_train.checkpoints.export CHECKPOINT FOLDER`"
            )
    problem = from_first_process(problem, group)
    if problem:
        raise ValueError(problem)


def _check_same_run(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    for name, value in now.items():
        before = saved.get(name)
        # compared as JSON has them
        if json.loads(json.dumps(value)) != before:
            hint = ""
            if name in ("sequences_per_step", "tokens_per_step", "pairs_per_step"):
                hint = (
                    ": with another number of processes, change gradient_accumulation_steps or "
                    "per_device_train_batch_size to match"
                )
            raise ValueError(f"{name} is {value}; {folder} was saved with {before}{hint}")
