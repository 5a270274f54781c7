"""One real `vllm serve` for all tests, on loopback, stopped whatever happens."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from served_models import served_checkpoint, users_environment

HEALTHY_WITHIN_S = 300
REQUEST_TIMEOUT_S = 180


@dataclass(frozen=True)
class Server:
    """A running server: where it is, what it serves, what it logs."""

    url: str
    checkpoint: Path
    log: Path

    def post(self, path: str, body: bytes | dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and JSON answer of a POST; a dictionary is sent as JSON, bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def complete(self, prompt: list[int], **options: Any) -> dict[str, Any]:
        """The first choice of a greedy completion of token ids."""
        body = {"model": str(self.checkpoint), "prompt": prompt, "temperature": 0, "ignore_eos": True}
        status, answer = self.post("/v1/completions", {**body, **options})
        assert status == 200, answer
        return answer["choices"][0]

    def get(self, path: str) -> bytes:
        """Body of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=REQUEST_TIMEOUT_S) as answer:
            return answer.read()

    def metric(self, name: str) -> float:
        """Sum of a Prometheus metric over its labels."""
        lines = self.get("/metrics").decode().splitlines()
        samples = [line for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        assert samples, f"/metrics has no {name}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in samples)

    def healthy(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    checkpoint = served_checkpoint()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = Server(f"http://127.0.0.1:{port}", checkpoint, folder / "server.log")
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(checkpoint)]
    # float32 because vLLM serves a float32 checkpoint in bfloat16 by itself, and exact tokens are compared
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    with running.log.open("w") as log:
        # a session of its own, so that its children can be stopped with it
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=users_environment()
        )
    try:
        _wait_until_healthy(running, process, pytestconfig)
        yield running
    finally:
        _stop(process)


def _wait_until_healthy(server: Server, process: subprocess.Popen, pytestconfig: pytest.Config) -> None:
    reporter = pytestconfig.pluginmanager.get_plugin("terminalreporter")
    start = shown = time.monotonic()
    while not server.healthy():
        waited = time.monotonic() - start
        if process.poll() is not None or waited > HEALTHY_WITHIN_S:
            log = server.log.read_text()
            pytest.fail(f"no healthy server after {waited:.0f} s, exit {process.poll()}; log:\n{log[-8000:]}")
        if reporter and time.monotonic() - shown > 10:
            shown = time.monotonic()
            reporter.write_line(f"waiting for vllm serve: {waited:.0f} s")
        time.sleep(0.5)


def _stop(process: subprocess.Popen) -> None:
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signal_number)
        except ProcessLookupError:
            return
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            continue


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    server = getattr(item, "funcargs", {}).get("server")
    if report.failed and server is not None:
        report.sections.append(("end of the server's log", server.log.read_text()[-4000:]))
    return report
