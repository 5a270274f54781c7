r"""Supervised training: of pass-key retrieval over a curriculum of lengths, or on long text.

    accelerate launch -m ic_train.sft --config packages/ic-train/recipes/ic-nano/sft.yaml
    accelerate launch --config_file packages/ic-train/accelerate/one-node.yaml \
      -m ic_train.sft --config packages/ic-train/recipes/ic-1b/extend-32k.yaml

A recipe with `task: text` is of the second kind; see `ic_train.long_context`. The keys of the first kind are the
fields of the four dataclasses below; TRL's parser reads both, so that any key can also be given as a flag, and a
flag wins over the recipe.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import platform
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from ic_model import ICConfig, ICForCausalLM
from ic_model.byte_tokenizer import build_byte_tokenizer
from ic_model.presets import preset
from torch import distributed as dist
from transformers import TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from trl import TrlParser

from ic_train.checkpoints.folders import AUTO, PREFIX
from ic_train.data.corpus import Corpus, load_corpus
from ic_train.data.curriculum import Curriculum, CurriculumBatches
from ic_train.metrics import ThroughputMeter
from ic_train.recipe import read_recipe
from ic_train.results import commit, device_name
from ic_train.trainers import MuonWithAdamW, PasskeyTrainer
from ic_train.trainers.finite import NonFiniteLossError

HIDDEN_MATRICES = ("optim", "muon")
RECORD_FILE = "training.json"
logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """Which model is trained.

    Args:
        preset: name of a shape in ic_model's presets; the weights start from random numbers.
        attn_implementation: how transformers computes the expanded attention.
        final_score_factor: the saved query projections are the trained ones times this, which multiplies every
            attention score by it. More than 1 sharpens attention for contexts with many more tokens than the
            longest that was trained on, whose softmax is otherwise too flat (YaRN's temperature, arXiv
            2309.00071, section 3.4, without the change of frequencies).
    """

    preset: str = "ic-nano"
    attn_implementation: str = "sdpa"
    final_score_factor: float = 1.0


@dataclass
class OptimizerArguments:
    """How it is trained, beyond transformers' own arguments.

    Args:
        hidden_matrices: "optim" for the optimizer that `optim` names, or "muon": the matrices inside the blocks
            are then trained with Muon and the rest with AdamW, on one GPU or data-parallel ones.
    """

    hidden_matrices: str = "optim"


@dataclass
class DataArguments:
    """What it is trained on.

    Args:
        task: "passkey" for this kind of training, "text" for long text.
        stages: the curriculum, a list of mappings; see ic_train.data.curriculum.Stage.
        corpus_paths: text files or folders; default: the sources of the standard library and of the
            packages that a training environment has anyway.
        corpus_max_mb: how much of them is used, in million bytes.
    """

    task: str = "passkey"
    stages: list[Any] = field(default_factory=list)
    corpus_paths: list[str] = field(default_factory=list)
    corpus_max_mb: int = 64


@dataclass
class RunArguments:
    """Where it begins.

    Args:
        resume: "auto" to go on from the output folder's last whole checkpoint if there is one, or a checkpoint's
            folder; empty: from the start, or from what transformers' `resume_from_checkpoint` names.
    """

    resume: str = ""


def main(arguments: list[str] | None = None) -> None:
    """Train as the recipe says, and leave a checkpoint with its record in the output folder."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        task = asked_task(given)
        if task not in ("passkey", "text"):
            raise ValueError(f"task is {task!r}; accepted: 'passkey', 'text'")
    except ValueError as error:
        sys.exit(f"error: {error}")
    if task == "text":
        from ic_train.long_context.run import main as train_on_text

        train_on_text(arguments)
    else:
        _train_on_passkeys(given)


def _train_on_passkeys(given: list[str]) -> None:
    try:
        parsed = _parse(given)
        model_arguments, data_arguments, optimizer_arguments, run_arguments, training_arguments = parsed
        training_arguments.resume_from_checkpoint = _resume_point(run_arguments.resume, training_arguments)
        curriculum = Curriculum.from_recipe(data_arguments.stages)
        corpus = load_corpus(data_arguments.corpus_paths or None, max_mb=data_arguments.corpus_max_mb)
        _check(training_arguments, optimizer_arguments, curriculum)
        _check_model(model_arguments)
        config = preset(model_arguments.preset)
    except ValueError as error:
        sys.exit(f"error: {error}")
    config._attn_implementation = model_arguments.attn_implementation
    muon = optimizer_arguments.hidden_matrices == "muon"
    try:
        train(
            config,
            training_arguments,
            curriculum,
            corpus,
            muon=muon,
            final_score_factor=model_arguments.final_score_factor,
        )
    except NonFiniteLossError as error:
        sys.exit(f"error: {error}")


def _config_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--task")
    return parser


def _parse(given: list[str]) -> Any:
    """The arguments of a pass-key run, by flags and recipe.

    Raises:
        ValueError: the recipe has a key that nothing reads, or the arguments do not go together.
    """
    kinds = (ModelArguments, DataArguments, OptimizerArguments, RunArguments, TrainingArguments)
    parser = TrlParser(kinds)  # type: ignore[arg-type]
    known, _ = _config_parser().parse_known_args(given)
    if known.config is not None:
        # TRL's own message does not name the file; `env` is TRL's
        read_recipe(known.config, {"env", *(action.dest for action in parser._actions)})
    return parser.parse_args_and_config(given)


def _resume_point(resume: str, training: TrainingArguments) -> str | None:
    """The checkpoint to go on from, or None.

    Raises:
        ValueError: `resume` is no whole checkpoint, or transformers' argument is given as well.
    """
    if not resume:
        return training.resume_from_checkpoint
    if training.resume_from_checkpoint:
        raise ValueError(
            f"resume_from_checkpoint is {training.resume_from_checkpoint!r} and resume is {resume!r}; give one"
        )
    if resume != AUTO:
        if not (Path(resume) / TRAINER_STATE_NAME).is_file():
            raise ValueError(
                f"resume is {resume!r}, which has no {TRAINER_STATE_NAME}; accepted: 'auto', or a folder "
                f"{PREFIX}N of a run"
            )
        return resume
    # transformers writes the trainer's state last: a folder without it is half a checkpoint
    whole = Path(training.output_dir).glob(f"{PREFIX}*/{TRAINER_STATE_NAME}")
    numbers = [int(name[1]) for file in whole if (name := re.fullmatch(rf"{PREFIX}(\d+)", file.parent.name))]
    return str(Path(training.output_dir) / f"{PREFIX}{max(numbers)}") if numbers else None


def asked_task(arguments: list[str]) -> str:
    """What a recipe or a flag says of the task; "passkey" where neither says anything.

    Raises:
        ValueError: the recipe cannot be read.
    """
    known, _ = _config_parser().parse_known_args(arguments)
    recipe = {} if known.config is None else read_recipe(known.config)
    return str(recipe.get("task", "passkey")) if known.task is None else known.task


def train(
    config: ICConfig,
    arguments: TrainingArguments,
    curriculum: Curriculum,
    corpus: Corpus,
    *,
    muon: bool = False,
    final_score_factor: float = 1.0,
) -> PasskeyTrainer:
    """Run the curriculum and save the result.

    Args:
        config: of the model, whose weights start from random numbers.
        arguments: optimiser, precision, logging and checkpoints; steps come from the curriculum.
        curriculum: the stages.
        corpus: the text.
        muon: whether Muon trains the matrices inside the blocks.
        final_score_factor: see ModelArguments.

    Returns:
        the trainer, with its log.

    Raises:
        NonFiniteLossError: the loss or its gradient became no number.
    """
    # before the weights are drawn: the trainer seeds only when it is built
    set_seed(arguments.seed)
    model = ICForCausalLM(config)
    arguments.max_steps = curriculum.total_steps
    # transformers would drop every column that the model's forward does not name, the loss weights among them
    arguments.remove_unused_columns = False
    batches = CurriculumBatches(curriculum, corpus.text, seed=arguments.seed, processes=arguments.world_size)
    throughput = ThroughputMeter(config, curriculum, arguments.world_size)
    optimizer = None
    if muon:
        optimizer = MuonWithAdamW(
            # the device first: an optimizer keeps the parameters that it was given
            model.to(arguments.device),
            lr=arguments.learning_rate,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_epsilon,
            weight_decay=arguments.weight_decay,
        )
    trainer = PasskeyTrainer(model, arguments, batches, throughput, optimizer)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    wall_s = time.perf_counter() - started
    if trainer.is_world_process_zero():
        _save(trainer, curriculum, corpus, wall_s, final_score_factor)
    return trainer


def scale_scores(model: ICForCausalLM, factor: float) -> None:
    """Multiply every attention score by a factor, in place, by way of the last projection of the queries."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # both halves of a query come from it, and rotating is linear
            if name.endswith(("self_attn.q_proj.weight", "self_attn.q_b_proj.weight")):
                weight.mul_(factor)


def _check_model(arguments: ModelArguments) -> None:
    if not 0 < arguments.final_score_factor < math.inf:
        raise ValueError(
            f"final_score_factor is {arguments.final_score_factor}; it must be a positive, finite number"
        )


def _check(arguments: TrainingArguments, optimizer: OptimizerArguments, curriculum: Curriculum) -> None:
    """Refuse settings that the curriculum decides, rather than ignore them."""
    if optimizer.hidden_matrices not in HIDDEN_MATRICES:
        raise ValueError(
            f"hidden_matrices is {optimizer.hidden_matrices!r}; accepted: {', '.join(HIDDEN_MATRICES)}"
        )
    if optimizer.hidden_matrices == "muon" and arguments.fsdp:
        raise ValueError(
            "hidden_matrices is 'muon', which needs whole matrices; fsdp shards them: choose one"
        )
    if arguments.max_steps > 0 and arguments.max_steps != curriculum.total_steps:
        raise ValueError(
            f"max_steps is {arguments.max_steps}; the stages have {curriculum.total_steps} steps: leave it out"
        )
    if arguments.per_device_train_batch_size != 1:
        raise ValueError(
            f"per_device_train_batch_size is {arguments.per_device_train_batch_size}; it must be 1, because "
            "each item is a whole batch: set the stages' sequences_per_step instead"
        )
    if arguments.lr_scheduler_type != "linear":  # transformers' default
        raise ValueError(
            f"lr_scheduler_type is {arguments.lr_scheduler_type.value!r}; leave it out: the stages' "
            "learning_rate_start and learning_rate_end decide"
        )
    if arguments.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps is {arguments.gradient_accumulation_steps}; it must be 1: set the "
            "stages' sequences_per_step instead"
        )


def _save(
    trainer: PasskeyTrainer,
    curriculum: Curriculum,
    corpus: Corpus,
    wall_s: float,
    final_score_factor: float,
) -> None:
    """Write the checkpoint in bfloat16, its tokenizer, and how it came to be."""
    folder = Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    # the trainer switches it off while it trains, and would leave it so for everybody who loads the result
    model.config.use_cache = True
    # on a copy: whoever called `train` may go on with the model that was trained
    saved = copy.deepcopy(model)
    scale_scores(saved, final_score_factor)
    saved.to(torch.bfloat16).save_pretrained(folder)
    build_byte_tokenizer().save_pretrained(folder)
    record = {
        "command": _command(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "stages": [asdict(stage) for stage in curriculum.stages],
        "final_score_factor": final_score_factor,
        "seed": trainer.args.seed,
        "optimizer": {"name": type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__}
        | {
            name: getattr(trainer.args, name)
            for name in (
                "learning_rate",
                "adam_beta1",
                "adam_beta2",
                "warmup_steps",
                "weight_decay",
                "max_grad_norm",
            )
        },
        "precision": "bf16 autocast" if trainer.args.bf16 else "fp32",
        "corpus": {"bytes": len(corpus.text), "sha256": corpus.sha256, "sources": corpus.sources},
        "gpu": device_name(),
        "versions": {
            name: metadata.version(name) for name in ("torch", "transformers", "accelerate", "numpy")
        }
        | {"python": platform.python_version()},
        "commit": commit()[0],
        "wall_s": round(wall_s, 1),
        "log": trainer.state.log_history,
    }
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n")
    logger.warning("saved %s after %.0f s", folder, wall_s)


def _command() -> str:
    return " ".join(["accelerate launch -m ic_train.sft", *sys.argv[1:]])


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
