"""Progress while one waits: a line that is rewritten on a terminal, plain lines everywhere else."""

from __future__ import annotations

import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

# a plain line for every change, but not more often than this; an unchanged one is repeated more seldom
PLAIN_EVERY_S = 5.0
PLAIN_REPEAT_S = 20.0
TICK_S = 0.25

_ERASE_LINE = "\r\x1b[K"
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
# "(EngineCore pid=7) INFO 11-23 21:11:10 [core.py:77] message" and the like
_LOG_LINE = re.compile(
    r"(?:\(.*?pid=\d+\) )?(?:INFO|WARNING|ERROR) [\d-]+ [\d:]+ \[[^\]]*\] (?P<message>.*\w.*)"
)
_TAIL_BYTES = 65536


class Progress:
    """Shows seconds since the start and what goes on.

    Args:
        stream: where to; rewritten in place when it is a terminal.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.started = time.monotonic()
        self._in_place = self.stream.isatty()
        self._last_text = ""
        self._last_at = float("-inf")

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def show(self, text: str) -> None:
        """Show what goes on now."""
        if self._in_place:
            width = shutil.get_terminal_size().columns - 1
            self.stream.write(_ERASE_LINE + self._line(text)[:width])
        else:
            since = self.elapsed_s - self._last_at
            if since < (PLAIN_REPEAT_S if text == self._last_text else PLAIN_EVERY_S):
                return
            self.stream.write(f"{self._line(text)}\n")
            self._last_text, self._last_at = text, self.elapsed_s
        self.stream.flush()

    def done(self, text: str) -> None:
        """Show how it ended, and go to the next line."""
        self.clear()
        self.stream.write(f"{self._line(text)}\n")
        self.stream.flush()

    def clear(self) -> None:
        """Remove an unfinished line."""
        if self._in_place:
            self.stream.write(_ERASE_LINE)
            self.stream.flush()

    def _line(self, text: str) -> str:
        return f"  {self.elapsed_s:5.0f} s  {text}"


@contextmanager
def ticking(text: Callable[[], str], progress: Progress) -> Iterator[Progress]:
    """Show `text()` again and again while the body runs, from a thread of its own."""
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(TICK_S):
            progress.show(text())

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        ended.set()
        thread.join()
        progress.clear()


def last_log_message(log: Path) -> str:
    """The message of the last line in vLLM's log format, else the last line; empty when there is none."""
    lines = log_tail(log, lines=200)
    for line in reversed(lines):
        match = _LOG_LINE.match(line)
        if match:
            return match["message"].strip()
    return lines[-1] if lines else ""


def log_tail(log: Path, *, lines: int) -> list[str]:
    """The last lines of a log that are not empty, without colours."""
    with log.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    found = (_ANSI.sub("", line).rstrip() for line in re.split(r"[\r\n]+", text))
    return [line for line in found if line][-lines:]
