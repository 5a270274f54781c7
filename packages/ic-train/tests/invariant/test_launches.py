"""Launches that have to give the same loss and gradient norm at every step, and the values that they gave.

`golden.json` has the values with the versions that made them. After a change that is meant to change them:

    PYTHONPATH=packages/ic-train/tests python packages/ic-train/tests/invariant/test_launches.py
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from ic_model.testing import assert_close
from safetensors.torch import load_file
from training_runs import PATIENT, Run, launch_all, make_toys, steps_of, values

from ic_train.checkpoints import export

pytestmark = PATIENT

GOLDEN = Path(__file__).parent / "golden.json"
MASKED = ["--cross_document_attention", "false"]
# accelerate's launcher sets these from accelerate/hybrid.yaml; here two nodes of two processes
HYBRID = {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
    "PARALLELISM_CONFIG_TP_SIZE": "1",
    "PARALLELISM_CONFIG_CP_SIZE": "1",
}
# only the first process reads the weights
LEAN = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
# compiled block by block; in this process, since a pool of compilers costs more than there is to compile
COMPILED = ["--torch_compile", "true"], {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
BFLOAT16, HALF = ["--bf16", "true"], {"ACCELERATE_MIXED_PRECISION": "bf16"}
# 8 sequences a step in all of them
SAME = {
    "documents see each other": [
        *("one", "batch", "full", "checkpointed", "alone"),
        *("two", "lean", "two-ring", "hybrid", "four-ring"),
        *("one-compiled", "alone-compiled", "alone-compiled-checkpointed"),
    ],
    "documents apart": ["one-apart", "two-ring-apart", "four-ring-apart"],
}


def accumulate(steps: int) -> list[str]:
    return ["--gradient_accumulation_steps", str(steps)]


def ring(size: int) -> list[str]:
    return ["--context_parallel_size", str(size)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_all(tmp_path_factory.mktemp("invariant"))


def run_all(root: Path) -> dict[str, Any]:
    toys = make_toys(root)
    saved = ["--resume", str(toys["runs"] / "two" / "checkpoint-3")]
    plans = {
        2: [
            Run("two", accumulate(4)),
            Run("two-resumed", [*accumulate(4), *saved]),
            Run("lean", accumulate(4), LEAN),
            Run("two-ring", ring(2)),
            Run("two-ring-apart", [*ring(2), *MASKED]),
            Run("two-half", [*accumulate(4), *BFLOAT16], HALF),
            Run("two-ring-half", [*ring(2), *BFLOAT16], HALF),
        ],
        1: [
            Run("one"),
            Run("batch", ["--per_device_train_batch_size", "8", *accumulate(1)]),
            Run("full", ["--linear_loss", "full", "--attn_implementation", "sdpa"]),
            Run("checkpointed", ["--gradient_checkpointing", "true"]),
            Run("one-apart", MASKED),
            # other kernels are no other run
            Run("one-resumed", [*saved, "--linear_loss", "full", "--attn_implementation", "sdpa"]),
            Run("wrong-resume", [*accumulate(4), *saved]),
            Run("one-compiled", *COMPILED),
        ],
        # as on a single GPU
        "1 sharded": [
            Run("alone"),
            Run("alone-resumed", saved),
            Run("alone-half", BFLOAT16, HALF),
            Run("alone-compiled", *COMPILED),
            Run(
                "alone-compiled-checkpointed",
                [*COMPILED[0], "--gradient_checkpointing", "true"],
                COMPILED[1],
            ),
        ],
        4: [
            Run("hybrid", accumulate(2), HYBRID),
            Run("four-ring", ring(4)),
            Run("four-ring-apart", [*ring(2), *accumulate(4), *MASKED]),
            Run("four-resumed", [*accumulate(2), *saved]),
        ],
    }
    errors = launch_all(toys, list(plans.items()))
    return {"runs": toys["runs"], "model": toys["model"], "errors": errors}


@pytest.mark.parametrize("kind", SAME)
def test_equal_launches_give_equal_losses(runs: dict[str, Any], kind: str) -> None:
    first = runs["runs"] / SAME[kind][0]
    assert len(steps_of(first)) == 6
    for name in SAME[kind][1:]:
        assert name not in runs["errors"], runs["errors"][name]
        for field in ("loss", "grad_norm"):
            # the order of sums differs, and nothing else
            assert values(runs["runs"] / name, field) == pytest.approx(values(first, field), rel=1e-5), (
                name,
                field,
            )


@pytest.mark.parametrize("name", ["alone-half", "two-half", "two-ring-half"])
def test_bfloat16_computes_in_8_bits_and_keeps_its_sums(runs: dict[str, Any], name: str) -> None:
    assert name not in runs["errors"], runs["errors"][name]
    losses = values(runs["runs"] / name, "loss")
    assert losses == pytest.approx(values(runs["runs"] / "one", "loss"), rel=2e-3)
    assert values(runs["runs"] / name, "grad_norm") == pytest.approx(
        values(runs["runs"] / "one", "grad_norm"), rel=2e-2
    )
    assert losses != [float(torch.tensor(loss, dtype=torch.bfloat16)) for loss in losses]


@pytest.mark.parametrize("kind", SAME)
def test_launches_give_the_committed_values(runs: dict[str, Any], kind: str) -> None:
    golden = json.loads(GOLDEN.read_text())["launches"][kind]
    for field in ("loss", "grad_norm"):
        assert values(runs["runs"] / SAME[kind][0], field) == pytest.approx(golden[field], rel=1e-4), field


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(runs: dict[str, Any]) -> None:
    whole, rest = steps_of(runs["runs"] / "two"), steps_of(runs["runs"] / "two-resumed")
    assert [step["step"] for step in rest] == [4, 5, 6]
    for name in ("loss", "grad_norm", "learning_rate", "tokens"):
        assert [step[name] for step in whole[3:]] == [step[name] for step in rest], name
    same = load_file(runs["runs"] / "two" / "model.safetensors")
    for name, value in load_file(runs["runs"] / "two-resumed" / "model.safetensors").items():
        assert torch.equal(value, same[name]), name


@pytest.mark.parametrize("name", ["one-resumed", "alone-resumed", "four-resumed"])
def test_a_checkpoint_continues_on_another_number_of_processes(runs: dict[str, Any], name: str) -> None:
    assert name not in runs["errors"], runs["errors"][name]
    whole, rest = steps_of(runs["runs"] / "two")[3:], steps_of(runs["runs"] / name)
    for field in ("loss", "grad_norm"):
        assert [step[field] for step in rest] == pytest.approx([step[field] for step in whole], rel=1e-5)


def test_a_resume_that_would_change_the_data_is_refused(runs: dict[str, Any]) -> None:
    message = runs["errors"]["wrong-resume"]
    assert "sequences_per_step is 4" in message and "was saved with 8" in message
    assert "change gradient_accumulation_steps" in message


def test_a_sharded_checkpoint_becomes_a_plain_folder(runs: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = runs["runs"] / "two" / "checkpoint-6"
    assert len(list(checkpoint.glob("*.distcp"))) == 2
    assert export.main([str(checkpoint), str(tmp_path / "plain")]) == 0
    exported = load_file(tmp_path / "plain" / "model.safetensors")
    same = load_file(runs["runs"] / "two" / "model.safetensors")
    assert exported.keys() == same.keys()
    for name, value in exported.items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, same[name]), name
    assert {"config.json", "tokenizer.json"} <= {file.name for file in (tmp_path / "plain").iterdir()}


@pytest.mark.parametrize("name", ["one-compiled", "alone-compiled"])
def test_a_compiled_run_leaves_the_same_weights_under_the_same_names(runs: dict[str, Any], name: str) -> None:
    expected = load_file(runs["runs"] / "one" / "model.safetensors")
    found = load_file(runs["runs"] / name / "model.safetensors")
    assert found.keys() == expected.keys()
    for weight, value in found.items():
        assert_close(value, expected[weight], "bf16_rounded")


def write_golden() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    root = Path(tempfile.mkdtemp())
    runs = run_all(root)
    launches = {
        kind: {field: values(runs["runs"] / names[0], field) for field in ("loss", "grad_norm")}
        for kind, names in SAME.items()
    }
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "accelerate", "trl")}
    GOLDEN.write_text(json.dumps({"versions": versions, "launches": launches}, indent=1) + "\n")
    shutil.rmtree(root)
    print(f"written: {GOLDEN}", file=sys.stderr)


if __name__ == "__main__":
    write_golden()
