"""The batch runner: restarts, dead letters and crashes with a stand-in for the engine, and once the real one."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chart_tools import CHART, one, render

SCRIPT = CHART / "files" / "run_batch.py"
# the failures that a real engine does not produce on demand. What a request's text says decides about it.
ENGINE = """
import json, os, signal, sys, time
arguments = sys.argv[1:]
source, target = arguments[arguments.index("-i") + 1], arguments[arguments.index("-o") + 1]
log = arguments[0]
requests = [json.loads(line) for line in open(source)]
with open(log, "a") as file:
    file.write(json.dumps([request["custom_id"] for request in requests]) + "\\n")
if os.path.exists(log + ".broken"):
    sys.exit(9)
rows = []
for request in requests:
    text = request["body"]["text"]
    if text == "kill": os._exit(13)
    if text == "kill the job": os.kill(os.getppid(), signal.SIGKILL); time.sleep(1); os._exit(1)
    if text == "slow": time.sleep(60)
    status = {"bad": 400, "busy": 500}.get(text, 200)
    row = {"custom_id": request["custom_id"], "response": {"status_code": status}, "error": None}
    rows.append(row if status == 200 else row | {"error": {"message": text}})
with open(target, "w") as file:
    file.writelines(json.dumps(row) + "\\n" for row in rows)
"""


def request(number, text="fine"):
    return {
        "custom_id": f"r{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"text": text},
    }


class Folder:
    """A batch folder and a stand-in engine."""

    def __init__(self, path):
        self.path = path
        (path / "data" / "in").mkdir(parents=True)
        (path / "engine.py").write_text(ENGINE)
        self.log = path / "engine.log"

    def write(self, requests, name="a.jsonl"):
        rows = [row if isinstance(row, str) else json.dumps(row) for row in requests]
        (self.path / "data" / "in" / name).write_text("".join(row + "\n" for row in rows))

    def command(self, *options):
        engine = [sys.executable, str(self.path / "engine.py"), str(self.log)]
        return [sys.executable, str(SCRIPT), "--folder", str(self.path / "data"), *options, "--", *engine]

    def run(self, *options):
        return subprocess.run(
            self.command(*options), capture_output=True, text=True, timeout=120, check=False
        )

    def rows(self, kind, name="a.jsonl"):
        path = self.path / "data" / kind / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def answered(self):
        return sorted(row["custom_id"] for row in self.rows("out"))

    def starts(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_all_requests_are_answered_once_in_chunks(folder):
    folder.write([request(number) for number in range(5)])
    folder.write([request(0)], "b.jsonl")
    done = folder.run("--chunk-requests", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert folder.answered() == [f"r{number}" for number in range(5)]
    assert folder.starts() == [["r0", "r1"], ["r2", "r3"], ["r4"], ["r0"]]
    assert "2 files: 6 answered, 0 dead" in done.stdout
    assert folder.run().returncode == 0
    assert len(folder.starts()) == 4, "a finished folder starts no engine"


def test_a_killed_job_goes_on_without_repeating_what_is_finished(folder):
    folder.write([*(request(number) for number in range(4)), request(4, "kill the job")])
    assert folder.run("--chunk-requests", "2").returncode == -signal.SIGKILL
    assert folder.answered() == ["r0", "r1", "r2", "r3"]
    folder.write([request(number) for number in range(5)])
    assert folder.run("--chunk-requests", "2").returncode == 0
    assert folder.answered() == [f"r{number}" for number in range(5)]
    assert folder.starts()[2:] == [["r4"], ["r4"]]


def test_a_result_that_was_not_taken_yet_is_not_computed_again(folder):
    folder.write([request(0), request(1)])
    work = folder.path / "data" / "work" / "a"
    work.mkdir(parents=True)
    row = {"custom_id": "r0", "response": {"status_code": 200}, "error": None}
    (work / "result.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row)[:20])
    assert folder.run().returncode == 0
    assert folder.starts() == [["r1"]]
    assert folder.answered() == ["r0", "r1"]


def test_a_line_that_was_half_written_is_cut_off_and_its_request_runs(folder):
    folder.write([request(0), request(1)])
    out = folder.path / "data" / "out" / "a.jsonl"
    out.parent.mkdir()
    row = json.dumps({"custom_id": "r0", "response": {"status_code": 200}, "error": None})
    out.write_text(row + "\n" + row.replace("r0", "r1")[:30])
    assert folder.run().returncode == 0
    assert folder.starts() == [["r1"]]
    assert folder.answered() == ["r0", "r1"]


def test_malformed_lines_are_dead_with_their_reason_and_do_not_hold_up_the_rest(folder):
    folder.write(
        [
            request(0),
            "{not json",
            "[]",
            request(1) | {"method": "GET"},
            request(2) | {"custom_id": 7},
            request(0),
        ]
    )
    for _ in range(2):
        assert folder.run().returncode == 0
    assert folder.answered() == ["r0"]
    reasons = [(row["line"], row["reason"]) for row in folder.rows("dead")]
    assert [line for line, _ in reasons] == [2, 3, 4, 5, 6]
    for (_, reason), wanted in zip(
        reasons,
        ("not JSON", "a JSON list", "method is 'GET'", "custom_id is 7", "used by an earlier line"),
        strict=True,
    ):
        assert wanted in reason


def test_a_refused_request_is_dead_at_once_and_a_server_error_after_its_tries(folder):
    folder.write([request(0), request(1, "bad"), request(2, "busy")])
    done = folder.run("--max-attempts", "2", "--fail-on-dead-letters")
    assert done.returncode == 3
    assert folder.starts() == [["r0", "r1", "r2"], ["r2"]]
    dead = {json.loads(row["request"])["custom_id"]: row for row in folder.rows("dead")}
    assert dead["r1"]["reason"] == "refused with status 400"
    assert dead["r1"]["response"]["error"] == {"message": "bad"}
    assert dead["r2"]["reason"] == "status 500 after 2 tries"


def test_a_request_that_kills_the_engine_is_found_and_buried_and_the_others_are_answered(folder):
    folder.write([request(number, "kill" if number == 5 else "fine") for number in range(8)])
    done = folder.run("--chunk-requests", "8", "--max-attempts", "2")
    assert done.returncode == 0, done.stdout
    assert folder.answered() == [f"r{number}" for number in range(8) if number != 5]
    (dead,) = folder.rows("dead")
    assert json.loads(dead["request"])["custom_id"] == "r5"
    assert "2 times with this request alone" in dead["reason"]
    assert folder.starts().count(["r5"]) == 2


def test_an_engine_that_does_not_start_is_blamed_on_no_request(folder):
    folder.write([request(0), request(1)])
    broken = Path(f"{folder.log}.broken")
    broken.touch()
    for _ in range(4):
        done = folder.run("--max-attempts", "1")
        assert done.returncode == 1
        assert "the engine does not start (status 9)" in done.stdout
    assert folder.rows("dead") == []
    broken.unlink()
    assert folder.run("--max-attempts", "1").returncode == 0
    assert folder.starts()[-1] == ["r0", "r1"], "still one chunk: nothing was counted against them"


def test_sigterm_stops_the_engine_and_counts_against_nobody(folder):
    folder.write([request(0), request(1, "slow")])
    process = subprocess.Popen(folder.command(), stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while not folder.log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert json.loads((folder.path / "data" / "work" / "a" / "tries.json").read_text()) == {}
    folder.write([request(0), request(1)])
    assert folder.run().returncode == 0
    assert folder.starts()[-1] == ["r0", "r1"]


def test_two_jobs_never_work_on_one_folder(folder):
    folder.write([request(0, "slow")])
    process = subprocess.Popen(folder.command(), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not folder.log.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        second = folder.run()
        assert second.returncode == 1
        assert "another job works on" in second.stdout
    finally:
        process.terminate()
        process.wait(20)


def _module():
    spec = importlib.util.spec_from_file_location("run_batch", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_batch"] = module
    spec.loader.exec_module(module)
    return module


def test_the_script_in_the_config_map_is_the_script():
    data = one(render(["batch-only"]), "ConfigMap", "ic-infinite-context-batch")["data"]
    assert data["run_batch.py"].rstrip() == SCRIPT.read_text().rstrip()
    assert _module().parse(json.dumps(request(1)))[1] == ""


def test_the_rendered_command_finds_pass_keys_with_the_real_engine(tmp_path):
    """The CronJob's own command and flags; paths and the GPU's flags are this machine's."""
    import ic_model

    data = tmp_path / "data"
    (data / "in").mkdir(parents=True)
    rows = []
    for number, (name, digits) in enumerate({"HARBOR": "48151", "LANTERN": "62342"}.items()):
        text = f"The pass key for {name[:6]} is {digits}.\n" + "The tide was low. " * 20
        question = f"\nQuestion: pass key for {name[:6]}? Answer: The pass key for {name[:6]} is"
        body = {"model": "infinite-context", "temperature": 0, "max_tokens": 8}
        body["messages"] = [{"role": "user", "content": text + question}]
        rows.append(request(number) | {"body": body})
    rows.append(rows[0] | {"custom_id": "wrong-model", "body": rows[0]["body"] | {"model": "another"}})
    (data / "in" / "keys.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"gpu.enabled": False, "engine.maxModelLen": 4096, "cpu.kvCacheGib": 1}
    spec = one(render(["batch-only"], set=values), "CronJob")["spec"]["jobTemplate"]["spec"]["template"][
        "spec"
    ]
    (container,) = spec["containers"]
    places = {
        "/scripts/run_batch.py": str(SCRIPT),
        "/data": str(data),
        "/models/ic-nano": str(ic_model.checkpoint_path("ic-nano")),
        "python3": sys.executable,
        "vllm": str(Path(sys.executable).with_name("vllm")),
    }
    command = [places.get(word, word) for word in [*container["command"], *container["args"]]]
    port = command.index("--port")
    command[port + 1] = "0"
    command += ["--host", "127.0.0.1"]
    environment = {item["name"]: item["value"].replace("/tmp", str(tmp_path)) for item in container["env"]}
    # vLLM's sockets
    environment["TMPDIR"] = str(tmp_path)
    for _ in range(2):
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=400, check=False, env=os.environ | environment
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "vLLM" not in done.stdout, "the second run had nothing to do and started no engine"
    answers = {}
    for line in (data / "out" / "keys.jsonl").read_text().splitlines():
        row = json.loads(line)
        answers[row["custom_id"]] = row["response"]["body"]["choices"][0]["message"]["content"].strip()
    assert answers.keys() == {"r0", "r1"}
    assert answers["r0"].startswith("48151") and answers["r1"].startswith("62342")
    (dead,) = [json.loads(line) for line in (data / "dead" / "keys.jsonl").read_text().splitlines()]
    assert dead["reason"] == "refused with status 404"
