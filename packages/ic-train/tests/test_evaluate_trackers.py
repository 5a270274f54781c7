"""`--report-to`: a finished report reaches W&B and a real MLflow server, and outlives both."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import wandb
from ic_model import checkpoint_path
from openai_server import ScriptedServer, reader
from wandb_files import read_records, values_of

from ic_train import cli
from ic_train.evaluation import trackers
from ic_train.evaluation.trackers import scalars
from ic_train.tracking import MLFLOW_RUN_FILE

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server with a real database; it starts while W&B is tested."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--backend-store-uri", f"sqlite:///{folder}/runs.db", "--workers", "1"]
    words += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        # it starts workers of its own, in its own session
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(timeout=30)


@pytest.fixture(autouse=True)
def environment(mlflow_server: str) -> Iterator[None]:
    """Trackers leave variables behind, and W&B what it read from them."""
    before = dict(os.environ)
    os.environ |= {"DO_NOT_TRACK": "true", "WANDB_SILENT": "true", "WANDB_MODE": "offline"}
    # a busy machine starts its service slowly
    os.environ["WANDB__SERVICE_WAIT"] = "180"
    yield
    wandb.teardown()
    os.environ.clear()
    os.environ.update(before)


def evaluate(out: Path, *arguments: str) -> int:
    words = ["--tokenizer", str(checkpoint_path("ic-nano")), "--lengths", "2k", "--keys-per-context", "6"]
    words += ["--questions", "6", "--suite", "niah,multivalue", "--out", str(out), *arguments]
    with ScriptedServer(reader) as server:
        return cli.main(["evaluate", "--server", server.url, *words])


def rows(*found: dict) -> dict[str, float]:
    return scalars(found)


def test_wandb_gets_numbers_table_heat_map_settings_and_commit(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert evaluate(out, "--report-to", "wandb") == 0
    (file,) = out.glob("wandb/offline-run-*/run-*.wandb")
    logged: dict = {}
    config: dict = {}
    kinds = []
    for record in read_records(file):
        kinds.append(record.WhichOneof("record_type"))
        logged |= values_of(record.history.item)
        config |= values_of([*record.run.config.update, *record.config.update])
    report = json.loads((out / "report.json").read_text())
    expected = scalars(report["rows"])
    assert expected["niah/2048/correct"] == 6
    assert {name: logged[name] for name in expected} == expected
    assert (logged["niah._type"], logged["report._type"]) == ("image-file", "table-file")
    table = json.loads((file.parent / "files" / logged["report.path"]).read_text())
    assert [line[table["columns"].index("task")] for line in table["data"]] == ["niah", "multivalue"]
    # the table's, and the one of the report's files
    assert kinds.count("artifact") == 2
    assert config["commit"] == report["commit"] != ""
    assert (config["questions"], config["seed"]) == (6, 1000)
    # in W&B itself, the same folder is the same run
    assert evaluate(out, "--report-to", "wandb") == 0
    names = {path.name.rpartition("-")[2] for path in out.glob("wandb/offline-run-*")}
    assert len(names) == 1


def test_mlflow_gets_them_too_and_a_rerun_goes_on_in_the_same_run(tmp_path: Path, mlflow_server: str) -> None:
    # on a busy machine its first answer takes a while
    os.environ |= {"MLFLOW_TRACKING_URI": mlflow_server, "MLFLOW_HTTP_REQUEST_TIMEOUT": "100"}
    wait_for(mlflow_server)
    out, judged = tmp_path / "run", tmp_path / "judged"
    out.mkdir()
    # of a run on another server
    (out / MLFLOW_RUN_FILE).write_text("f" * 32)
    assert evaluate(out, "--report-to", "mlflow") == 0
    assert evaluate(out, "--report-to", "mlflow") == 0
    with ScriptedServer(lambda body: "[RESULT] 4") as judge:
        words = ["--server", judge.url, "--out", str(judged), "--report-to", "mlflow"]
        assert cli.main(["judge", str(out / "answers.jsonl"), *words]) == 0
    client = mlflow.MlflowClient(mlflow_server)
    (experiment,) = [one for one in client.search_experiments() if one.name == "ic-train"]
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(found) == {"run", "judged"}
    run = found["run"]
    assert run.info.status == "FINISHED"
    report = json.loads((out / "report.json").read_text())
    assert run.data.metrics == pytest.approx(scalars(report["rows"]))
    assert run.data.tags["ic.commit"] == report["commit"]
    assert run.data.tags["ic.questions"] == "6"
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"report.json", "report.md", "niah.png"}
    assert found["judged"].data.metrics["judge/good/correct"] == 12


def wait_for(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.2)
    pytest.fail(f"{url} does not answer")


def test_a_tracker_that_is_down_costs_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.environ |= {"MLFLOW_TRACKING_URI": NOWHERE, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    os.environ |= {"WANDB_MODE": "online", "WANDB_BASE_URL": NOWHERE, "WANDB_API_KEY": "x" * 40}
    os.environ |= {"WANDB_INIT_TIMEOUT": "3", "WANDB_FINISH_TIMEOUT": "3"}
    assert evaluate(tmp_path, "--report-to", "mlflow,wandb") == 0
    error = capsys.readouterr().err
    assert "error: mlflow did not take the report: " in error
    assert "error: wandb did not take the report: " in error
    assert f"It is whole in {tmp_path}; the same command sends it again" in error
    assert "| niah | 2,048 | 6/6 [61.0%, 100.0%] |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wandb,tensorboard", "--report-to has 'tensorboard'; accepted are wandb, mlflow, or none"),
        ("mlflow", "--report-to has mlflow, which is not there: pip install 'ic-train[tracking]'"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_before_anything_is_asked(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    message: str,
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "mlflow" else object())
    assert evaluate(tmp_path / "out", "--report-to", text) == 2
    assert message in capsys.readouterr().err
    calibrate = [
        "judge",
        "calibrate",
        "--server",
        NOWHERE,
        "--out",
        str(tmp_path / "out"),
        "--report-to",
        text,
    ]
    assert cli.main(calibrate) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_numbers_have_the_ends_of_their_intervals_and_few_have_no_share() -> None:
    few = {"task": "niah", "context_tokens": 4096, "correct": 5, "total": 10}
    many = few | {"correct": 150, "total": 200}
    assert set(rows(few)) == {f"niah/4096/{part}" for part in ("correct", "total", "low", "high")}
    assert rows(many)["niah/4096/share"] == 0.75
    assert rows(many)["niah/4096/low"] == pytest.approx(0.686, abs=1e-3)
    bins = {"task": "perplexity", "context_tokens": 4096, "from_tokens": 0, "to_tokens": 1024}
    assert rows({**bins, "perplexity": 3.0, "low": None, "high": None}) == {"perplexity/4096/0-1024": 3}
    finding = {"name": "flips", "count": 0.0, "total": 0}
    assert rows({"kind": "calibration", "passed": False, "findings": [finding]}) == {
        "calibration/flips/correct": 0,
        "calibration/flips/total": 0,
        "calibration/passed": 0,
    }
    pairs = {"kind": "pairs", "total": 10, "first": 4, "second": 3, "flip": 2, "unparsable": 1}
    assert rows(pairs)["judge/flip/correct"] == 2
