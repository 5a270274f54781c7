"""Continued training of a converted checkpoint on text, alone or by distillation from the model it came from.

    accelerate launch -m ic_train.heal --config packages/ic-train/recipes/ic-135m/heal.yaml

The recipe's keys are the fields of the two dataclasses below and transformers' TrainingArguments; any key can
also be given as a flag, and a flag wins over the recipe.
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from ic_model import ICForCausalLM
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

from ic_train.data.packing import PackedText
from ic_train.data.text import load_token_corpus
from ic_train.recipe import read_recipe
from ic_train.results import commit, device_name
from ic_train.trainers.distillation import OPTIMIZERS, DistillationTrainer, TimeLimit
from ic_train.trainers.distillation_loss import DistillationWeights
from ic_train.trainers.feed_forward import choose_feed_forward, fuse_feed_forward
from ic_train.trainers.finite import NonFiniteLossError
from ic_train.trainers.padded_attention import register_padded_sdpa

RECORD_FILE = "training.json"
_CARRIED = ("conversion.json", "conversion.png", "generation_config.json")
logger = logging.getLogger(__name__)


@dataclass
class HealArguments:
    """What is healed, and from whom it learns.

    Args:
        model: checkpoint folder of the converted model.
        attn_implementation: how transformers computes the expanded attention; "sdpa_padded" pads values to the
            keys' width, which PyTorch's flash attention on a GPU wants.
        teacher: folder of the source model, or a GGUF file; empty: no distillation.
        text_weight: weight of the cross entropy of the text's next token.
        distillation_weight: weight of KL(teacher, student) on the logits; needs a teacher.
        hidden_weight: weight of the mean over layers of the squared distance of hidden states, relative to the
            teacher's; needs a teacher with as many layers of the same width.
        temperature: of both distributions in the KL.
        train_embeddings: train the token embeddings and the output projection, too.
        optimizer: "adamw", or "muon" for the matrices inside the blocks and AdamW for the rest.
        compile_layers: compile the blocks of model and teacher, and the loss: worth its time in runs of minutes.
        max_seconds: stop after so long, whatever the steps; the learning rate's schedule then follows the
            clock. 0: train all steps.
    """

    model: str = ""
    attn_implementation: str = "sdpa"
    teacher: str = ""
    text_weight: float = 1.0
    distillation_weight: float = 0.0
    hidden_weight: float = 0.0
    temperature: float = 1.0
    train_embeddings: bool = True
    optimizer: str = "adamw"
    compile_layers: bool = False
    max_seconds: float = 0.0


@dataclass
class TextArguments:
    """What it is trained on.

    Args:
        corpora: folders that `ic-train data text` made, with the model's tokenizer.
        corpus_weights: share of each corpus; default: by its tokens.
        tokens_per_sequence: length of the packed sequences; documents follow each other without padding, and a
            sequence may begin in the middle of one.
    """

    corpora: list[str] = field(default_factory=list)
    corpus_weights: list[float] = field(default_factory=list)
    tokens_per_sequence: int = 2048


def main(arguments: list[str] | None = None) -> None:
    """Heal as the recipe says, and leave a checkpoint with its record in the output folder."""
    try:
        heal_arguments, text_arguments, training_arguments = parse(arguments)
        data = _check(heal_arguments, text_arguments, training_arguments)
        heal(heal_arguments, training_arguments, data)
    except (ValueError, NonFiniteLossError) as error:
        sys.exit(f"error: {error}")


def parse(arguments: list[str] | None = None) -> tuple[HealArguments, TextArguments, TrainingArguments]:
    """Read flags, and the recipe that `--config` names.

    Raises:
        ValueError: the recipe cannot be read, or has a key that nothing reads.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = HfArgumentParser((HealArguments, TextArguments, TrainingArguments))  # type: ignore[arg-type]
    if "--config" in given:
        place = given.index("--config")
        if place + 1 >= len(given):
            raise ValueError("--config needs a file")
        path = given[place + 1]
        del given[place : place + 2]
        parser.set_defaults(**read_recipe(path, {action.dest for action in parser._actions}))
    heal_arguments, text_arguments, training_arguments = parser.parse_args_into_dataclasses(given)
    return heal_arguments, text_arguments, training_arguments


def heal(
    arguments: HealArguments, training_arguments: TrainingArguments, data: PackedText
) -> DistillationTrainer:
    """Train, and save the result.

    Args:
        arguments: model and teacher.
        training_arguments: optimiser, steps, precision, logging and checkpoints.
        data: packed sequences.

    Returns:
        the trainer, with its log.

    Raises:
        ValueError: model, teacher and text do not go together, or one of them is damaged.
        NonFiniteLossError: the loss or its gradient became no number.
    """
    set_seed(training_arguments.seed)
    register_padded_sdpa()
    try:
        model = ICForCausalLM.from_pretrained(
            arguments.model, dtype=torch.float32, attn_implementation=arguments.attn_implementation
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"model {arguments.model} cannot be read: {error}") from None
    if not arguments.train_embeddings:
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.requires_grad_(False)
    compiled = arguments.compile_layers or training_arguments.torch_compile
    fuse_feed_forward(model, choose_feed_forward("auto", training_arguments.device, compiled=compiled))
    teacher = load_teacher(arguments, model) if arguments.teacher else None
    # the collator makes labels, which the trainer would not find among the columns
    training_arguments.remove_unused_columns = False
    trainer = DistillationTrainer(
        model=model,
        args=training_arguments,
        train_dataset=data,
        teacher=teacher,
        weights=DistillationWeights(
            text=arguments.text_weight,
            logits=arguments.distillation_weight,
            hidden=arguments.hidden_weight,
            temperature=arguments.temperature,
        ),
        callbacks=[TimeLimit(arguments.max_seconds)] if arguments.max_seconds else [],
        optimizer=arguments.optimizer,
        compile_layers=arguments.compile_layers,
    )
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    wall_s = time.perf_counter() - started
    if trainer.is_world_process_zero():
        _save(trainer, arguments, data, wall_s)
    return trainer


def load_teacher(arguments: HealArguments, model: ICForCausalLM) -> PreTrainedModel:
    """The source model in bfloat16, frozen.

    Raises:
        ValueError: it cannot be read, or does not fit the student.
    """
    try:
        teacher = load_source_model(Path(arguments.teacher))
    except ValueError as error:
        raise ValueError(f"teacher {error}") from None
    own, other = model.config, teacher.config
    if own.vocab_size != other.vocab_size:
        raise ValueError(
            f"vocab_size of the teacher is {other.vocab_size}; the model's is {own.vocab_size}: they must be equal"
        )
    same = (own.num_hidden_layers, own.hidden_size) == (other.num_hidden_layers, other.hidden_size)
    if arguments.hidden_weight and not same:
        raise ValueError(
            f"hidden_weight is {arguments.hidden_weight}; the teacher must then have "
            f"{own.num_hidden_layers} layers "
            f"of width {own.hidden_size}, but has {other.num_hidden_layers} of {other.hidden_size}"
        )
    return teacher.eval().requires_grad_(False)


def load_source_model(path: Path) -> PreTrainedModel:
    """What a model was converted from, in bfloat16: a Hugging Face folder or a GGUF file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        if path.is_file():
            return _gguf_model(path)
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    except (OSError, KeyError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _gguf_model(path: Path) -> PreTrainedModel:
    """A source that is a GGUF file, dequantised by the reader that the conversion uses."""
    from ic_train.convert.source import open_source

    source = open_source(path)
    teacher = AutoModelForCausalLM.from_config(source.config, dtype=torch.bfloat16)
    weights = {name: source.reader.read(name) for name in source.reader.names if "rope_freqs" not in name}
    missing, unexpected = teacher.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    teacher.tie_weights()
    return teacher


def _check_losses(heal_arguments: HealArguments) -> None:
    """Refuse losses that do not go together."""
    for name in ("text_weight", "distillation_weight", "hidden_weight"):
        if getattr(heal_arguments, name) < 0:
            raise ValueError(f"{name} is {getattr(heal_arguments, name)}; it must be at least 0")
    learns = [heal_arguments.distillation_weight, heal_arguments.hidden_weight]
    if heal_arguments.teacher and not any(learns):
        raise ValueError("teacher is given; distillation_weight or hidden_weight must then be above 0")
    if any(learns) and not heal_arguments.teacher:
        raise ValueError("distillation_weight or hidden_weight is above 0; that needs a teacher")
    if not any([*learns, heal_arguments.text_weight]):
        raise ValueError(
            "text_weight, distillation_weight and hidden_weight are all 0; nothing would be learnt"
        )
    if heal_arguments.optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer is {heal_arguments.optimizer!r}; accepted: {', '.join(OPTIMIZERS)}")
    if heal_arguments.temperature <= 0:
        raise ValueError(f"temperature is {heal_arguments.temperature}; it must be above 0")


def _check(heal_arguments: HealArguments, text: TextArguments, training: TrainingArguments) -> PackedText:
    """Refuse what does not go together; the data."""
    _check_losses(heal_arguments)
    if not (Path(heal_arguments.model) / "config.json").is_file():
        raise ValueError(
            f"model is {heal_arguments.model!r}; it must be the folder of a converted checkpoint"
        )
    if heal_arguments.max_seconds and training.lr_scheduler_type not in ("linear", "cosine"):
        raise ValueError(
            f"lr_scheduler_type is {training.lr_scheduler_type.value!r}; with max_seconds it "
            "must be 'linear' or 'cosine'"
        )
    if not text.corpora:
        raise ValueError("corpora is empty; give folders that `ic-train data text` made")
    corpora = [load_token_corpus(path) for path in text.corpora]
    vocabulary = len(AutoTokenizer.from_pretrained(heal_arguments.model))
    for path, corpus in zip(text.corpora, corpora, strict=True):
        if corpus.record["vocab_size"] != vocabulary:
            raise ValueError(
                f"corpus {path} was made with a tokenizer of {corpus.record['vocab_size']} "
                "tokens; the model's has "
                f"{vocabulary}"
            )
    sequences = max(training.max_steps, 0) * (
        training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    )
    return PackedText(
        corpora,
        tokens_per_sequence=text.tokens_per_sequence,
        seed=training.seed,
        num_sequences=sequences or None,
        weights=text.corpus_weights,
    )


def _save(trainer: DistillationTrainer, arguments: HealArguments, data: PackedText, wall_s: float) -> None:
    """Write the checkpoint in bfloat16, what came with the converted one, and how it was healed."""
    folder, source = Path(trainer.args.output_dir), Path(arguments.model)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    for name in _CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    # by steps, not by what this process saw: it may have resumed
    args = trainer.args
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    tokens = trainer.state.global_step * sequences * data.tokens_per_sequence
    record = {
        "command": " ".join(["accelerate launch -m ic_train.heal", *sys.argv[1:]]),
        "model": source.name,
        "teacher": Path(arguments.teacher).name or None,
        "text_weight": arguments.text_weight,
        "distillation_weight": arguments.distillation_weight,
        "hidden_weight": arguments.hidden_weight,
        "temperature": arguments.temperature,
        "train_embeddings": arguments.train_embeddings,
        "tokens_per_sequence": data.tokens_per_sequence,
        "tokens": tokens,
        "corpora": data.records,
        "seed": trainer.args.seed,
        "optimizer": {"name": arguments.optimizer}
        | {
            name: str(getattr(trainer.args, name))
            for name in (
                "optim",
                "learning_rate",
                "weight_decay",
                "adam_beta2",
                "lr_scheduler_type",
                "warmup_steps",
            )
        },
        "precision": "bf16 autocast" if trainer.args.bf16 else "fp32",
        "gpu": device_name(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "accelerate")}
        | {"python": platform.python_version()},
        "commit": commit()[0],
        "wall_s": round(wall_s, 1),
        "log": trainer.state.log_history,
    }
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n")
    logger.warning("saved %s after %.0f s and %d tokens", folder, wall_s, tokens)


if __name__ == "__main__":
    main()
