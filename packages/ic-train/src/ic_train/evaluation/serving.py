"""Start a server for an evaluation, wait until it answers, and stop it whatever ends us, SIGKILL included."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from ic_train.evaluation.client import ServerError

_WATCH = Path(__file__).with_name("watch.py")
_POLL_S = 0.1
_STOP_S = 20
_TAIL_CHARACTERS = 3000


@contextlib.contextmanager
def serve(command: Sequence[str], log: Path, *, start_timeout_s: float) -> Iterator[str]:
    """Run a server's command; the base URL once /v1/models answers.

    Args:
        command: its words; `{port}` stands for a free port on loopback.
        log: gets the server's output.
        start_timeout_s: seconds until it has to answer.

    Raises:
        ServerError: the command cannot be run, ended, or did not answer in time; with the end of the log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    words = [word.replace("{port}", str(port)) for word in command]
    if shutil.which(words[0]) is None:
        raise ServerError(f"{words[0]} cannot be run: there is no such program")
    # closes when this process is gone, however it ended; watch.py then stops the server
    watched, held = os.pipe()
    with log.open("w") as output:
        # a session of its own, so that its children are stopped with it
        process = subprocess.Popen(
            [sys.executable, str(_WATCH), str(watched), *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(watched,),
        )
    os.close(watched)
    # a job's end by its scheduler, too, runs the code below
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        _wait(url, process, log, start_timeout_s)
        yield url
    finally:
        _stop(process)
        os.close(held)
        signal.signal(signal.SIGTERM, before)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, start_timeout_s: float) -> None:
    start = time.monotonic()
    while True:
        # URLError, too, is an OSError
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/models", timeout=5):
            return
        waited = time.monotonic() - start
        ended = process.poll()
        if ended is not None or waited > start_timeout_s:
            how = (
                f"ended with status {ended}" if ended is not None else f"did not answer within {waited:.0f} s"
            )
            raise ServerError(f"the server {how}; {log} ends:\n{log.read_text()[-_TAIL_CHARACTERS:]}")
        time.sleep(_POLL_S)


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
