"""A real `vllm serve` on loopback for the serving benchmark, and what asks it; ended whatever happens."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# the console script is not there where vLLM is only on PYTHONPATH
VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]


class ServerFailed(Exception):
    """The server ended or did not become healthy; the message has the end of its log."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    model: str
    log: Path
    process: subprocess.Popen

    def post(
        self, path: str, body: dict[str, Any] | bytes, timeout_s: float = 600
    ) -> tuple[int, dict[str, Any]]:
        """Status and JSON answer of a POST; status 0 where the connection broke."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            try:
                return error.code, json.loads(text)
            except ValueError:
                return error.code, {"error": {"message": text}}
        except (OSError, ValueError) as error:
            return 0, {"error": {"message": f"{type(error).__name__}: {error}"}}

    def complete(
        self, prompt: Sequence[int] | str, timeout_s: float = 600, **options: Any
    ) -> tuple[int, dict[str, Any]]:
        """A greedy completion."""
        body = {"model": self.model, "prompt": prompt, "temperature": 0, "max_tokens": 16, **options}
        return self.post("/v1/completions", body, timeout_s)

    def healthy(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def metric(self, name: str) -> float:
        """Sum of a Prometheus metric over its labels; NaN where it is not there."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        samples = [line for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in samples) if samples else float("nan")

    def wait(self, timeout_s: float) -> int | None:
        """Exit status once it has ended; None where it still runs after so long."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None


@contextmanager
def serve(
    model: Path | str, arguments: Sequence[str], log: Path, *, healthy_within_s: float = 400
) -> Iterator[Server]:
    """Serve a model inside the block.

    Args:
        model: checkpoint folder.
        arguments: of `vllm serve`, beside address and model.
        log: file that gets what it prints.
        healthy_within_s: after which it counts as failed.

    Raises:
        ServerFailed: it ended, or was not healthy in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*VLLM, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *arguments]
    print(f"    vllm {' '.join(command[3:])}", flush=True)
    with log.open("w") as output:
        # a session of its own, so that its children end with it
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    server = Server(f"http://127.0.0.1:{port}", str(model), log, process)
    try:
        _wait_until_healthy(server, healthy_within_s)
        yield server
    finally:
        end_session(process)


def _wait_until_healthy(server: Server, within_s: float) -> None:
    start = shown = time.monotonic()
    while not server.healthy():
        now = time.monotonic()
        if server.process.poll() is not None or now - start > within_s:
            text = server.log.read_text(errors="replace")
            raise ServerFailed(
                f"exit {server.process.poll()} after {now - start:.0f} s; log:\n{text[-6000:]}"
            )
        if now - shown > 10:
            shown = now
            last = server.log.read_text(errors="replace").strip().splitlines()
            print(f"    {now - start:5.0f} s  {last[-1][-140:] if last else ''}", flush=True)
        time.sleep(0.5)
    print(f"    healthy after {time.monotonic() - start:.0f} s", flush=True)


def end_session(process: subprocess.Popen) -> None:
    """End a process that leads its session, and all that are in it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            continue


def run_child(specification: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Run `bench.cases.serving_engine` on a specification; its progress is shown.

    Returns:
        its result, or `{"error": ...}` where it ended without one or took longer than timeout_s.
    """
    from bench.cases.serving_engine import MARK

    command = [sys.executable, "-m", "bench.cases.serving_engine"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    timer = threading.Timer(timeout_s, end_session, [process])
    timer.start()
    found: dict[str, Any] | None = None
    tail: list[str] = []
    try:
        process.stdin.write(json.dumps(specification))
        process.stdin.close()
        for line in process.stdout:
            if line.startswith(MARK):
                found = json.loads(line[len(MARK) :])
                continue
            if line.startswith("    ") or "ERROR" in line or "InfiniteContext" in line:
                print(line.rstrip()[:200], flush=True)
            tail = [*tail[-60:], line]
        process.wait(60)
    finally:
        timer.cancel()
        end_session(process)
    return found if found is not None else {"error": f"exit {process.returncode}: {''.join(tail)[-3000:]}"}
