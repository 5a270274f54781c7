"""A checkpoint is whole or not there: crashes, full disks, damaged files, and what training does meanwhile."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

from ic_train.checkpoints import (
    COMPLETE,
    CheckpointWriter,
    export,
    latest_checkpoint,
    load_checkpoint,
    resolve_resume,
    saving,
)
from ic_train.checkpoints.folders import leave_others, remove_old
from ic_train.trainers.restartable import Restartable


class Training:
    """Weights, an optimiser with moments, and a schedule."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Linear(64, 64)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, total_iters=100)

    def step(self) -> None:
        self.model(torch.ones(2, 64)).square().sum().backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def save(self, writer: CheckpointWriter, step: int) -> None:
        files = {"trainer_state.json": "{}"}
        writer.save(step, self.model, self.optimizer, self.scheduler, files, {"seed": 0})

    def load(self, folder: Path) -> None:
        load_checkpoint(folder, self.model, self.optimizer, self.scheduler)

    def state(self) -> list[torch.Tensor]:
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        rate = torch.tensor(self.scheduler.get_last_lr())
        return [*(one.detach().clone() for one in (*self.model.parameters(), *moments)), rate]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


def writer_of(folder: Path, **options: Any) -> CheckpointWriter:
    return CheckpointWriter(folder, None, **{"keep": None, "background": True, **options})


def test_what_is_saved_is_the_moment_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, released = dcp.save, threading.Event()

    def held(*args: Any, **kwargs: Any) -> Any:
        assert released.wait(60), "training waited for the disk"
        return write(*args, **kwargs)

    monkeypatch.setattr(saving.dcp, "save", held)
    training, writer = Training(), writer_of(tmp_path)
    training.step()
    training.save(writer, 1)
    before = training.state()
    for _ in range(5):
        training.step()
    assert latest_checkpoint(tmp_path) is None, "not whole yet"
    released.set()
    assert writer.finish()
    folder = latest_checkpoint(tmp_path)
    assert folder == tmp_path / "checkpoint-1"
    other = Training(seed=1)
    other.load(folder)
    assert same(other.state(), before) and not same(training.state(), before)
    other.step()
    again = Training(seed=2)
    again.load(folder)
    again.step()
    assert same(other.state(), again.state())


def test_a_crash_in_the_middle_of_a_save_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    program = f"""
import os, sys
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from pathlib import Path
from test_checkpoints import Training, writer_of
from ic_train.checkpoints import saving
training, writer = Training(), writer_of(Path({str(tmp_path)!r}))
training.step()
training.save(writer, 10)
writer.finish()
training.step()
# the power goes when all data is there and the name is not
saving._complete = lambda *_: os._exit(9)
training.save(writer, 20)
writer.finish()
"""
    died = subprocess.run([sys.executable, "-c", program], check=False, timeout=120, capture_output=True)
    assert died.returncode == 9, died.stderr.decode()[-2000:]
    assert (tmp_path / "checkpoint-20.partial").is_dir()
    assert resolve_resume("auto", tmp_path) == tmp_path / "checkpoint-10"
    Training().load(tmp_path / "checkpoint-10")
    with pytest.raises(
        ValueError, match=r"checkpoint-20.partial', which has no complete.json: .* interrupted"
    ):
        resolve_resume(str(tmp_path / "checkpoint-20.partial"), tmp_path)
    remove_old(tmp_path, None)
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-10"]


@pytest.mark.parametrize("place", ["data", "small files"])
def test_a_full_disk_costs_one_checkpoint_and_not_the_run(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    training, writer = Training(), writer_of(tmp_path)
    training.step()
    training.save(writer, 1)
    assert writer.finish()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(*((saving.dcp, "save") if place == "data" else (saving.torch, "save")), full)
        training.step()
        with caplog.at_level(logging.ERROR):
            training.save(writer, 2)
            writer.finish()
    assert "checkpoint-2 was not saved: [Errno 28] No space left on device. Training goes on" in caplog.text
    assert writer.failed_steps == [2]
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["checkpoint-1"]
    training.save(writer, 3)
    assert writer.finish() and latest_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


def test_a_checkpoint_gets_its_name_when_all_of_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[Path] = set()
    unsynced: list[Path] = []
    fsync, rename = os.fsync, Path.rename

    def noted(file: int) -> None:
        fsync(file)
        # the metadata's name is given to it afterwards
        synced.add(Path(str(Path(f"/proc/self/fd/{file}").readlink()).removesuffix(".tmp")))

    def checked(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            unsynced.extend(path for path in (self, *self.iterdir()) if path not in synced)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", checked)
    training, writer = Training(), writer_of(tmp_path, background=False)
    training.step()
    training.save(writer, 1)
    assert latest_checkpoint(tmp_path) is not None
    assert not unsynced
    assert tmp_path in synced, "its name, too"


def test_a_checkpoint_loses_its_mark_before_it_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training()
    training.step()
    training.save(writer_of(tmp_path, background=False), 1)
    remove, marked = saving.shutil.rmtree, []

    def noted(folder: Path, **options: Any) -> None:
        marked.append((folder / COMPLETE).exists())
        remove(folder, **options)

    monkeypatch.setattr(saving.shutil, "rmtree", noted)
    training.save(writer_of(tmp_path, background=False), 1)
    assert marked and not any(marked)


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    training, writer = Training(), writer_of(tmp_path)
    training.step()
    training.save(writer, 1)
    assert writer.finish() and writer.saved_step == 1
    before = (tmp_path / "checkpoint-1").stat()
    training.save(writer, 1)
    assert writer.finish() and (tmp_path / "checkpoint-1").stat() == before


def test_going_back_leaves_what_came_later_but_deletes_none_of_it(tmp_path: Path) -> None:
    training = Training()
    training.step()

    def save(*steps: int) -> None:
        writer = writer_of(tmp_path, background=False, keep=2)
        for step in steps:
            training.save(writer, step)

    def names() -> list[str]:
        return sorted(folder.name for folder in tmp_path.glob("*checkpoint-*"))

    save(40, 60)
    leave_others(tmp_path, tmp_path / "checkpoint-60")
    assert names() == ["checkpoint-40", "checkpoint-60"]
    leave_others(tmp_path, tmp_path / "checkpoint-40")
    assert resolve_resume("auto", tmp_path) == tmp_path / "checkpoint-40"
    # what the run saves from here on is what is kept
    save(50, 55)
    assert names() == ["abandoned-checkpoint-60", "checkpoint-50", "checkpoint-55"]
    # another folder's: nothing here is on the way to it
    save(60)
    leave_others(tmp_path, tmp_path / "elsewhere" / "checkpoint-55")
    assert resolve_resume("auto", tmp_path) is None
    assert names() == [f"abandoned-checkpoint-{number}" for number in ("55", "60", "60.2")]


def test_only_the_last_ones_are_kept_and_the_order_is_by_number(tmp_path: Path) -> None:
    training, writer = Training(), writer_of(tmp_path, keep=2, background=False)
    training.step()
    for step in (8, 9, 10, 100):
        training.save(writer, step)
    names = sorted(folder.name for folder in tmp_path.iterdir())
    assert names == ["checkpoint-10", "checkpoint-100"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    record = json.loads((tmp_path / "checkpoint-100" / COMPLETE).read_text())
    assert record["step"] == 100 and record["ranks"] == 1 and record["seed"] == 0


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    training, writer = Training(), writer_of(tmp_path, background=False)
    training.step()
    training.save(writer, 1)
    folder = tmp_path / "checkpoint-1"
    other = Training()
    other.model = torch.nn.Linear(64, 32)
    other.optimizer = torch.optim.AdamW(other.model.parameters())
    with pytest.raises(ValueError, match=r"checkpoint-1 cannot be loaded: .* of another model"):
        other.load(folder)
    (data,) = folder.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoint-1 cannot be loaded: .* it is damaged"):
        training.load(folder)
    with pytest.raises(ValueError, match=r"resume is 'nowhere', which has no complete.json"):
        resolve_resume("nowhere", tmp_path)
    assert resolve_resume("auto", tmp_path / "new") is None


@pytest.mark.parametrize("name", ["scheduler.pt", "rng_0.pt", "trainer_state.json"])
@pytest.mark.parametrize("content", [b"", b"{"])
def test_a_damaged_small_file_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    training, writer = Training(), writer_of(tmp_path, background=False)
    training.step()
    training.save(writer, 1)
    folder = tmp_path / "checkpoint-1"
    (folder / name).write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"{name} cannot be read: .*; the checkpoint is damaged, give an earlier"
    ):
        training.load(folder)
        saving.restore_rng(folder)
        Restartable().train(resume_from_checkpoint=str(folder))


def test_export_refuses_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "has no complete.json" in capsys.readouterr().err
