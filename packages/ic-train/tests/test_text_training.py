"""`ic_train.sft` on long text: adapters, small optimisers, trackers, and what goes wrong on the way."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.cases.rank_loss import ranks_of
from ic_model import ICForCausalLM
from safetensors.torch import load_file
from training_runs import FSDP_ON_CPU, PATIENT, Run, flags_of, launch_all, make_toys, steps_of, values

from ic_train import sft
from ic_train.checkpoints import export, latest_checkpoint
from ic_train.tracking import METRICS_FILE, MLFLOW_RUN_FILE

pytestmark = PATIENT

LORA = ["--lora_rank", "4", "--lora_alpha", "8"]
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A real server with a real database; it is up when its first run needs it."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--backend-store-uri", f"sqlite:///{folder}/runs.db", "--host", "127.0.0.1"]
    options += ["--port", str(port), "--workers", "1", "--artifacts-destination", str(folder / "artifacts")]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *options],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}", folder
    finally:
        # it starts workers of its own, in its own session
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(timeout=30)


def wait_for_server(url: str, log: Path) -> None:
    host, port = url.removeprefix("http://").split(":")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, mlflow: tuple[str, Path]) -> dict[str, Any]:
    toys = make_toys(tmp_path_factory.mktemp("text"))
    url, folder = mlflow
    tracked = {"MLFLOW_TRACKING_URI": url, "MLFLOW_EXPERIMENT_NAME": "toys", "DO_NOT_TRACK": "true"}
    resumed = {name: ["--resume", str(toys["runs"] / name / "checkpoint-3")] for name in ("lora-two", "8bit")}
    sharded = ["--gradient_accumulation_steps", "4"]
    hot = ["--learning_rate", "1e30", "--max_grad_norm", "0", "--warmup_steps", "0", "--logging_steps", "2"]
    launches = [
        (2, [Run("lora-two", [*LORA, *sharded]), Run("sharded-8bit", [*sharded, "--optim", "adamw_8bit"])]),
        (2, [Run("full-disk", sharded, {"TEST_FILE_BYTES": "60000"})]),
        (2, [Run("hot", [*hot, "--save_steps", "1", *sharded])]),
        (
            1,
            [
                Run("whole"),
                Run("lora", LORA),
                Run("lora-resumed", [*LORA, *resumed["lora-two"]]),
                Run("8bit", ["--optim", "adamw_8bit"]),
                Run("8bit-resumed", ["--optim", "adamw_8bit", *resumed["8bit"]]),
            ],
        ),
    ]
    errors = launch_all(toys, launches)
    # a process of its own, started plainly: W&B completes its file when Python ends
    plain = Run("wandb", ["--report_to", "wandb"], {"WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    # trainers that ran in this process have left their output folder in WANDB_DIR; a busy machine starts slowly
    own = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_"))}
    patient = {"WANDB__SERVICE_WAIT": "180", "WANDB_INIT_TIMEOUT": "180"}
    finished = subprocess.run(
        [sys.executable, "-m", "ic_train.sft", *flags_of(toys, plain)],
        env={**own, **plain.environment, **patient, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    wait_for_server(url, folder / "server.log")
    first = ["--report_to", "mlflow", "--run_name", "toy"]
    unreachable = tracked | {"MLFLOW_TRACKING_URI": NOWHERE}
    errors |= launch_all(
        toys,
        [
            (1, [Run("mlflow", [*first, "--max_steps", "3"], tracked)]),
            (1, [Run("mlflow", [*first, "--resume", "auto", "--max_steps", "6"], tracked)]),
            (1, [Run("unreachable", first, unreachable)]),
        ],
    )
    return {
        "errors": errors,
        "folder": toys["runs"],
        "toys": toys,
        "mlflow": url,
        "wandb said": finished.stderr,
    }


def test_adapters_train_alone_shard_and_resume(runs: dict[str, Any]) -> None:
    folder = runs["folder"]
    for name in ("lora-two", "lora-resumed"):
        assert name not in runs["errors"], runs["errors"][name]
    whole = values(folder / "lora", "loss")
    assert values(folder / "lora-two", "loss") == pytest.approx(whole, rel=1e-5)
    assert values(folder / "lora-resumed", "loss") == pytest.approx(whole[3:], rel=1e-5)
    data = sum(file.stat().st_size for file in (folder / "lora" / "checkpoint-6").glob("*.distcp"))
    full = sum(file.stat().st_size for file in (folder / "8bit" / "checkpoint-6").glob("*.distcp"))
    assert data < full / 2, "frozen weights are not in the checkpoint"


def test_adapters_are_merged_into_a_plain_folder(runs: dict[str, Any], tmp_path: Path) -> None:
    folder, model = runs["folder"] / "lora", runs["toys"]["model"]
    assert export.main([str(folder / "checkpoint-6"), str(tmp_path / "plain")]) == 0
    merged, before = (
        load_file(folder / "model.safetensors"),
        ICForCausalLM.from_pretrained(model).state_dict(),
    )
    assert merged.keys() == before.keys() - {"lm_head.weight"}
    changed = {
        name.split(".")[-2]
        for name, value in merged.items()
        if not torch.equal(value, before[name].bfloat16())
    }
    assert changed == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"}
    for name, value in load_file(tmp_path / "plain" / "model.safetensors").items():
        assert torch.equal(value, merged[name]), name


def test_an_8_bit_optimiser_resumes_exactly(runs: dict[str, Any]) -> None:
    folder = runs["folder"]
    assert "8bit-resumed" not in runs["errors"], runs["errors"]["8bit-resumed"]
    assert values(folder / "8bit-resumed", "loss") == values(folder / "8bit", "loss")[3:]
    assert "optim is 'adamw_8bit', whose states cannot be sharded" in runs["errors"]["sharded-8bit"]


def test_a_full_disk_costs_checkpoints_on_all_ranks_and_the_run_goes_on(runs: dict[str, Any]) -> None:
    folder = runs["folder"] / "full-disk"
    assert values(folder, "loss") == pytest.approx(values(runs["folder"] / "whole", "loss"), rel=1e-5)
    assert not list(folder.glob("checkpoint-*"))
    message = runs["errors"]["full-disk"]
    assert "cannot be written" in message and "make room" in message, message


def test_a_loss_that_is_no_number_ends_the_run_and_nothing_of_it_is_saved(runs: dict[str, Any]) -> None:
    message = runs["errors"]["hot"]
    assert message.startswith("error: the loss or its gradient became infinite or no number after step 1,")
    assert "nothing was saved since" in message
    folder = runs["folder"] / "hot"
    # the first step's were still numbers; the second's loss was, and its gradient not
    assert [one.name for one in folder.glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (folder / "model.safetensors").exists()


def test_wandb_has_every_line_offline(runs: dict[str, Any]) -> None:
    folder = runs["folder"] / "wandb"
    files = list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 1, runs["wandb said"][-3000:]
    history, config = read_wandb(files[0])
    found = [line["train/loss"] for line in history if "train/loss" in line]
    assert found == values(folder, "loss")
    assert all(line["train/tokens_per_s"] > 0 for line in history if "train/loss" in line)
    assert config["tokens_per_step"] == 1024 and config["packing_tokens_per_sequence"] == 128
    assert {"git_commit", "command", "version_torch", "learning_rate"} <= set(config)


def read_wandb(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """History and configuration of an offline run: records in blocks, as in a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = file.read_bytes(), 7, b""
    history: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        # not whole, nor the last part of one
        if kind not in (1, 4):
            continue
        record = Record()
        record.ParseFromString(parts)
        parts = b""
        named = [(item.key or ".".join(item.nested_key), item.value_json) for item in record.history.item]
        if named:
            history.append({key: json.loads(value) for key, value in named})
        for item in (*record.run.config.update, *record.config.update):
            config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return history, config


def test_mlflow_has_one_run_through_a_resume(runs: dict[str, Any]) -> None:
    from mlflow.tracking import MlflowClient

    assert "mlflow" not in runs["errors"], runs["errors"].get("mlflow")
    client = MlflowClient(runs["mlflow"])
    experiment = client.get_experiment_by_name("toys")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    folder = runs["folder"] / "mlflow"
    assert run.info.run_id == (folder / MLFLOW_RUN_FILE).read_text()
    logged = client.get_metric_history(run.info.run_id, "loss")
    assert {one.step: one.value for one in logged} == {
        line["step"]: line["loss"] for line in steps_of(folder)
    }
    assert run.data.tags["ic.tokens_per_step"] == "1024"
    assert {"ic.git_commit", "ic.command", "ic.version_torch"} <= set(run.data.tags)
    assert run.data.params["seed"] == "7"


def test_a_tracker_that_cannot_be_reached_does_not_end_the_run(runs: dict[str, Any]) -> None:
    assert "unreachable" not in runs["errors"], runs["errors"].get("unreachable")
    folder = runs["folder"] / "unreachable"
    assert len(steps_of(folder)) == 6
    assert (folder / "model.safetensors").is_file()


def test_a_rank_that_dies_is_started_again_and_leaves_its_checkpoints(
    runs: dict[str, Any], tmp_path: Path
) -> None:
    run = Run("dying", ["--max_steps", "100000", "--save_steps", "5", "--gradient_accumulation_steps", "4"])
    output = runs["folder"] / run.name
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FSDP_ON_CPU)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    command += ["--rdzv_backend", "c10d", "--max_restarts", "1", "-m", "ic_train.sft"]
    command += [*flags_of(runs["toys"], run), "--resume", "auto"]
    # docs/training.md says why
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    said = tmp_path / "said"
    with said.open("wb") as log:
        launcher = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        first = kill_a_rank(launcher, output, after=0)
        # nobody but the launcher starts it again, from the last whole checkpoint
        last = kill_a_rank(launcher, output, after=first + 15)
        assert launcher.wait(timeout=300) != 0
    finally:
        # it takes its ranks with it
        launcher.terminate()
    assert b"SIGKILL" in said.read_bytes(), said.read_text()[-2000:]
    (resumed,) = re.findall(r"resuming from \S*checkpoint-(\d+)", said.read_text())
    assert first <= int(resumed) < last
    # as a run without deaths would have gone on
    steps = [line["step"] for line in steps_of(output)]
    assert steps == list(range(1, len(steps) + 1))
    checkpoint = latest_checkpoint(output)
    assert checkpoint is not None
    assert export.main([str(checkpoint), str(tmp_path / "plain")]) == 0


def kill_a_rank(launcher: subprocess.Popen[bytes], output: Path, *, after: int) -> int:
    """Wait for a checkpoint later than a step, and kill the second rank; the checkpoint's step."""
    deadline = time.monotonic() + 500
    while last_step(output) <= after:
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    ranks = ranks_of(launcher)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    # until then it went on
    return last_step(output)


def last_step(output: Path) -> int:
    found = latest_checkpoint(output)
    return 0 if found is None else int(found.name.split("-")[1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--model", "no-such-model"],
            "model is 'no-such-model'; accepted: a checkpoint's folder, or a preset",
        ),
        (["--tokens_per_sequence", "1024"], "tokens_per_sequence is 1024; the model takes 512"),
        (["--pose_window_tokens", "4096"], "pose_window_tokens is 4096; the model takes 512"),
        (
            ["--context_tokens", "4096", "--yarn_factor", "8"],
            "original_context_tokens is 0; with yarn_factor 8.0",
        ),
        (["--max_steps", "-1"], "max_steps is -1; it must be at least 1"),
        (["--corpora", "nowhere"], "nowhere is no corpus: it has no corpus.json"),
        (["--eval_strategy", "steps", "--eval_steps", "1"], "eval_strategy is 'steps'; it must be 'no'"),
        (["--context_parallel_size", "2"], "context_parallel_size is 2; it must divide the number of .*, 1"),
        (["--resume_from_checkpoint", "x"], "resume_from_checkpoint is 'x'; leave it out and set resume"),
        (["--resume", "x"], "resume is 'x', which has no complete.json"),
        (["--lora_rank", "-1"], "lora_rank is -1; it must be at least 0"),
        (
            ["--lora_rank", "4", "--lora_target_modules", "qkv"],
            "lora_target_modules is .'qkv'.; the model has",
        ),
        (
            ["--cross_document_attention", "false", "--attn_implementation", "sdpa"],
            "cross_document_attention is false; attn_implementation must then be 'mla_prefill', not 'sdpa'",
        ),
        (["--linear_loss", "liger"], "linear_loss is 'liger', which needs"),
        (
            ["--gradient_checkpointing", "true", "--gradient_checkpointing_kwargs", '{"offload": true}'],
            "gradient_checkpointing_kwargs has offload",
        ),
        (["--task", "vision"], "task is 'vision'; accepted: 'passkey', 'text'"),
    ],
)
def test_bad_input_is_refused(flags: list[str], message: str, runs: dict[str, Any], tmp_path: Path) -> None:
    arguments = flags_of(runs["toys"], Run("refused"))
    arguments[arguments.index("--output_dir") + 1] = str(tmp_path)
    with pytest.raises(SystemExit, match=message):
        sft.main([*arguments, *flags])
    assert not (tmp_path / METRICS_FILE).exists()
