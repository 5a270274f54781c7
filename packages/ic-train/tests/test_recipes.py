"""Recipes of long-context training parse, fit their models, and have the budgets that they state."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from ic_model import ICConfig
from ic_model.presets import preset
from training_runs import PACKAGE
from transformers import TrainingArguments
from trl import TrlParser

from ic_train import dpo
from ic_train.long_context.arguments import (
    LongContextDataArguments,
    LongContextModelArguments,
    LongContextRunArguments,
    check_training,
)
from ic_train.long_context.extension import check_extension

RECIPES = sorted(path for path in (PACKAGE / "recipes").glob("*/extend*.yaml"))
KINDS = (LongContextModelArguments, LongContextDataArguments, LongContextRunArguments, TrainingArguments)
# processes of a launcher's configuration
GPUS = {"one-gpu.yaml": 1, "one-node.yaml": 8}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_recipe_is_what_its_head_says(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    flags = ["--config", str(path), "--model", path.parent.name, "--output_dir", str(tmp_path)]
    # a GPU's options are parsed on the CPU
    flags += ["--bf16", "false", "--use_cpu", "true", "--gradient_checkpointing_kwargs", "{}"]
    model, data, run, training = TrlParser(KINDS).parse_args_and_config(flags)
    check_training(model, data, run, training, sharded=True)
    check_extension(
        preset(model.model), model.context_tokens, model.yarn_factor, model.original_context_tokens
    )
    data.packing(1)
    longest = max(data.tokens_per_sequence, data.pose_window_tokens)
    assert longest == model.context_tokens == model.yarn_factor * model.original_context_tokens
    assert f"{model.context_tokens:,}" in text.splitlines()[0]
    launcher = re.search(r"accelerate/(\S+\.yaml)", text)
    assert launcher is not None and f"recipes/{path.parent.name}/{path.name}" in text
    shared = GPUS[launcher[1]] // run.context_parallel_size
    sequences = training.gradient_accumulation_steps * shared
    assert f"{sequences} sequences a step" in text
    tokens = training.max_steps * sequences * data.tokens_per_sequence / 1e9
    assert f"are {tokens:.2f} billion tokens" in text, f"{tokens:.2f}"
    assert f"{training.max_steps:,} steps" in text
    assert "arXiv" in text or "extend-32k.yaml" in text or "heal.yaml" in text


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "recipes").glob("*/dpo.yaml")), ids=lambda path: path.parent.name
)
def test_a_preference_recipe_trains(path: Path, tmp_path: Path) -> None:
    ICConfig().save_pretrained(tmp_path / "model")
    flags = ["--config", str(path), "--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    # the pairs are the user's
    flags += ["--preferences", "pairs"]
    # a GPU's options are parsed on the CPU
    flags += ["--bf16", "false", "--use_cpu", "true"]
    kinds = (dpo.PreferenceArguments, dpo.PreferenceTrainingArguments)
    arguments, training = TrlParser(kinds).parse_args_and_config(flags)
    dpo.check(arguments, training)
    # the prompts are as long as the data
    assert training.max_length is None
    text = path.read_text()
    assert f"recipes/{path.parent.name}/dpo.yaml" in text and "ic-train data preferences" in text
    assert ("arXiv" in text) == (arguments.objective != "dpo")
    launcher = re.search(r"accelerate/(\S+\.yaml)", text)
    pairs = re.search(r"# (\d+) pairs a step on (\d+) GPUs", text)
    if launcher is not None and pairs is not None:
        assert int(pairs[2]) == GPUS[launcher[1]]
        assert int(pairs[1]) == int(pairs[2]) * training.gradient_accumulation_steps


@pytest.mark.parametrize("path", sorted((PACKAGE / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_launcher_configurations_shard_with_fsdp2(path: Path) -> None:
    fields = yaml.safe_load(path.read_text())
    # the launcher's own reader refuses keys that it does not know
    assert load_config_from_file(str(path)).num_processes == fields["num_processes"]
    assert fields["distributed_type"] == "FSDP" and fields["fsdp_config"]["fsdp_version"] == 2
    if path.name != "cpu.yaml":
        assert fields["mixed_precision"] == "bf16"
    sizes = fields.get("parallelism_config")
    if sizes:
        shards = sizes["parallelism_config_dp_replicate_size"] * sizes["parallelism_config_dp_shard_size"]
        assert shards == fields["num_processes"]
