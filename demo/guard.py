"""Run a command that must not outlive whoever started it: `python guard.py GRACE_S COMMAND...`.

Standard input is a lifeline. When it closes, because the parent asked or because it was killed without a
chance to clean up, the command and every process that it started are stopped. Uses the standard library
only, so that it is there before the command is.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

POLL_S = 0.1


def main(grace_s: float, command: list[str]) -> int:
    """Run a command until it ends or the lifeline closes; its exit status, as a shell would give it.

    Args:
        grace_s: seconds between SIGTERM and SIGKILL.
        command: program and arguments.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # only the lifeline ends the guard: a signal to the whole group would else orphan the command
        signal.signal(number, signal.SIG_IGN)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_default_signals,  # noqa: PLW1509  (unsafe with threads, of which there are none)
    )
    while process.poll() is None and not _lifeline_closed():
        pass
    _stop_group(process, grace_s)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _default_signals() -> None:
    """Undo, in the command, what it would inherit: ignored signals stay ignored across exec."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _lifeline_closed() -> bool:
    readable, _, _ = select.select([sys.stdin], [], [], POLL_S)
    return bool(readable) and not os.read(sys.stdin.fileno(), 1)


def _stop_group(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """SIGTERM to the command's group, then, after the grace, SIGKILL to what is left of it."""
    _signal_group(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline:
        # reaps the leader, which would otherwise count as a member of its group
        process.poll()
        if not _signal_group(process.pid, 0):
            break
        time.sleep(POLL_S)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def _signal_group(group: int, number: int) -> bool:
    """Signal a process group; whether it had any process."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
