"""Preference training on long contexts with TRL's DPOTrainer.

    accelerate launch -m ic_train.dpo --config packages/ic-train/recipes/ic-nano/dpo.yaml

The recipe's keys are the fields of the dataclasses below and of TRL's DPOConfig; any key can also be given as a
flag, and a flag wins over the recipe.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from ic_model import ICConfig
from torch import distributed as dist
from transformers import (
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from trl import DPOConfig, TrlParser

from ic_train.checkpoints import CheckpointWriter
from ic_train.checkpoints.folders import read_record
from ic_train.context_parallel import register_attention
from ic_train.data.packing import PackedText
from ic_train.distributed import (
    allow_fsdp_on_cpu,
    compile_by_block,
    cpu_group,
    from_first_process,
    fsdp_was_asked_for,
    rank,
    world_size,
)
from ic_train.long_context.arguments import LongContextModelArguments, check_model, check_optimiser
from ic_train.long_context.documents import open_corpora
from ic_train.long_context.models import (
    build_model,
    check_sources,
    described,
    fingerprints,
    identity_of,
    lora_config,
)
from ic_train.preemption import StopOnSignal
from ic_train.preferences.store import Preferences, load_preferences
from ic_train.runs import RUN_FILE, resume_point, run_record, save_final_model
from ic_train.tracking import LocalMetrics, guard_trackers, prepare_trackers
from ic_train.trainers.feed_forward import choose_feed_forward, fuse_feed_forward
from ic_train.trainers.finite import NonFiniteLossError
from ic_train.trainers.long_context import keep_sums_in_float32
from ic_train.trainers.preferences import OBJECTIVES, PairCollator, PreferenceTrainer

logger = logging.getLogger(__name__)


@dataclass
class PreferenceArguments:
    """What is learnt, and from what.

    Args:
        model: a checkpoint's folder.
        preferences: folder that `ic-train data preferences` made, with the model's tokenizer.
        validation_pairs: pairs that are not trained on, and measured instead where `eval_strategy` says so; as
            many more as the last context has, for pairs of a context are on one side.
        objective: "dpo", "solopo" or "longpo"; see trainers.preferences.
        alignment_weight: of the second term of "solopo".
        text_corpora: folders that `ic-train data text` made, with the model's tokenizer: every pair then comes
            with a sequence of text, whose loss is added, so that the model keeps what it knows; empty: none.
        text_weight: of that loss, the mean over its tokens.
        text_tokens: per sequence of it.
        attn_implementation: "mla_prefill" for ic-model's kernels, or "sdpa", "eager".
        lora_rank: rank of LoRA adapters (PEFT); 0 trains all weights.
        lora_alpha: their scale.
        lora_target_modules: names of the projections that get one.
        resume: "auto" to go on from the output folder's last whole checkpoint if there is one, or a checkpoint's
            folder.
        background_checkpoints: whether training goes on while a checkpoint is written.
    """

    model: str = ""
    preferences: str = ""
    validation_pairs: int = 0
    objective: str = "dpo"
    alignment_weight: float = 1.0
    text_corpora: list[str] = field(default_factory=list)
    text_weight: float = 1.0
    text_tokens: int = 1024
    attn_implementation: str = "mla_prefill"
    lora_rank: int = 0
    lora_alpha: float = 32.0
    lora_target_modules: list[str] = field(
        default_factory=lambda: LongContextModelArguments().lora_target_modules
    )
    resume: str = ""
    background_checkpoints: bool = True

    @property
    def sources(self) -> dict[str, list[str]]:
        """Folders whose content may not change when the run is resumed, by field; pairs have a digest."""
        return {"model": [self.model], "text_corpora": self.text_corpora}

    def of_model(self) -> LongContextModelArguments:
        """The same, as the functions that build and save models take it."""
        return LongContextModelArguments(
            model=self.model,
            attn_implementation=self.attn_implementation,
            lora_rank=self.lora_rank,
            lora_alpha=self.lora_alpha,
            lora_target_modules=self.lora_target_modules,
        )


@dataclass
class PreferenceTrainingArguments(DPOConfig):
    """TRL's, with other defaults.

    Args:
        max_length: most tokens of a prompt with its answer. TRL's default of 1,024 would drop long pairs without
            a word; here there is no limit, and one that a pair exceeds is refused.
        precompute_ref_log_probs: must be true.
    """

    max_length: int | None = None
    precompute_ref_log_probs: bool = True


class WallTime(TrainerCallback):
    """Adds up the seconds of training over a run's starts; what is lost with a start is not among them.

    Args:
        record: what checkpoints say; `wall_s` is added to it.
        checkpoint: that the run goes on from, or None.
    """

    def __init__(self, record: dict[str, Any], checkpoint: Path | None) -> None:
        self.record = record
        self._before_s = 0.0
        if checkpoint is not None:
            before = read_record(checkpoint).get("wall_s")
            if before is None and rank() == 0:
                logger.warning("%s does not say how long its run took: wall_s begins with it", checkpoint)
            self._before_s = before or 0.0
        self._started = time.perf_counter()

    @property
    def wall_s(self) -> float:
        """Seconds up to now."""
        return round(self._before_s + time.perf_counter() - self._started, 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note them, before a checkpoint of this step."""
        self.record["wall_s"] = self.wall_s


def main(arguments: list[str] | None = None) -> None:
    """Train as the recipe says, and leave a plain model folder with its record in the output folder."""
    try:
        parser = TrlParser((PreferenceArguments, PreferenceTrainingArguments))  # type: ignore[arg-type]
        parsed: Any = parser.parse_args_and_config(arguments)
        check(*parsed)
        train(*parsed)
    except (ValueError, NonFiniteLossError) as error:
        sys.exit(f"error: {error}")


def check(arguments: PreferenceArguments, training: PreferenceTrainingArguments) -> None:
    """Refuse what does not go together, or would be ignored.

    Raises:
        ValueError: a field has a value that is not accepted.
    """
    check_model(arguments.of_model())
    if not (Path(arguments.model) / "config.json").is_file():
        raise ValueError(f"model is {arguments.model!r}; accepted: a checkpoint's folder")
    if not arguments.preferences:
        raise ValueError("preferences is ''; accepted: a folder that `ic-train data preferences` made")
    if arguments.objective not in OBJECTIVES:
        raise ValueError(f"objective is {arguments.objective!r}; accepted: {', '.join(OBJECTIVES)}")
    if arguments.alignment_weight < 0:
        raise ValueError(f"alignment_weight is {arguments.alignment_weight}; it must be at least 0")
    if arguments.objective != "solopo" and arguments.alignment_weight != PreferenceArguments.alignment_weight:
        raise ValueError(
            f"alignment_weight is {arguments.alignment_weight}; it has no effect with objective "
            f"{arguments.objective!r}: leave it out"
        )
    _check_text(arguments)
    if arguments.validation_pairs < 0:
        raise ValueError(f"validation_pairs is {arguments.validation_pairs}; it must be at least 0")
    validates = str(training.eval_strategy.value) != "no"
    if validates != (arguments.validation_pairs > 0):
        raise ValueError(
            f"eval_strategy is {training.eval_strategy.value!r} and validation_pairs is "
            f"{arguments.validation_pairs}; set both or neither"
        )
    if arguments.objective == "solopo" and training.ld_alpha is not None:
        raise ValueError(f"ld_alpha is {training.ld_alpha}; with objective 'solopo' it must be left out")
    wanted = {
        "precompute_ref_log_probs": True,
        "sync_ref_model": False,
        "padding_free": False,
        "use_liger_kernel": False,
        "save_only_model": False,
        "model_init_kwargs": None,
        "resume_from_checkpoint": None,
    }
    for name, value in wanted.items():
        if (given := getattr(training, name)) != value:
            raise ValueError(f"{name} is {given!r}; it must be {value!r}, or left out")
    shared = getattr(training.parallelism_config, "cp_size", 1) if training.parallelism_config else 1
    if shared > 1:
        raise ValueError(
            f"parallelism_config has cp_size {shared}; it must be 1: a pair is on one GPU. Train on shorter "
            "pairs, with objective 'solopo' or 'longpo'"
        )
    check_optimiser(str(getattr(training.optim, "value", training.optim)), sharded=fsdp_was_asked_for())


def _check_text(arguments: PreferenceArguments) -> None:
    for name, accepted, is_accepted in (
        ("text_weight", "above 0", arguments.text_weight > 0),
        ("text_tokens", "at least 2", arguments.text_tokens >= 2),
    ):
        value = getattr(arguments, name)
        if not is_accepted:
            raise ValueError(f"{name} is {value}; it must be {accepted}")
        if not arguments.text_corpora and value != getattr(PreferenceArguments, name):
            raise ValueError(f"{name} is {value}; it has no effect without text_corpora: leave it out")


def check_lengths(
    pairs: Preferences,
    arguments: PreferenceArguments,
    training: PreferenceTrainingArguments,
    config: ICConfig,
) -> int:
    """Tokens of the longest pair, prompt with the longer answer.

    Raises:
        ValueError: pairs are longer than the model or `max_length` takes; says how many.
    """
    lengths = pairs.prompt_tokens + pairs.answer_tokens
    for name, limit in (
        ("max_length", training.max_length),
        (f"max_position_embeddings of {Path(arguments.model).name}", config.max_position_embeddings),
    ):
        if limit is not None and (lost := int((lengths > limit).sum())):
            raise ValueError(
                f"{name} is {limit}; {lost} of {len(pairs)} pairs of {arguments.preferences} are longer and "
                f"would be cut or lost: the longest has {lengths.max()} tokens"
            )
    return int(lengths.max())


def train(arguments: PreferenceArguments, training: PreferenceTrainingArguments) -> PreferenceTrainer:
    """Run the recipe.

    Raises:
        ValueError: model, pairs and processes do not go together, or the checkpoint is of another run.
        NonFiniteLossError: the loss is no number.
    """
    # would hide what the run has to stop at, and waits for the GPU at every step
    training.logging_nan_inf_filter = False
    # starts the process group, which what follows needs
    _ = training.device
    allow_fsdp_on_cpu()
    compile_by_block(training.torch_compile)
    register_attention()
    # one for what ranks agree on in training, one for saves, which run beside it in a thread
    group, saving_group = cpu_group(), cpu_group()
    set_seed(training.seed)
    model = _model(arguments, training)
    pairs = load_preferences(arguments.preferences, model.config.vocab_size)
    longest = check_lengths(pairs, arguments, training, model.config)
    text = _text(arguments, training, model.config)
    parts = _split(pairs, arguments, training, group)
    record = _record(arguments, training, pairs, parts, longest)
    resume = resume_point(arguments.resume, training.output_dir, record["identity"], group)
    if resume is not None:
        check_sources(resume, arguments.sources)
    saved = {**record["identity"], "sources": record["sources"]}
    prepare_trackers(training)
    stop = StopOnSignal(group)
    trainer = PreferenceTrainer(
        alignment_weight=arguments.alignment_weight,
        text_weight=arguments.text_weight,
        model=model,
        # under FSDP the model is not sharded before training, so that the reference is one of its own for so long
        ref_model=_model(arguments, training) if fsdp_was_asked_for() else None,
        args=training,
        train_dataset=parts["training"],
        eval_dataset=parts.get("validation"),
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        data_collator=PairCollator(pairs, arguments.objective, text),
        peft_config=lora_config(model, arguments.of_model()) if arguments.lora_rank else None,
        callbacks=[stop, LocalMetrics()],
    )
    trainer.ref_model = None
    keep_sums_in_float32(trainer.accelerator.state)
    trainer.keep_whole(
        group=group,
        writer=CheckpointWriter(
            training.output_dir,
            saving_group,
            keep=training.save_total_limit,
            background=arguments.background_checkpoints,
        ),
        record=saved,
        files={RUN_FILE: json.dumps(described(arguments.of_model()), indent=1) + "\n"},
    )
    guard_trackers(trainer.callback_handler, _facts(record))
    clock = WallTime(saved, resume)
    trainer.add_callback(clock)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    record["wall_s"] = clock.wall_s
    if stop.stopped:
        stop.hand_over(trainer)
    else:
        save_final_model(trainer, arguments.of_model(), record, group)
    # a process that leaves while the others still write takes their connections with it
    trainer.accelerator.wait_for_everyone()
    return trainer


def _model(arguments: PreferenceArguments, training: PreferenceTrainingArguments) -> Any:
    model = build_model(arguments.of_model())
    model.set_attn_implementation(arguments.attn_implementation)
    block = choose_feed_forward("auto", training.device, compiled=training.torch_compile)
    return fuse_feed_forward(model, block)


def _text(
    arguments: PreferenceArguments, training: PreferenceTrainingArguments, config: ICConfig
) -> PackedText | None:
    if not arguments.text_corpora:
        return None
    if arguments.text_tokens > config.max_position_embeddings:
        raise ValueError(
            f"text_tokens is {arguments.text_tokens}; the model takes {config.max_position_embeddings} "
            "(max_position_embeddings)"
        )
    corpora = open_corpora(arguments.text_corpora, config.vocab_size, name="text_corpora")
    return PackedText(
        corpora, tokens_per_sequence=arguments.text_tokens, seed=training.seed, name="text_tokens"
    )


def _split(
    pairs: Preferences, arguments: PreferenceArguments, training: PreferenceTrainingArguments, group: Any
) -> dict[str, datasets.Dataset]:
    """The numbers of the pairs to train on and to measure, as data sets on the disk.

    TRL keeps the reference's log-probabilities beside them, under a name made of `_fingerprint` and the weights:
    the next run with the same pairs, objective and model finds them.
    """
    train_on, measure = pairs.split(arguments.validation_pairs, training.seed)
    if rank() == 0 and len(measure) != arguments.validation_pairs:
        logger.warning(
            "validation_pairs is %d; %d are measured, which is all of %d contexts",
            *(arguments.validation_pairs, len(measure), pairs.contexts(measure)),
        )
    made: dict[str, Any] = {}
    for name, chosen in (("training", train_on), ("validation", measure)):
        if not chosen:
            continue
        content = json.dumps([pairs.digest, arguments.objective, training.ld_alpha, chosen])
        fingerprint = hashlib.sha256(content.encode()).hexdigest()[:32]
        folder = Path(training.output_dir) / "reference" / fingerprint
        if rank() == 0 and not folder.is_dir():
            dataset = datasets.Dataset.from_dict({"pair": chosen})
            dataset._fingerprint = fingerprint
            dataset.save_to_disk(folder.with_suffix(".partial"))
            folder.with_suffix(".partial").rename(folder)
        from_first_process(None, group)
        made[name] = datasets.load_from_disk(folder)
    return made


def _record(
    arguments: PreferenceArguments,
    training: PreferenceTrainingArguments,
    pairs: Preferences,
    parts: dict[str, datasets.Dataset],
    longest: int,
) -> dict[str, Any]:
    """What a run is: `identity` is what may not change when it is resumed."""
    identity = {
        "model": identity_of(arguments.of_model()),
        "pairs": pairs.digest,
        "training_pairs": len(parts["training"]),
        "objective": arguments.objective,
        "alignment_weight": arguments.alignment_weight,
        "loss": [training.loss_type, training.loss_weights, training.beta],
        "pairs_per_step": (
            training.per_device_train_batch_size * training.gradient_accumulation_steps * world_size()
        ),
        "seed": training.seed,
    }
    if "validation" in parts:
        measured = parts["validation"]["pair"]
        # a checkpoint of before contexts were kept whole was split otherwise, unless each pair has one of its own
        if (contexts := pairs.contexts(measured)) < len(measured):
            identity["validation_contexts"] = contexts
    if arguments.text_corpora:
        names = [Path(path).name for path in arguments.text_corpora]
        identity["text"] = [names, arguments.text_weight, arguments.text_tokens]
    return {
        **run_record("ic_train.dpo", identity),
        "sources": fingerprints(arguments.sources),
        "validation_pairs": len(parts.get("validation", ())),
        "longest_pair_tokens": longest,
        "pairs_by_kind": pairs.counts(),
    }


def _facts(record: dict[str, Any]) -> dict[str, Any]:
    """What trackers are told beside transformers' arguments."""
    identity = record["identity"]
    return {
        "git_commit": record["commit"],
        "command": record["command"],
        "processes": record["processes"],
        "objective": identity["objective"],
        "pairs": identity["pairs"],
        "pairs_per_step": identity["pairs_per_step"],
        "longest_pair_tokens": record["longest_pair_tokens"],
        **{f"version_{name}": value for name, value in record["versions"].items()},
    }


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
