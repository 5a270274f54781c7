"""Long-context training on text, as a recipe with `task: text` asks for it.

accelerate launch --config_file FSDP.yaml -m ic_train.sft --config RECIPE.yaml
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import TrainingArguments, set_seed
from trl import TrlParser

from ic_train.checkpoints import CheckpointWriter, resolve_resume
from ic_train.checkpoints.folders import read_record, remove_old
from ic_train.context_parallel import RING, Ring, register_attention
from ic_train.distributed import (
    allow_fsdp_on_cpu,
    cpu_group,
    from_first_process,
    fsdp_was_asked_for,
    rank,
    ring_groups,
    world_size,
)
from ic_train.long_context.arguments import (
    LongContextDataArguments,
    LongContextModelArguments,
    LongContextRunArguments,
    check_lengths,
    check_model,
    check_training,
)
from ic_train.long_context.documents import PackedDocuments, open_corpora
from ic_train.long_context.models import add_adapters, build_model, described, save_model
from ic_train.preemption import StopOnSignal
from ic_train.results import commit, device_name, versions
from ic_train.tracking import LocalMetrics, guard_trackers, prepare_trackers
from ic_train.trainers.linear_loss import add_loss_head, choose_loss
from ic_train.trainers.long_context import LongContextTrainer, NonFiniteLossError

RECORD_FILE, RUN_FILE = "training.json", "run.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """All arguments of a run."""

    model: LongContextModelArguments
    data: LongContextDataArguments
    run: LongContextRunArguments
    training: TrainingArguments


def main(arguments: list[str] | None = None) -> None:
    """Train as the recipe says, and leave a plain model folder with its record in the output folder."""
    kinds = (
        LongContextModelArguments,
        LongContextDataArguments,
        LongContextRunArguments,
        TrainingArguments,
    )
    try:
        parsed: Any = TrlParser(kinds).parse_args_and_config(arguments)  # type: ignore[arg-type]
        recipe = Recipe(*parsed)
        check_model(recipe.model)
        check_training(recipe.model, recipe.data, recipe.run, recipe.training, sharded=fsdp_was_asked_for())
        train(recipe)
    except (ValueError, NonFiniteLossError) as error:
        sys.exit(f"error: {error}")


def train(recipe: Recipe) -> LongContextTrainer:
    """Run the recipe.

    Raises:
        ValueError: model, text and processes do not go together, or the checkpoint is of another run.
        NonFiniteLossError: the loss is no number.
    """
    args = recipe.training
    # where documents begin is no argument of the model's forward; the trainer would drop it
    args.remove_unused_columns = False
    # would hide what the run has to stop at, and waits for the GPU at every step
    args.logging_nan_inf_filter = False
    # starts the process group, which what follows needs
    _ = args.device
    allow_fsdp_on_cpu()
    ring = Ring(ring_groups(recipe.run.context_parallel_size))
    register_attention(ring)
    # one for what ranks agree on in training, one for saves, which run beside it in a thread
    group, saving_group = cpu_group(), cpu_group()
    model = _model(recipe)
    data = _data(recipe, model.config)
    record = _record(recipe, data)
    resume = _resume(recipe, record, group)
    kind = choose_loss(recipe.model.linear_loss, args.device)
    config = model.config
    prepared = add_adapters(add_loss_head(model, kind), recipe.model)
    prepare_trackers(args)
    stop = StopOnSignal(group)
    trainer = LongContextTrainer(
        model=prepared,
        args=args,
        train_dataset=data,
        config=config,
        tokens_per_sequence=recipe.data.tokens_per_sequence,
        parts=ring.size,
        group=group,
        writer=CheckpointWriter(
            args.output_dir,
            saving_group,
            keep=args.save_total_limit,
            background=recipe.run.background_checkpoints,
        ),
        record=record["identity"],
        files={RUN_FILE: json.dumps(described(recipe.model), indent=1) + "\n"},
        callbacks=[stop, LocalMetrics()],
    )
    guard_trackers(trainer.callback_handler, _facts(record, kind))
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    record["wall_s"] = round(time.perf_counter() - started, 1)
    if stop.stopped:
        if rank() == 0:
            stop.mark(args.output_dir)
    elif recipe.run.save_final_model:
        problem = from_first_process(_save(trainer, recipe, record), group)
        if problem:
            raise ValueError(problem)
    # a process that leaves while the others still write takes their connections with it
    trainer.accelerator.wait_for_everyone()
    return trainer


def _model(recipe: Recipe) -> Any:
    set_seed(recipe.training.seed)
    model = build_model(recipe.model)
    check_lengths(model.config, recipe.data, recipe.run)
    parallel = recipe.run.context_parallel_size > 1
    model.set_attn_implementation(RING if parallel else recipe.model.attn_implementation)
    return model


def _data(recipe: Recipe, config: Any) -> PackedDocuments:
    args, data = recipe.training, recipe.data
    return PackedDocuments(
        open_corpora(data.corpora, config.vocab_size),
        data.packing(args.seed if args.data_seed is None else args.data_seed),
        num_sequences=args.max_steps * _sequences_per_step(recipe),
        weights=data.corpus_weights,
        parts=recipe.run.context_parallel_size,
        batch_sequences=args.per_device_train_batch_size,
    )


def _sequences_per_step(recipe: Recipe) -> int:
    args = recipe.training
    shared = world_size() // recipe.run.context_parallel_size
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * shared


def _record(recipe: Recipe, data: PackedDocuments) -> dict[str, Any]:
    """What a run is: `identity` is what may not change when it is resumed."""
    sequences = _sequences_per_step(recipe)
    # kernels may change when it is resumed, and folders may have moved
    model = {
        **described(recipe.model),
        "model": Path(recipe.model.model).name,
        "attn_implementation": None,
        "linear_loss": None,
    }
    identity = {
        "model": model,
        "packing": asdict(data.packing),
        "streams": data.streams,
        "sequences_per_step": sequences,
        "tokens_per_step": sequences * recipe.data.tokens_per_sequence,
        "seed": recipe.training.seed,
    }
    return {
        "command": " ".join(["accelerate launch -m ic_train.sft", *sys.argv[1:]]),
        "identity": identity,
        "processes": world_size(),
        "context_parallel_size": recipe.run.context_parallel_size,
        "sharded": fsdp_was_asked_for(),
        "gpu": device_name(),
        "versions": _versions(),
        "commit": commit()[0],
    }


def _versions() -> dict[str, str]:
    found = versions()
    for name in ("accelerate", "trl", "liger-kernel"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _facts(record: dict[str, Any], kind: str) -> dict[str, Any]:
    """What trackers are told beside transformers' arguments."""
    identity = record["identity"]
    return {
        "git_commit": record["commit"],
        "command": record["command"],
        "linear_loss": kind,
        "processes": record["processes"],
        "context_parallel_size": record["context_parallel_size"],
        "tokens_per_step": identity["tokens_per_step"],
        **{f"packing_{name}": value for name, value in identity["packing"].items()},
        **{f"version_{name}": value for name, value in record["versions"].items()},
    }


def _resume(recipe: Recipe, record: dict[str, Any], group: Any) -> Path | None:
    """The checkpoint to go on from; all ranks take the first one's."""
    found: Any = None
    try:
        if rank() == 0:
            Path(recipe.training.output_dir).mkdir(parents=True, exist_ok=True)
            found = resolve_resume(recipe.run.resume, recipe.training.output_dir)
            remove_old(recipe.training.output_dir, None)
    except (ValueError, OSError) as error:
        found = str(error)
    found = from_first_process(found, group)
    if isinstance(found, str):
        raise ValueError(found)
    if found is not None:
        _check_same_run(read_record(found), record["identity"], found)
        if rank() == 0:
            logger.warning("resuming from %s", found)
    return found


def _check_same_run(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    for name, value in now.items():
        before = saved.get(name)
        # compared as JSON has them
        if json.loads(json.dumps(value)) != before:
            hint = ""
            if name in ("sequences_per_step", "tokens_per_step"):
                hint = (
                    ": with another number of processes, change gradient_accumulation_steps or "
                    "per_device_train_batch_size to match"
                )
            raise ValueError(f"{name} is {value}; {folder} was saved with {before}{hint}")


def _save(trainer: LongContextTrainer, recipe: Recipe, record: dict[str, Any]) -> str | None:
    """Write the model in bfloat16 and how it came to be; what went wrong. All ranks call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(trainer.model_wrapped, options=options)
    if rank() != 0:
        return None
    folder = Path(trainer.args.output_dir)
    record |= {
        "tokens": trainer.state.global_step * record["identity"]["tokens_per_step"],
        "optimizer": {
            name: str(getattr(trainer.args, name))
            for name in ("optim", "learning_rate", "weight_decay", "adam_beta2", "lr_scheduler_type")
        },
        "precision": "bf16" if trainer.args.bf16 else "fp32",
        "failed_saves": trainer.writer.failed_steps,
        "log": trainer.state.log_history,
    }
    try:
        save_model(folder, recipe.model, weights)
        (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n")
    except (OSError, SafetensorError) as error:
        return (
            f"{folder} cannot be written: {error}; make room, and make the model of the last checkpoint: "
            "`python -m ic_train.checkpoints.export CHECKPOINT FOLDER`"
        )
    logger.warning("saved %s after %.0f s and %d tokens", folder, record["wall_s"], record["tokens"])
    return None
