"""Evaluation and judge against real vLLM on the CPU, which serves a real language model: SmolLM2-135M-Instruct.

It is no judge, and calibration has to say so; what is shown here is that nothing is lost on the way.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import smollm2
import torch

from ic_train import cli
from ic_train.evaluation.records import read_records
from ic_train.evaluation.serving import serve
from ic_train.judge import command

# shorter than the one of retrieval: reading prompts is what takes the time here
RUBRIC = {"criteria": "Is the answer right?", "score1": "No.", "score5": "Yes."}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of `vllm serve`, started as `ic-train evaluate pipeline` starts it."""
    folder = tmp_path_factory.mktemp("served")
    vllm = str(Path(sys.executable).with_name("vllm"))
    words = [vllm, "serve", str(smollm2.checkpoint()), "--host", "127.0.0.1", "--port", "{port}"]
    # eager: compiling takes a minute; float32: bfloat16 is slow where the processor has no instructions for it
    words += ["--enforce-eager", "--max-model-len", "4096", "--dtype", "float32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        with serve(words, folder / "server.log", start_timeout_s=400) as url:
            yield url


@pytest.fixture(scope="module")
def evaluated(server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    words = ["evaluate", "--server", server, "--suite", "niah_single_1,niah_multivalue", "--questions", "3"]
    assert cli.main([*words, "--lengths", "512", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def asked(server: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """How the judge is asked, but for the length of its answers."""
    rubric = tmp_path_factory.mktemp("rubric") / "rubric.yaml"
    rubric.write_text(json.dumps({**RUBRIC, **{f"score{n}": "Partly." for n in (2, 3, 4)}}))
    return ["--server", server, "--rubric", str(rubric), "--max-tokens"]


def rows_of(folder: Path) -> list[dict]:
    return json.loads((folder / "report.json").read_text())["rows"]


def test_a_real_model_finds_what_is_hidden(evaluated: Path) -> None:
    single, several = rows_of(evaluated)
    assert (single["engine"], single["total"], several["total"]) == ("vllm", 3, 3)
    assert single["correct"] >= 2
    assert several["shares"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    # threads wait for each other on a busy machine
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_same_model_in_process_answers_the_same(
    evaluated: Path, tmp_path: Path, one_thread: None
) -> None:
    words = ["evaluate", str(smollm2.checkpoint()), "--suite", "niah_single_1", "--lengths", "512"]
    assert cli.main([*words, "--questions", "1", "--device", "cpu", "--out", str(tmp_path)]) == 0
    (record,) = read_records(tmp_path / "answers.jsonl").values()
    served = read_records(evaluated / "answers.jsonl")[record["id"]]
    assert {**record, "answer": ""} == {**served, "answer": ""}
    # words around it may differ by rounding
    numbers = [re.findall(r"\d{7}", one["answer"])[:1] for one in (record, served)]
    assert numbers[0] == numbers[1] != []


def test_every_answer_comes_back_judged_or_counted(evaluated: Path, asked: list[str], tmp_path: Path) -> None:
    answers = str(evaluated / "answers.jsonl")
    words = ["judge", answers, *asked, "48", "--out", str(tmp_path / "judged")]
    assert cli.main(words) == 0
    judgements = (tmp_path / "judged" / "judgements.jsonl").read_bytes()
    assert cli.main(words) == 0
    assert (tmp_path / "judged" / "judgements.jsonl").read_bytes() == judgements
    (row,) = rows_of(tmp_path / "judged")
    assert row["total"] == 6 == row["unparsable"] + sum(row["scores"].values())
    assert row["judge"] == str(smollm2.checkpoint())
    assert all(one["text"] for one in read_records(tmp_path / "judged" / "judgements.jsonl").values())
    words = ["judge", answers, "--against", answers, *asked, "8", "--out", str(tmp_path / "pairs")]
    assert cli.main(words) == 0
    (row,) = rows_of(tmp_path / "pairs")
    assert row["total"] == 6 == sum(row[name] for name in ("first", "second", "flip", "unparsable"))


def test_calibration_says_that_this_is_no_judge(
    evaluated: Path, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # fewer than a verdict would need: the way there is the same, and takes a quarter of the time
    monkeypatch.setattr(command, "_FEWEST_PAIRS", 5)
    calibrated = tmp_path / "calibrated"
    words = ["judge", "calibrate", *asked, "4", "--pairs", "5"]
    assert cli.main([*words, "--out", str(calibrated)]) == 3
    (row,) = rows_of(calibrated)
    judgements = read_records(calibrated / "judgements.jsonl")
    assert len(judgements) == 40
    found = {one["name"]: one for one in row["findings"]}
    without = sum(one["verdict"] is None for one in judgements.values())
    assert (found["unparsable"]["count"], found["unparsable"]["total"]) == (without, 40)
    assert not row["passed"]
    assert not found["agreement of scores"]["passed"]
    assert "is not shown to keep to all limits" in (calibrated / "report.md").read_text()
    # a judge that failed is named as one in every report that relies on it
    few = tmp_path / "few.jsonl"
    few.write_bytes((evaluated / "answers.jsonl").read_bytes().splitlines(keepends=True)[0])
    words = ["judge", str(few), *asked, "4", "--calibration", str(calibrated)]
    assert cli.main([*words, "--out", str(tmp_path / "judged")]) == 0
    assert "calibration FAILED" in (tmp_path / "judged" / "report.md").read_text()
