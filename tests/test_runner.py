"""`hatch run test`: every folder of tests is in a part, every part is run and told of, and nothing outlives it."""

import configparser
import runpy
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUNNER = ROOT / "tools" / "test.py"

# the runner, with other parts: what is behind them is theirs
WITH_PARTS = """
import runpy, sys
sys.argv = ["test.py"]
# where Python itself looks first for what a script imports
sys.path.insert(0, {folder!r})
names = runpy.run_path({runner!r})
main, PARTS = names["main"], names["PARTS"]
PARTS.clear()
PARTS.update({parts!r})
main.__globals__["PROGRAMS"] = ""
sys.exit(main())
"""


def script_of(parts: dict[str, str]) -> list[str]:
    commands = {name: [sys.executable, "-c", textwrap.dedent(code)] for name, code in parts.items()}
    return [
        sys.executable,
        "-c",
        WITH_PARTS.format(folder=str(RUNNER.parent), runner=str(RUNNER), parts=commands),
    ]


def test_every_folder_of_tests_is_in_a_part(monkeypatch):
    monkeypatch.syspath_prepend(str(RUNNER.parent))
    parts = runpy.run_path(str(RUNNER))["PARTS"]
    words = [word for command in parts.values() for word in command]
    configuration = configparser.ConfigParser()
    configuration.read(ROOT / "pytest.ini")
    missing = set(configuration["pytest"]["testpaths"].split()) - set(words)
    assert not missing
    # what one part of ic-train leaves out, another one has
    left_out = {word.removeprefix("--ignore=") for word in words if word.startswith("--ignore=")}
    assert left_out and left_out <= set(words)
    assert all((ROOT / file).is_file() for file in left_out)


def test_all_parts_run_whatever_fails_and_say_how_it_was():
    parts = {
        "good": "print('all of it')",
        "bad": "import sys; print('what was wrong'); sys.exit(3)",
        "last": "import os; print('threads', os.environ['OMP_NUM_THREADS'])",
    }
    done = subprocess.run(script_of(parts), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1, done.stderr
    for said in ("all of it", "what was wrong", "threads 1", "bad: failed with status 3", "last: passed"):
        assert said in done.stdout
    assert done.stdout.rstrip().splitlines()[-1].endswith("last: passed")
    good = {name: code for name, code in parts.items() if name != "bad"}
    assert subprocess.run(script_of(good), capture_output=True, check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_ends_it_ends_what_it_started(tmp_path, number):
    """As pytest does, the part stops on an interrupt what it started itself."""
    code = """
        import pathlib, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        try:
            pathlib.Path({file!r}).write_text(str(child.pid))
            time.sleep(600)
        except KeyboardInterrupt:
            child.kill()
            child.wait()
    """
    file = tmp_path / "child"
    running = subprocess.Popen(script_of({"waits": code.format(file=str(file)), "never": "pass"}))
    deadline = time.monotonic() + 60
    while not (file.is_file() and file.read_text()):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    child = Path("/proc") / file.read_text()
    assert child.is_dir()
    running.send_signal(number)
    assert running.wait(60) != 0
    assert not child.is_dir()
