"""What is served is what is measured: `ic-train evaluate` through this server and in process, answer by answer.

Here, because the server is started once for all of this folder's tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = ["--suite", "niah", "--lengths", "4k", "--questions", "8", "--keys-per-context", "8"]


def evaluate(out: Path, *arguments: str) -> dict[str, dict]:
    # a process of its own, as users run it: TRL and accelerate stay out of this one
    command = [sys.executable, "-m", "ic_train.cli", "evaluate", *SHARED, "--out", str(out), *arguments]
    # the server waits actively on its threads; a second thread here would mostly wait for one of those
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (out / "answers.jsonl").read_text().splitlines()
    return {record["id"]: record for record in map(json.loads, lines)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluations")


@pytest.fixture(scope="module")
def through_server(server, folder: Path) -> dict[str, dict]:
    prompted, cached = (server.metric(f"vllm:prefix_cache_{name}_total") for name in ("queries", "hits"))
    answers = evaluate(folder / "served", "--server", server.url)
    prompted = server.metric("vllm:prefix_cache_queries_total") - prompted
    cached = server.metric("vllm:prefix_cache_hits_total") - cached
    # one question of eight reads the context, the others find all of it but the last page, of up to 128 tokens
    assert prompted > 8 * 3900
    assert cached >= 7 * (3900 - 128), (cached, prompted)
    return answers


def test_the_server_finds_the_pass_keys_at_4k(through_server: dict[str, dict], folder: Path) -> None:
    assert len(through_server) == 8
    for record in through_server.values():
        assert record["answer"].startswith(f" {record['reference']}.\n"), record
    (row,) = json.loads((folder / "served" / "report.json").read_text())["rows"]
    assert (row["engine"], row["correct"], row["total"]) == ("vllm", 8, 8)


def test_the_model_in_process_gives_the_same_answers(through_server: dict[str, dict], folder: Path) -> None:
    in_process = evaluate(folder / "in-process", "ic-nano", "--dtype", "float32", "--device", "cpu")
    assert set(in_process) == set(through_server)
    for name, record in in_process.items():
        assert record == through_server[name]


def test_a_length_beyond_what_the_server_takes_is_refused(server, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "ic_train.cli",
        "evaluate",
        "--server",
        server.url,
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run([*command, "--lengths", "2M"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--lengths has 2097152; this model takes from 512 to " in done.stderr
