"""A stand-in for vLLM, and checkpoints without weights."""

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def _interrupts_reach_children() -> None:
    """A script's background jobs ignore SIGINT, and so does all that they start: it is what is tested here."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: None)


@dataclass(frozen=True)
class FakeVLLM:
    """A script that behaves like `vllm`, and the processes that it started."""

    script: Path
    pids: Path

    def processes_left(self, within_s: float = 60.0) -> list[int]:
        """Those still there after at most so many seconds."""
        deadline = time.monotonic() + within_s
        left = [int(pid) for pid in self.pids.read_text().split()]
        while left and time.monotonic() < deadline:
            left = [pid for pid in left if _runs(pid)]
            time.sleep(0.05)
        return left

    def wait_for_start(self) -> None:
        """Return once it runs."""
        deadline = time.monotonic() + 300
        while not self.pids.exists() or not self.pids.read_text():
            assert time.monotonic() < deadline, "the fake vllm did not start"
            time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether a process exists and is no zombie that nobody has collected yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], FakeVLLM]:
    """Makes a stand-in: "dies", "hangs", "right", "wrong", "dies-answering"."""

    def make(mode: str) -> FakeVLLM:
        script, pids = tmp_path / "vllm", tmp_path / "pids"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/fake_vllm.py" {mode} "$@"\n')
        script.chmod(0o755)
        monkeypatch.setenv("FAKE_VLLM_PIDS", str(pids))
        monkeypatch.setattr("demo.server.vllm_executable", lambda: script)
        return FakeVLLM(script, pids)

    return make


@pytest.fixture(scope="session")
def bare_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ic-nano's configuration and tokenizer, without weights."""
    from ic_model.byte_tokenizer import build_byte_tokenizer
    from ic_model.presets import preset

    folder = tmp_path_factory.mktemp("checkpoints") / "ic-nano"
    config = preset("ic-nano")
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    build_byte_tokenizer().save_pretrained(folder)
    return folder
