"""From a checkpoint to an exit status: serve, evaluate, judge, compare, thresholds."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import openai_server
import pytest
from ic_model import checkpoint_path
from openai_server import ScriptedServer

from ic_train import cli
from ic_train.evaluation.client import ServerError
from ic_train.evaluation.serving import serve

SCRIPT = [sys.executable, openai_server.__file__, "{port}"]
EVALUATE = ["--tokenizer", str(checkpoint_path("ic-nano")), "--suite", "niah", "--lengths", "2k"]
EVALUATE += ["--questions", "60", "--keys-per-context", "20"]
LEAST = [{"task": "niah", "context_tokens": 2048, "least": 0.8}]
GOOD = [{"task": "niah", "context_tokens": 2048, "least": 0.9, "most_loss": 0.1}]


def report(folder: Path, *rows: dict) -> Path:
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({"rows": rows}))
    return folder


def niah(correct: int, total: int) -> dict:
    return {"task": "niah", "context_tokens": 2048, "correct": correct, "total": total}


def configure(folder: Path, limits: list, **fields) -> list[str]:
    # JSON is YAML
    (folder / "thresholds.yaml").write_text(json.dumps(limits))
    config = {"serve": SCRIPT, "start_timeout_s": 60, "evaluate": EVALUATE, "thresholds": "thresholds.yaml"}
    (folder / "pipeline.yaml").write_text(json.dumps({**config, **fields}))
    return [
        "evaluate",
        "pipeline",
        "runs/model",
        "--config",
        str(folder / "pipeline.yaml"),
        "--out",
        str(folder / "out"),
    ]


def test_a_good_checkpoint_passes_and_a_rerun_asks_nothing_and_holds_it_to_new_thresholds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = report(tmp_path / "base", niah(60, 60))
    with ScriptedServer(lambda body: "Right. [RESULT] 5") as judge:
        limits = [*GOOD, {"task": "judge", "least": 0.9, "uncalibrated": True}]
        words = configure(tmp_path, limits, judge={"server": judge.url})
        assert cli.main([*words, "--base", str(base)]) == 0
        assert len(judge.requests) == 60
        output = capsys.readouterr().out
        strict = [{"task": "niah", "context_tokens": 2048, "least": 0.97}]
        configure(tmp_path, strict, judge={"server": judge.url})
        assert cli.main([*words, "--base", str(base)]) == 4
        assert len(judge.requests) == 60
        # 60 of 60 do not show 97 %
        assert "FAILED: niah at 2,048 tokens: least 0.97, found 0.9398" in capsys.readouterr().out
        # a length more
        longer = [*EVALUATE, "--lengths", "2k,4k"]
        configure(tmp_path, limits, judge={"server": judge.url}, evaluate=longer)
        assert cli.main([*words, "--base", str(base)]) == 0
        assert len(judge.requests) == 120
    assert "passed: niah at 2,048 tokens: least 0.9, found 0.9398" in output
    assert "passed: niah at 2,048 tokens: most_loss 0.1, found 0.06017" in output
    assert "passed: judge: least 0.9, found 0.9398" in output
    assert (
        "| niah | 2,048 | 60/60 [94.0%, 100.0%] | 60/60 [94.0%, 100.0%] | [-6.0, +6.0] points, independent |"
        in (tmp_path / "out" / "comparison.md").read_text()
    )
    assert len((tmp_path / "out" / "evaluation" / "answers.jsonl").read_text().splitlines()) == 120


def test_a_server_that_does_not_start_shows_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = configure(tmp_path, LEAST, serve=[sys.executable, "-c", "raise SystemExit('no GPU here')"])
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert "the server ended with status 1" in error
    assert "no GPU here" in error
    words = configure(tmp_path, LEAST, serve=["no-such-program"])
    assert cli.main(words) == 1
    assert "no-such-program cannot be run" in capsys.readouterr().err


def test_a_server_that_hangs_is_stopped_with_its_children(tmp_path: Path) -> None:
    program = (
        "import subprocess as s, time; print(s.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", program]
    with (
        pytest.raises(ServerError, match="did not answer within"),
        serve(command, tmp_path / "log", start_timeout_s=15),
    ):
        pytest.fail("it cannot be up")
    assert_gone(int((tmp_path / "log").read_text()))


def assert_gone(*pids: int) -> None:
    """Killed already; a busy machine takes a moment to bury them."""
    for pid in pids:
        state = Path(f"/proc/{pid}/stat")
        for _ in range(150):
            try:
                if state.read_text().rpartition(")")[2].split()[0] == "Z":
                    break
            except (FileNotFoundError, ProcessLookupError):
                break
            time.sleep(0.1)
        else:
            pytest.fail(state.read_text())


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_server_does_not_outlive_a_killed_pipeline(tmp_path: Path, stubborn: bool) -> None:
    # a server with a child, as vLLM is one; its child hears of no signal but SIGKILL
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(end='up'); time.sleep(600)"
    )
    server = f"""
import http.server, os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-uc", {deaf!r}], stdout=subprocess.PIPE)
child.stdout.read(2)
print(os.getpid(), child.pid, flush=True)
signal.signal(signal.SIGTERM, lambda *_: {"print('told', flush=True)" if stubborn else "os._exit(0)"})
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "models").touch()
    pipeline = f"""
import sys, time
from pathlib import Path
from ic_train.evaluation import serving
with serving.serve([sys.executable, "-c", {server!r}, "{{port}}"], Path("log"), start_timeout_s=60) as url:
    print(url, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", pipeline], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        url = process.stdout.readline().strip()
        with urllib.request.urlopen(f"{url}/models", timeout=10) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGKILL)
    pids = [int(word) for word in (tmp_path / "log").read_text().split("\n")[0].split()]
    assert len(pids) == 2
    if stubborn:
        # it has 20 s to end by itself; nobody waits for that here
        assert os.getpgid(pids[0]) != os.getpgid(0)
        deadline = time.monotonic() + 60
        while "told" not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline, "nobody told the server to end"
            time.sleep(0.05)
        os.kill(pids[0], signal.SIGKILL)
    assert_gone(*pids)


@pytest.mark.parametrize(
    ("own", "limits", "status"),
    [
        (niah(200, 200), {"least": 0.98}, 0),
        (niah(200, 200), {"least": 0.99}, 4),
        (niah(180, 200), {"most_loss": 0.2}, 0),
        (niah(180, 200), {"most_loss": 0.1}, 4),
        (niah(180, 200), {"least": 0.8, "most_loss": 0.01}, 4),
    ],
)
def test_thresholds_hold_the_ends_of_intervals(tmp_path: Path, own: dict, limits: dict, status: int) -> None:
    run, base = report(tmp_path / "run", own), report(tmp_path / "base", niah(190, 200))
    path = tmp_path / "thresholds.yaml"
    path.write_text(json.dumps([{"task": "niah", "context_tokens": 2048, **limits}]))
    assert cli.main(["evaluate", "check", str(run), "--thresholds", str(path), "--base", str(base)]) == status


@pytest.mark.parametrize(("most", "status"), [(3.6, 0), (3.4, 4)])
def test_perplexity_is_held_in_every_bin(tmp_path: Path, most: float, status: int) -> None:
    rows = [
        {"task": "perplexity", "context_tokens": 4096, "perplexity": p, "high": p + 0.5, "low": p}
        for p in (2.0, 3.0)
    ]
    path = tmp_path / "thresholds.yaml"
    path.write_text(json.dumps([{"task": "perplexity", "context_tokens": 4096, "most": most}]))
    words = ["evaluate", "check", str(report(tmp_path / "run", *rows)), "--thresholds", str(path)]
    assert cli.main(words) == status


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a list of thresholds with task, context_tokens, least, most_loss, most"),
        ("[1", "which is no YAML"),
        ("[{task: niah, context_tokens: 2048, leats: 0.9}]", "threshold 1 is {'task': 'niah'"),
        ("[{task: niah, context_tokens: 2048}]", "threshold 1 has no limit; niah takes least and most_loss"),
        (
            "[{task: niah, context_tokens: 2048, most: 3}]",
            "threshold 1 has most; niah takes least and most_loss",
        ),
        ("[{task: niah, context_tokens: 4k, least: 0.9}]", "context_tokens is '4k'; it must be a number"),
        ("[{task: niah, context_tokens: 2048, least: 90}]", "least is 90; it must be a share from 0 to 1"),
        (
            "[{task: niah, context_tokens: 4096, least: 0.9}]",
            "niah at 4096 tokens, which this run does not measure; it has niah at 2048",
        ),
        ("[{task: niah, context_tokens: 2048, most_loss: 0.1}]", "give the run to compare with as --base"),
        (
            "[{task: niah, context_tokens: 2048, least: 0.9, uncalibrated: true}]",
            "uncalibrated is True; it must be true or false, and only judge takes true",
        ),
        ("[{task: judge, least: 0.1, uncalibrated: 1}]", "uncalibrated is 1; it must be true or false"),
        ("[{task: judge, least: 0.1}]", "a threshold is on judge; no scores of a judge are there"),
    ],
)
def test_thresholds_that_hold_nothing_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "thresholds.yaml"
    path.write_text(text)
    run = report(tmp_path / "run", niah(200, 200))
    assert cli.main(["evaluate", "check", str(run), "--thresholds", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"speed": 1}, "accepted are serve, start_timeout_s, evaluate, judge, thresholds"),
        ({"evaluate": "--suite niah"}, "evaluate is '--suite niah', which has the wrong type"),
        ({"evaluate": ["--questions", 10]}, "every word must be text, numbers in quotes"),
        ({"judge": {"arguments": []}}, "has arguments; accepted are server, arguments, needed server"),
        ({"thresholds": "none.yaml"}, "which does not exist"),
    ],
)
def test_a_wrong_configuration_is_refused_before_a_server_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict, message: str
) -> None:
    assert cli.main(configure(tmp_path, GOOD, **fields)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("limits", "fields", "message"),
    [
        (
            [{"task": "passkey", "context_tokens": 2048, "least": 0.9}],
            {},
            "passkey at 2048 tokens, which this run does not measure; it has niah at 2048",
        ),
        ([{"task": "niah", "context_tokens": 4096, "least": 0.9}], {}, "niah at 4096 tokens, which this run"),
        (
            [{"task": "ruler_qa_squad", "context_tokens": 2048, "least": 0.9}],
            {"evaluate": ["--suite", "ruler", "--lengths", "2k"]},
            "ruler_qa_squad at 2048 tokens, which this run does not measure; it has niah_single_1 at 2048, ",
        ),
        (
            [{"task": "niah", "context_tokens": 4096, "most_loss": 0.1}],
            {"evaluate": [*EVALUATE, "--lengths", "4k"]},
            "niah at 4096 tokens, which the base does not measure; it has niah at 2048",
        ),
        (
            [{"task": "perplexity", "context_tokens": 2048, "most": 9}],
            {},
            "perplexity at 2048 tokens, which this run does not measure",
        ),
        (
            GOOD,
            {"evaluate": ["--suite", "perplexity"]},
            "evaluate has --suite with 'perplexity'; accepted behind",
        ),
        ([{"task": "judge", "least": 0.9}], {}, "a threshold is on judge; no scores of a judge are there"),
        (
            [{"task": "judge", "least": 0.9}],
            {"judge": {"server": "http://127.0.0.1:9", "arguments": ["--against", "other.jsonl"]}},
            "a threshold is on judge; no scores of a judge are there",
        ),
        (
            [{"task": "judge", "least": 0.9}],
            {"judge": {"server": "http://127.0.0.1:9"}},
            "a threshold is on judge, which was not calibrated",
        ),
        (
            GOOD,
            {"judge": {"server": "http://127.0.0.1:9", "arguments": ["--calibration", "nowhere"]}},
            "--calibration is 'nowhere', which has no report.json",
        ),
        (
            GOOD,
            {"judge": {"server": "http://127.0.0.1:9", "arguments": ["--rubric", "nowhere"]}},
            "--rubric is 'nowhere', which does not exist",
        ),
        (GOOD, {"judge": {"server": "127.0.0.1:9"}}, "--server is '127.0.0.1:9'; it must start with http"),
    ],
)
def test_what_no_run_could_keep_to_is_refused_before_a_server_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], limits: list, fields: dict, message: str
) -> None:
    base = report(tmp_path / "base", niah(60, 60))
    assert cli.main([*configure(tmp_path, limits, **fields), "--base", str(base)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (
            {"seed": 7},
            "a threshold has most_loss on niah; this run has seed 1000, the base 7: evaluate both with",
        ),
        ({"questions": 200}, "this run has questions 60, the base 200"),
        ({"keys_per_context": 50}, "this run has keys_per_context 20, the base 50"),
        ({"haystack_sha256": "another"}, "the base 'another'"),
    ],
)
def test_a_base_with_other_questions_is_refused_before_a_server_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], held: dict, message: str
) -> None:
    base = report(tmp_path / "base", niah(60, 60))
    (base / "run.json").write_text(json.dumps(held))
    assert cli.main([*configure(tmp_path, GOOD), "--base", str(base)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_loss_needs_a_base_before_a_server_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(configure(tmp_path, GOOD)) == 2
    assert "a threshold has most_loss; give the run to compare with as --base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_answers_of_other_weights_are_not_reported_as_the_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"first")
    words = configure(tmp_path, LEAST, serve=["no-such-program"])
    words[2] = str(model)
    assert cli.main(words) == 1
    # nothing was answered yet, and training goes on
    (model / "model.safetensors").write_bytes(b"later")
    configure(tmp_path, LEAST)
    assert cli.main(words) == 0
    held = (out / "weights.json").read_bytes()
    (model / "model.safetensors").write_bytes(b"final")
    assert cli.main(words) == 2
    assert (
        f"{out} holds answers of other weights than {model} has now; move it away" in capsys.readouterr().err
    )
    assert (out / "weights.json").read_bytes() == held
    # of a folder made before weights were noted, nobody knows
    (out / "weights.json").unlink()
    assert cli.main(words) == 2
    assert f"{out} holds answers, and not of which weights they are; move it away" in capsys.readouterr().err
    out.rename(tmp_path / "before")
    assert cli.main(words) == 0


@pytest.mark.parametrize(
    ("calibrated", "entry", "status"),
    [
        (True, {}, 0),
        (False, {}, 2),
        (None, {}, 2),
        (False, {"uncalibrated": True}, 0),
        (None, {"uncalibrated": True}, 0),
        (None, {"uncalibrated": False}, 2),
    ],
)
def test_a_threshold_relies_on_a_calibrated_judge(
    tmp_path: Path, calibrated: bool | None, entry: dict, status: int
) -> None:
    run = report(tmp_path / "run", niah(60, 60))
    scores = {"kind": "absolute", "good": 60, "total": 60, "calibrated": calibrated}
    judged = report(tmp_path / "judged", scores)
    path = tmp_path / "thresholds.yaml"
    path.write_text(json.dumps([{"task": "judge", "least": 0.9, **entry}]))
    words = ["evaluate", "check", str(run), "--thresholds", str(path), "--judged", str(judged)]
    assert cli.main(words) == status
