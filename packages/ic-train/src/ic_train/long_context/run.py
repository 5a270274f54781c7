"""Long-context training on text, as a recipe with `task: text` asks for it.

accelerate launch --config_file FSDP.yaml -m ic_train.sft --config RECIPE.yaml
"""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from transformers import TrainingArguments, set_seed
from trl import TrlParser

from ic_train.checkpoints import CheckpointWriter
from ic_train.context_parallel import RING, Ring, register_attention
from ic_train.distributed import (
    allow_fsdp_on_cpu,
    compile_by_block,
    cpu_group,
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
from ic_train.long_context.models import add_adapters, build_model, described, identity_of
from ic_train.preemption import StopOnSignal
from ic_train.profiling import StepProfile
from ic_train.runs import RUN_FILE, resume_point, run_record, save_final_model
from ic_train.tracking import LocalMetrics, guard_trackers, prepare_trackers
from ic_train.trainers.feed_forward import choose_feed_forward, fuse_feed_forward
from ic_train.trainers.finite import NonFiniteLossError
from ic_train.trainers.linear_loss import add_loss_head, choose_loss
from ic_train.trainers.long_context import LongContextTrainer

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
        ValueError: model, text and processes do not go together, the checkpoint is of another run, or the run was
            told to end and could not be saved.
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
    compile_by_block(args.torch_compile)
    ring = Ring(ring_groups(recipe.run.context_parallel_size))
    register_attention(ring)
    # one for what ranks agree on in training, one for saves, which run beside it in a thread
    group, saving_group = cpu_group(), cpu_group()
    model = _model(recipe)
    data = _data(recipe, model.config)
    record = _record(recipe, data)
    resume = resume_point(recipe.run.resume, args.output_dir, record["identity"], group)
    kind = choose_loss(recipe.model.linear_loss, args.device)
    block = choose_feed_forward(recipe.model.feed_forward, args.device, compiled=args.torch_compile)
    config = model.config
    fuse_feed_forward(model, block)
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
        callbacks=[stop, LocalMetrics(), *_profile(recipe)],
    )
    facts = {"linear_loss": kind, "feed_forward": block}
    guard_trackers(trainer.callback_handler, {**_facts(record), **facts})
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    record["wall_s"] = round(time.perf_counter() - started, 1)
    if stop.stopped:
        stop.hand_over(trainer)
    elif recipe.run.save_final_model:
        record["tokens"] = trainer.state.global_step * record["identity"]["tokens_per_step"]
        save_final_model(trainer, recipe.model, record, group)
    # a process that leaves while the others still write takes their connections with it
    trainer.accelerator.wait_for_everyone()
    return trainer


def _profile(recipe: Recipe) -> list[StepProfile]:
    steps = recipe.run.profile_steps
    return [StepProfile(steps)] if steps and rank() == 0 else []


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
    identity = {
        # a kernel, too
        "model": identity_of(recipe.model) | {"linear_loss": None},
        "packing": asdict(data.packing),
        "streams": data.streams,
        "sequences_per_step": sequences,
        "tokens_per_step": sequences * recipe.data.tokens_per_sequence,
        "seed": recipe.training.seed,
    }
    return {
        **run_record("ic_train.sft", identity),
        "context_parallel_size": recipe.run.context_parallel_size,
    }


def _facts(record: dict[str, Any]) -> dict[str, Any]:
    """What trackers are told beside transformers' arguments."""
    identity = record["identity"]
    return {
        "git_commit": record["commit"],
        "command": record["command"],
        "processes": record["processes"],
        "context_parallel_size": record["context_parallel_size"],
        "tokens_per_step": identity["tokens_per_step"],
        **{f"packing_{name}": value for name, value in identity["packing"].items()},
        **{f"version_{name}": value for name, value in record["versions"].items()},
    }
