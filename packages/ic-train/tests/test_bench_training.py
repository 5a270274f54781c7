"""The benchmark of the trainer: its cases and commands, and one of them on the CPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench.cases import rank_loss, training
from bench.report import ROOT
from training_runs import make_toys


def test_a_toy_case_runs_through_the_trainer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    toys = make_toys(tmp_path)
    words = ["--toy", "--model", str(toys["model"]), "--corpus", str(toys["corpora"])]
    assert training.main([*words, "--implementations", "ours", "--results", str(tmp_path / "results")]) == 0
    said = capfd.readouterr().out
    assert "tokens/s" in said and f"{training.TOY_LENGTHS[0]:,}" in said
    assert not (tmp_path / "results").exists(), "a toy is no result"


def test_the_issues_lengths_are_covered_the_most_important_first() -> None:
    options = training._parser().parse_args([])
    cases = training._cases(options)
    assert {length for length, _ in cases} == {4096, 8192, 32768, 131072}
    assert cases[:2] == [(8192, "ours"), (131072, "ours")]
    assert {name for _, name in cases} == {"ours", "torch"}


def test_commands_differ_in_what_is_compared_alone(tmp_path: Path) -> None:
    options = training._parser().parse_args([])
    ours, torch = (
        training._command(options, 8192, name, Path("corpus"), Path("out")) for name in ("ours", "torch")
    )
    changed = {word for word in ours if word not in torch} | {word for word in torch if word not in ours}
    assert changed == {"mla_prefill", "auto", "sdpa", "full", "--feed_forward", "plain"}
    assert ours[ours.index("--tokens_per_sequence") + 1] == "8192"


def test_a_profile_replaces_the_speed_and_stays_beside_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # a run that leaves what the trainer would
    table = "2.0 ms of kernels\n 1.0 a kernel\n"
    steps = json.dumps({"step": 1, "loss": 1.0, "tokens_per_s": 5.0})

    def run(options: argparse.Namespace, length: int, name: str, corpus: Path, output: Path) -> list[str]:
        command = found(options, length, name, corpus, output)
        assert command[command.index("--profile_steps") + 1] == "2"
        assert command[command.index("--max_steps") + 1] == "5"
        output.mkdir()
        (output / "metrics.jsonl").write_text(f"{steps}\n{steps}\n")
        (output / "profile.txt").write_text(table)
        return [sys.executable, "-c", "", "ic_train.sft"]

    found = training._command
    monkeypatch.setattr(training, "_command", run)
    words = ["--lengths", "8192", "--implementations", "ours", "--profile", "2", "--results", str(tmp_path)]
    assert training.main([*words, "--corpus", str(tmp_path)]) == 0
    assert "1.0 a kernel" in capsys.readouterr().out
    (folder,) = tmp_path.iterdir()
    assert (folder / "profile-ours-8192.txt").read_text() == table
    (row,) = json.loads((folder / "result.json").read_text())["rows"]
    assert row["profile"] == "profile-ours-8192.txt" and "tokens_per_s" not in row
    assert training.main(["--profile", "-1"]) == 2


def test_a_ring_takes_the_nodes_launcher_and_shares_the_sequence() -> None:
    options = training._parser().parse_args(["--gpus", "8"])
    command = training._command(options, 1048576, "ours", Path("corpus"), Path("out"))
    assert command[command.index("--num_processes") + 1] == "8"
    assert command[command.index("--context_parallel_size") + 1] == "8"
    assert any(word.endswith("one-node.yaml") for word in command)


def test_gpus_without_a_ring_have_sequences_of_their_own() -> None:
    options = training._parser().parse_args(["--gpus", "8", "--ring", "1"])
    command = training._command(options, 8192, "ours", Path("corpus"), Path("out"))
    assert command[command.index("--num_processes") + 1] == "8"
    assert command[command.index("--context_parallel_size") + 1] == "1"


def test_links_are_measured_between_processes(tmp_path: Path) -> None:
    words = [
        "--nproc-per-node",
        "2",
        "-m",
        "bench.cases.links",
        "--toy",
        "--tokens",
        "64,4096",
        "--repeats",
        "3",
    ]
    finished = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *words, "--results", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    lines = finished.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["link", "rows", "rows"]
    # 4,096 tokens over two processes, 320 numbers of 16 bits each
    assert "1.2 MiB a step" in lines[2]
    assert not list(tmp_path.iterdir()), "a toy is no result"


@pytest.mark.parametrize(
    ("said", "out_of_memory"),
    [
        ("error: model is 'no-such-model'", False),
        ("torch.OutOfMemoryError: CUDA out of memory.", True),
        ("[rank0]: torch.utils.checkpoint.CheckpointError: other metadata", False),
    ],
)
def test_what_did_not_run_has_its_reason_and_no_number(
    said: str, out_of_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the launcher's words about it come last
    launcher = "torch.distributed.elastic.ChildFailedError:\n  traceback : see errors.html\n==="
    program = [sys.executable, "-c", f"print({said!r}); print({launcher!r}); exit(1)", "ic_train.sft"]
    monkeypatch.setattr(training, "_command", lambda *_: program)
    options = argparse.Namespace(model="ic-1b", toy=True, seed=0, flags="", gpus=1, ring=0, profile=0)
    row = training._run(options, 256, "ours", tmp_path, tmp_path, left_s=60)
    assert row["error"] == said and row["out_of_memory"] == out_of_memory
    assert "tokens_per_s" not in row


def test_a_case_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = [sys.executable, "-c", "import time; time.sleep(60)", "ic_train.sft"]
    monkeypatch.setattr(training, "_command", lambda *_: program)
    options = argparse.Namespace(model="ic-1b", toy=True, seed=0, flags="", gpus=1, ring=0, profile=0)
    assert training._run(options, 256, "ours", tmp_path, tmp_path, left_s=1)["error"] == "error: no time left"


@pytest.mark.timeout(1200)
def test_a_run_whose_rank_dies_ends_like_one_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["--toy", "--tokens", "64", "--steps", "40", "--save-steps", "5", "--limit-s", "550"]
    assert rank_loss.main([*words, "--results", str(tmp_path)]) == 0
    row = json.loads(capsys.readouterr().out.split("s\n", 1)[1])
    assert 5 <= row["resumed_from_step"] <= row["killed_after_step"] < 40
    assert row["max_relative_loss_difference"] == 0
    assert not list(tmp_path.iterdir()), "a toy is no result"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "1"], "--gpus is 1; it must be at least 2"),
        (["--steps", "9", "--save-steps", "9"], "--save-steps is 9; accepted: 1 to 8"),
    ],
)
def test_a_rank_loss_that_shows_nothing_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rank_loss.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--implementations", "fast"], "--implementations has 'fast'; accepted: ours"),
        (["--lengths", "5"], "--lengths has '5'; accepted: 4096"),
        (["--gpus", "8", "--ring", "3"], "--ring is 3; it must divide --gpus, 8"),
        (["--gpus", "0"], "--gpus is 0; it must be at least 1"),
    ],
)
def test_unknown_cases_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.main(words) == 2
    assert message in capsys.readouterr().err
