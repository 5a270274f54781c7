"""Build the model that a recipe names: weights, extension, adapters, loss."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from ic_model import ICConfig, ICForCausalLM
from ic_model.presets import preset, preset_names
from torch import nn
from transformers import AutoTokenizer

from ic_train.checkpoints.folders import read_record
from ic_train.data.text import RECORD_FILE
from ic_train.distributed import rank
from ic_train.evaluation.command import weights_fingerprint
from ic_train.long_context.arguments import LongContextModelArguments
from ic_train.long_context.extension import check_extension, extend_context

logger = logging.getLogger(__name__)


def load_config(arguments: LongContextModelArguments) -> ICConfig:
    """The configuration before any extension."""
    name = arguments.model
    if name in preset_names() and not (Path(name) / "config.json").is_file():
        return preset(name)
    return ICConfig.from_pretrained(name)


def build_model(arguments: LongContextModelArguments) -> ICForCausalLM:
    """The model in float32, extended, without adapters and without a loss.

    Random weights depend on the random state, so that all ranks have to have the same.

    Raises:
        ValueError: the extension does not fit the model.
    """
    config = load_config(arguments)
    context = arguments.context_tokens or config.max_position_embeddings
    extension: dict[str, Any] = {
        "context_tokens": context,
        "factor": arguments.yarn_factor,
        "original_context_tokens": arguments.original_context_tokens,
    }
    # before gigabytes are read
    check_extension(config, context, arguments.yarn_factor, arguments.original_context_tokens)
    if Path(arguments.model).is_dir():
        model = ICForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    else:
        model = ICForCausalLM(config)
    extend_context(model, model.config, **extension)
    return model


def add_adapters(model: ICForCausalLM, arguments: LongContextModelArguments) -> Any:
    """The model with LoRA adapters (PEFT), or as it is where none are asked for.

    Raises:
        ValueError: no projection of the model is among the target modules.
    """
    if not arguments.lora_rank:
        return model
    return import_module("peft").get_peft_model(model, lora_config(model, arguments))


def lora_config(model: ICForCausalLM, arguments: LongContextModelArguments) -> Any:
    """PEFT's description of the adapters.

    Raises:
        ValueError: no projection of the model is among the target modules.
    """
    names = {name.rsplit(".", 1)[-1] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    targets = [name for name in arguments.lora_target_modules if name in names]
    if not targets:
        raise ValueError(
            f"lora_target_modules is {arguments.lora_target_modules}; the model has {sorted(names)}"
        )
    return import_module("peft").LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )


def save_model(folder: str | Path, arguments: LongContextModelArguments, weights: Mapping[str, Any]) -> None:
    """Write a plain Hugging Face folder in bfloat16: weights with adapters merged, configuration, tokenizer.

    Args:
        folder: to write to.
        arguments: that the model was built by.
        weights: its whole state; with adapters, at least theirs.
    """
    model: Any = build_model(arguments)
    if arguments.lora_rank:
        model = add_adapters(model, arguments)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected, unexpected
        assert not any("lora_" in name for name in missing), missing
        model = model.merge_and_unload()
    else:
        model.load_state_dict(weights, strict=False)
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(folder)
    source = Path(arguments.model)
    if (source / "tokenizer_config.json").is_file():
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def described(arguments: LongContextModelArguments) -> dict[str, Any]:
    """The arguments as JSON has them, with an absolute path: a checkpoint is exported from anywhere."""
    fields = asdict(arguments)
    if Path(arguments.model).is_dir():
        fields["model"] = str(Path(arguments.model).resolve())
    return fields


def identity_of(arguments: LongContextModelArguments) -> dict[str, Any]:
    """What of the arguments may not change when a run is resumed: kernels may, and folders may have moved."""
    fields: dict[str, Any] = asdict(arguments)
    fields |= {"model": Path(arguments.model).name, "attn_implementation": None}
    # not in the checkpoints of before there was a choice
    del fields["feed_forward"]
    return fields


def fingerprints(sources: Mapping[str, Sequence[str]]) -> dict[str, list[str | None]]:
    """Tell what a run begins with from other models and texts of the same names; little of them is read.

    Args:
        sources: by the recipe's field, paths of checkpoints and of folders that `ic-train data text` made.

    Returns:
        by field, SHA-256 for each path; None where it is no folder but the name of a preset.
    """
    return {name: [_fingerprint(Path(path)) for path in paths] for name, paths in sources.items()}


def check_sources(checkpoint: Path, sources: Mapping[str, Sequence[str]]) -> None:
    """Refuse to resume where a folder now holds something else under its name.

    Args:
        checkpoint: to resume from; one whose record has no `sources` is let through with a warning.
        sources: of `fingerprints`.

    Raises:
        ValueError: the run did not begin with these.
    """
    saved = read_record(checkpoint).get("sources")
    if saved is None:
        if rank() == 0:
            logger.warning("%s does not say what its run began with: %s not compared", checkpoint, [*sources])
        return
    for name, found in fingerprints(sources).items():
        if found != saved.get(name):
            raise ValueError(
                f"{name} is {', '.join(sources[name]) or 'empty'}; the run of {checkpoint} began with something "
                "else, though under the same name: give what it began with, or begin anew in another output_dir"
            )


def _fingerprint(folder: Path) -> str | None:
    if (folder / RECORD_FILE).is_file():
        # has a digest of the text
        return hashlib.sha256((folder / RECORD_FILE).read_bytes()).hexdigest()
    return weights_fingerprint(folder) if folder.is_dir() else None
