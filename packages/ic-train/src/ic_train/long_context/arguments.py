"""The keys of a recipe for long-context training, and what values they accept.

Beside these, every field of transformers' TrainingArguments is a key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import util
from pathlib import Path

from ic_model import ICConfig
from ic_model.presets import preset_names
from transformers import TrainingArguments

from ic_train.context_parallel import MLA_PREFILL, RING
from ic_train.context_parallel.layout import chunk_tokens
from ic_train.long_context.documents import Packing
from ic_train.profiling import UNPROFILED_STEPS


@dataclass
class LongContextModelArguments:
    """Which model is trained, and what of it.

    Args:
        model: a checkpoint's folder, or a preset's name for random weights.
        attn_implementation: "mla_prefill" for ic-model's kernels, "mla_prefill_KERNEL" for one of them by name, or
            "sdpa", "eager" and what else transformers knows.
        linear_loss: "liger", "chunked" (TRL's) or "full" (PyTorch's, with all logits at once); "auto": Liger's
            on a GPU, else TRL's.
        feed_forward: "liger" (one kernel for the activation) or "plain" (PyTorch's); "auto": Liger's on a GPU,
            unless torch.compile is on, which fuses PyTorch's.
        context_tokens: the context that the model is to have; 0: as it is.
        yarn_factor: how much YaRN stretches its positions, relative to original_context_tokens; 1: not.
        original_context_tokens: what the model was trained on before any extension.
        lora_rank: rank of LoRA adapters (PEFT); 0 trains all weights.
        lora_alpha: their scale.
        lora_target_modules: names of the projections that get one.
    """

    model: str = ""
    attn_implementation: str = MLA_PREFILL
    linear_loss: str = "auto"
    feed_forward: str = "auto"
    context_tokens: int = 0
    yarn_factor: float = 1.0
    original_context_tokens: int = 0
    lora_rank: int = 0
    lora_alpha: float = 32.0
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_a_proj", "q_b_proj", "q_proj", "kv_a_proj_with_mqa", "o_proj"]
    )


@dataclass
class LongContextDataArguments:
    """What it is trained on.

    Args:
        task: "text" for this kind of training.
        corpora: folders that `ic-train data text` made, with the model's tokenizer.
        corpus_weights: share of each corpus; default: by its tokens.
        tokens_per_sequence: length of the packed sequences.
        cross_document_attention: whether tokens see documents packed before their own.
        long_document_tokens: documents of at least so many tokens count as long; 0: half a sequence.
        long_document_share: share of the sequences that are made of long documents; negative: as they come.
        pose_window_tokens: positions jump ahead up to this length (PoSE); 0: they do not.
    """

    task: str = "text"
    corpora: list[str] = field(default_factory=list)
    corpus_weights: list[float] = field(default_factory=list)
    tokens_per_sequence: int = 8192
    cross_document_attention: bool = True
    long_document_tokens: int = 0
    long_document_share: float = -1.0
    pose_window_tokens: int = 0

    def packing(self, seed: int) -> Packing:
        """The same for the data set."""
        return Packing(
            tokens_per_sequence=self.tokens_per_sequence,
            cross_document_attention=self.cross_document_attention,
            long_document_tokens=self.long_document_tokens,
            long_document_share=self.long_document_share,
            skipped_window_tokens=self.pose_window_tokens,
            seed=seed,
        )


@dataclass
class LongContextRunArguments:
    """How it runs.

    Args:
        context_parallel_size: processes that share a sequence, by ring attention.
        resume: "auto" to go on from the output folder's last whole checkpoint if there is one, or a checkpoint's
            folder.
        background_checkpoints: whether training goes on while a checkpoint is written.
        save_final_model: whether the output folder becomes a model at the end; sweeps may not want it.
        profile_steps: after the first three steps so many are profiled: `profile.txt` in the output folder says
            which kernels took how long, `trace.json.gz` opens in https://ui.perfetto.dev; 0: none.
    """

    context_parallel_size: int = 1
    resume: str = ""
    background_checkpoints: bool = True
    save_final_model: bool = True
    profile_steps: int = 0


def check_model(arguments: LongContextModelArguments) -> None:
    """Refuse a model that cannot be trained.

    Raises:
        ValueError: a field has a value that is not accepted.
    """
    if arguments.model not in preset_names() and not (Path(arguments.model) / "config.json").is_file():
        raise ValueError(
            f"model is {arguments.model!r}; accepted: a checkpoint's folder, or a preset "
            f"({', '.join(preset_names())}) for random weights"
        )
    if arguments.lora_rank < 0:
        raise ValueError(f"lora_rank is {arguments.lora_rank}; it must be at least 0")
    if arguments.lora_rank and util.find_spec("peft") is None:
        raise ValueError(
            f"lora_rank is {arguments.lora_rank}, which needs the package peft: pip install 'ic-train[lora]'"
        )


def check_lengths(config: ICConfig, data: LongContextDataArguments, run: LongContextRunArguments) -> None:
    """Refuse sequences that the model has no positions for, or that cannot be shared.

    Args:
        config: after the extension.
        data: lengths.
        run: processes per sequence.

    Raises:
        ValueError: a field has a value that is not accepted.
    """
    longest = config.max_position_embeddings
    for name, tokens in (
        ("tokens_per_sequence", data.tokens_per_sequence),
        ("pose_window_tokens", data.pose_window_tokens),
    ):
        if tokens > longest:
            raise ValueError(
                f"{name} is {tokens}; the model takes {longest} (max_position_embeddings): set context_tokens, "
                "and yarn_factor with it"
            )
    chunk_tokens(data.tokens_per_sequence, run.context_parallel_size)


def check_training(
    model: LongContextModelArguments,
    data: LongContextDataArguments,
    run: LongContextRunArguments,
    training: TrainingArguments,
    *,
    sharded: bool,
) -> None:
    """Refuse what does not go together, or would be ignored.

    Args:
        model: see above.
        data: see above.
        run: see above.
        training: transformers' own.
        sharded: whether FSDP was asked for.

    Raises:
        ValueError: a field has a value that is not accepted.
    """
    if training.max_steps < 1:
        raise ValueError(f"max_steps is {training.max_steps}; it must be at least 1: steps decide the budget")
    if run.profile_steps < 0:
        raise ValueError(f"profile_steps is {run.profile_steps}; it must be at least 0")
    needed = UNPROFILED_STEPS + run.profile_steps
    if run.profile_steps and training.max_steps < needed:
        raise ValueError(
            f"profile_steps is {run.profile_steps}, which needs max_steps of {needed} or more; it is "
            f"{training.max_steps}"
        )
    if str(training.eval_strategy.value) != "no":
        raise ValueError(
            f"eval_strategy is {training.eval_strategy.value!r}; it must be 'no': evaluate checkpoints by a "
            "job of their own (slurm/evaluate.sbatch)"
        )
    if training.save_only_model:
        raise ValueError(
            "save_only_model is true; it must be false: `python -m ic_train.checkpoints.export` does it"
        )
    if training.resume_from_checkpoint:
        raise ValueError(
            f"resume_from_checkpoint is {training.resume_from_checkpoint!r}; leave it out and set resume"
        )
    if (training.gradient_checkpointing_kwargs or {}).get("offload") and training.device.type == "cpu":
        raise ValueError(
            "gradient_checkpointing_kwargs has offload: it moves activations from a GPU to the CPU, and there "
            "is no GPU here; leave it out"
        )
    if run.context_parallel_size > 1:
        if training.per_device_train_batch_size != 1:
            raise ValueError(
                f"per_device_train_batch_size is {training.per_device_train_batch_size}; with "
                f"context_parallel_size {run.context_parallel_size} it must be 1"
            )
        if model.attn_implementation not in (MLA_PREFILL, RING):
            raise ValueError(
                f"attn_implementation is {model.attn_implementation!r}; with context_parallel_size "
                f"{run.context_parallel_size} it must be {MLA_PREFILL!r}"
            )
    packed = model.attn_implementation.startswith((MLA_PREFILL, RING))
    if not data.cross_document_attention and not packed:
        raise ValueError(
            f"cross_document_attention is false; attn_implementation must then be {MLA_PREFILL!r}, not "
            f"{model.attn_implementation!r}, which would need a mask of tokens_per_sequence squared"
        )
    check_optimiser(str(getattr(training.optim, "value", training.optim)), sharded=sharded)


def check_optimiser(optimiser: str, *, sharded: bool) -> None:
    """Refuse an optimiser that is not installed, or cannot be sharded.

    Args:
        optimiser: transformers' name of it.
        sharded: whether FSDP was asked for.

    Raises:
        ValueError: says what is missing.
    """
    of_torchao = optimiser.endswith(("torch_8bit", "torch_4bit"))
    of_bitsandbytes = ("8bit" in optimiser and not of_torchao) or "paged" in optimiser
    if sharded and of_bitsandbytes:
        raise ValueError(
            f"optim is {optimiser!r}, whose states cannot be sharded; under FSDP take adamw_torch_fused or "
            "adamw_torch_8bit, or train without FSDP"
        )
    for wanted, package in ((of_torchao, "torchao"), (of_bitsandbytes, "bitsandbytes")):
        if wanted and util.find_spec(package) is None:
            raise ValueError(
                f"optim is {optimiser!r}, which needs the package {package}: pip install 'ic-train[gpu]'"
            )
