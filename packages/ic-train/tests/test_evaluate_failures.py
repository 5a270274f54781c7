"""What goes wrong between start and report: nothing is lost, repeated or made up, in every command that asks."""

import http.server
import json
import sys
import threading
from pathlib import Path

import openai_server
import pytest
from ic_model import checkpoint_path
from openai_server import ScriptedServer, reader

from ic_train import cli
from ic_train.evaluation import client
from ic_train.evaluation.records import read_records

EVALUATE = ["--tokenizer", str(checkpoint_path("ic-nano")), "--suite", "niah", "--keys-per-context", "6"]
EVALUATE += ["--questions", "12", "--lengths", "2k"]
# a server that ends for good with its eighth request
DYING = f"""
import os, sys
sys.path.insert(0, {str(Path(openai_server.__file__).parent)!r})
from openai_server import ScriptedServer, reader, threading
dies = lambda number: os._exit(9) if number == 7 else None
with ScriptedServer(reader, dies, port=int(sys.argv[1]), max_model_len=8192):
    threading.Event().wait()
"""


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_FIRST_PAUSE_S", 0.01)


def evaluate(server: ScriptedServer, out: Path, *arguments: str) -> int:
    return cli.main(["evaluate", "--server", server.url, "--out", str(out), *EVALUATE, *arguments])


def write_pipeline(folder: Path, program: list[str], *arguments: str) -> list[str]:
    (folder / "thresholds.yaml").write_text('[{"task": "niah", "context_tokens": 2048, "least": 0.5}]')
    config = {"serve": [*program, "{port}"], "start_timeout_s": 60, "thresholds": "thresholds.yaml"}
    (folder / "pipeline.yaml").write_text(json.dumps({**config, "evaluate": [*EVALUATE, *arguments]}))
    words = ["evaluate", "pipeline", "model", "--config", str(folder / "pipeline.yaml")]
    return [*words, "--out", str(folder / "out")]


def test_a_pipeline_whose_server_dies_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--concurrency", "1", "--retries", "0"]
    assert cli.main(write_pipeline(tmp_path, [sys.executable, "-c", DYING], *arguments)) == 1
    assert "does not answer" in capsys.readouterr().err
    answers = tmp_path / "out" / "evaluation" / "answers.jsonl"
    kept = answers.read_bytes()
    assert len(read_records(answers)) == 7
    assert cli.main(write_pipeline(tmp_path, [sys.executable, openai_server.__file__], *arguments)) == 0
    assert answers.read_bytes().startswith(kept)
    assert len(read_records(answers)) == 12
    assert "passed: niah at 2,048 tokens" in capsys.readouterr().out


def test_a_pipeline_with_a_length_beyond_its_server_ends_before_a_question(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = write_pipeline(tmp_path, [sys.executable, openai_server.__file__], "--lengths", "2k,16k")
    assert cli.main(words) == 2
    assert "--lengths has 16384; this model takes from 512 to 8192" in capsys.readouterr().err
    assert not (tmp_path / "out" / "evaluation" / "answers.jsonl").exists()


def test_answers_that_are_missing_are_asked_again_and_no_others(tmp_path: Path) -> None:
    with ScriptedServer(reader) as server:
        assert evaluate(server, tmp_path) == 0
        report = json.loads((tmp_path / "report.json").read_text())["rows"]
        path = tmp_path / "answers.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        # two lost from the middle, and the last one cut
        path.write_text("".join([*lines[:3], *lines[5:-1], lines[-1][:40]]))
        assert evaluate(server, tmp_path) == 0
        assert len(server.requests) == 15
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert rows == report
    assert [row["total"] for row in rows] == [12]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    with ScriptedServer(reader) as server:
        assert evaluate(server, folder) == 0
    return folder / "answers.jsonl"


FAILURES = [
    (429, b'{"error": {"message": "slow down"}}'),
    (200, b"<html>no JSON</html>"),
    (200, b'{"choices": []}'),
    (200, b'{"choices": [{"message": null}]}'),
    "hang up",
]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_judges_failures_that_pass_are_retried(answers: Path, tmp_path: Path, failure) -> None:
    with ScriptedServer(lambda body: "[RESULT] 5", lambda n: failure if n in (0, 5) else None) as server:
        words = ["judge", str(answers), "--server", server.url, "--concurrency", "2", "--out", str(tmp_path)]
        assert cli.main(words) == 0
    assert (len(server.requests), len(server.answered)) == (14, 12)
    (row,) = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert (row["total"], row["good"], row["unparsable"]) == (12, 12, 0)


@pytest.mark.parametrize(
    ("failure", "message", "tries"),
    [
        ((429, b'{"error": {"message": "slow down"}}'), "answered 429", 2),
        ((200, b"<html>no JSON</html>"), "gave no usable answer in 2 tries", 2),
        ((400, b'{"error": {"message": "the prompt is too long"}}'), "the prompt is too long", 1),
    ],
)
def test_a_judge_that_keeps_failing_is_given_up_and_makes_no_report(
    answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], failure, message: str, tries: int
) -> None:
    calibrate = ["judge", "calibrate", "--pairs", "20"]
    for words, name in ((["judge", str(answers)], "judged"), (calibrate, "calibrated")):
        with ScriptedServer(lambda body: "[RESULT] 5", lambda n: failure if n >= 3 else None) as server:
            asked = ["--server", server.url, "--retries", "1", "--concurrency", "1"]
            assert cli.main([*words, *asked, "--out", str(tmp_path / name)]) == 1
        assert (len(server.requests), len(server.answered)) == (3 + tries, 3)
        assert message in capsys.readouterr().err
        assert len(read_records(tmp_path / name / "judgements.jsonl")) == 3
        assert not (tmp_path / name / "report.json").exists()


def test_an_address_that_is_no_such_server_is_said_to_be_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>a dashboard</html>")

        def log_message(self, *arguments: object) -> None:
            pass

    page = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=page.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{page.server_address[1]}"
        words = ["evaluate", "--server", url, "--retries", "0", "--out", str(tmp_path), *EVALUATE]
        assert cli.main(words) == 1
    finally:
        page.shutdown()
        page.server_close()
    assert f"{url}/v1 gave no usable answer in 1 tries" in capsys.readouterr().err
    assert not (tmp_path / "answers.jsonl").exists()
