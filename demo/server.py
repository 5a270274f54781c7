"""Start `vllm serve`, wait until it is healthy, and stop it whatever happens."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from demo import guard
from demo.progress import TICK_S, Progress, last_log_message, log_tail

HOST = "127.0.0.1"
HEALTH_TIMEOUT_S = 5.0
LOG_TAIL_LINES = 25
# vLLM takes about three seconds to end by itself
STOP_GRACE_S = 10.0


class ServerError(RuntimeError):
    """The server did not start, or died. The message ends with the tail of its log and the log's path."""


def vllm_executable() -> Path:
    """The `vllm` script of the environment that runs this.

    Raises:
        ServerError: vLLM is not installed there.
    """
    script = Path(sys.executable).with_name("vllm")
    if not script.is_file():
        raise ServerError(f"{script} does not exist; run the demo with `hatch run demo`, which installs vLLM")
    return script


def choose_port(wanted: int) -> int:
    """A free port on the loopback interface: the wanted one, or any when that is 0.

    Raises:
        ServerError: something listens on the wanted port.
    """
    with socket.socket() as probe:
        # as servers do: a port whose last connections are still closing counts as free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted))
        except OSError as error:
            raise ServerError(
                f"--port is {wanted}, which cannot be used ({error.strerror}); "
                "give a free one, or leave it out for any"
            ) from None
        return probe.getsockname()[1]


class Server:
    """A `vllm serve` process on the loopback interface, as a context manager.

    It runs under `guard.py`, so that it ends with this process even when that is killed outright.

    Args:
        model: checkpoint folder.
        port: 0 for any free one.
        executable: the `vllm` script; by default the one beside this Python.
        keep_log: keep the log file also when nothing failed.
        stop_grace_s: seconds between asking it to end and ending it; None for STOP_GRACE_S.
        flags: more of `vllm serve`.
    """

    def __init__(
        self,
        model: Path,
        *,
        port: int = 0,
        executable: Path | None = None,
        keep_log: bool = False,
        stop_grace_s: float | None = None,
        flags: Sequence[str] = (),
    ) -> None:
        self.port = choose_port(port)
        self.command = [
            str(executable or vllm_executable()), "serve", str(model), "--host", HOST, "--port", str(self.port),
            *flags,
        ]  # fmt: skip
        self.keep_log = keep_log
        self.stop_grace_s = STOP_GRACE_S if stop_grace_s is None else stop_grace_s
        self.log = Path()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> Self:
        descriptor, name = tempfile.mkstemp(prefix="infinite-context-demo-", suffix=".log")
        self.log = Path(name)
        with os.fdopen(descriptor, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, guard.__file__, str(self.stop_grace_s), *self.command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # vLLM reports usage to its makers unless told not to; a demo has no business doing so
                env=os.environ | {"VLLM_NO_USAGE_STATS": "1"},
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        failed = kind is not None and issubclass(kind, Exception)
        if not failed and not self.keep_log:
            self.log.unlink(missing_ok=True)

    def stop(self) -> None:
        """Stop the server and every process that it started; returns when they are gone."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.close()
        # an impatient second Ctrl-C ends the wait, not the guard, which has its order already
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self.stop_grace_s + 5)

    def wait_until_healthy(self, timeout_s: float, progress: Progress) -> None:
        """Wait until /health answers, showing the seconds and what the server logs.

        Raises:
            ServerError: it died, or was not healthy in time.
        """
        while not self._is_healthy():
            self.check_alive()
            if progress.elapsed_s > timeout_s:
                progress.clear()
                raise self.failure(
                    f"the server was not healthy after {timeout_s:.0f} s; --timeout SECONDS gives it longer"
                )
            progress.show(last_log_message(self.log) or "waiting for vLLM's first words")
            time.sleep(TICK_S)

    def check_alive(self) -> None:
        """Raise ServerError when the server has ended."""
        assert self._process is not None
        status = self._process.poll()
        if status is not None:
            raise self.failure(f"the server ended by itself with exit status {status}")

    def failure(self, what: str) -> ServerError:
        """An error that shows the end of the log and says where the whole of it is."""
        tail = "\n".join(f"  | {line}" for line in log_tail(self.log, lines=LOG_TAIL_LINES))
        return ServerError(f"{what}\n{tail or '  (it logged nothing)'}\nwhole log: {self.log}")

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=HEALTH_TIMEOUT_S) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False
