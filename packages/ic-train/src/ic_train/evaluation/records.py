"""Answers on disk: one JSON object a line, written as soon as it exists; a rerun asks only what is missing."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SETTINGS_FILE = "run.json"


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """The records of a file by their id, in the file's order.

    A last line without its line break is what a killed process leaves; it is left out.

    Args:
        path: JSON lines; each an object with `id`.

    Raises:
        ValueError: the file does not exist, or a line is not JSON, has no id, or repeats one.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    records: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
        except ValueError:
            raise ValueError(f"{path}, line {number} is not JSON: {line[:60]!r}") from None
        name = record.get("id") if isinstance(record, dict) else None
        if not isinstance(name, str) or not name:
            raise ValueError(f"{path}, line {number} has no id; every line is an object with a text as 'id'")
        if name in records:
            raise ValueError(f"{path}, line {number} repeats the id {name!r}; every id stands once")
        records[name] = record
    return records


class Records:
    """An append-only file of records, held by one process at a time.

    Args:
        path: made where it does not exist.

    Raises:
        ValueError: another process holds the file, or it cannot be read (see `read_records`).
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{path} is being written by another process; wait for it or end it") from None
        try:
            self.by_id = read_records(path)
        except ValueError:
            self._file.close()
            raise
        # the torn line goes away before anything is appended to it
        data = path.read_bytes()
        self._file.truncate(data.rfind(b"\n") + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, record: dict[str, Any]) -> None:
        """Write a record; it has left this process when this returns."""
        assert record["id"] not in self.by_id, record["id"]
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.by_id[record["id"]] = record


def require_ids(path: Path, records: Iterable[str], wanted: Iterable[str]) -> None:
    """Refuse a file of answers that lacks some.

    Raises:
        ValueError: ids are missing; says how many, and the first ones.
    """
    present = set(records)
    missing = [name for name in wanted if name not in present]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(f"{path} lacks {len(missing)} answers: {shown}; run what makes it again to add them")


def read_settings(folder: Path, *, file: str = SETTINGS_FILE) -> dict[str, Any]:
    """The settings that a folder holds; none where it holds no run.

    Raises:
        ValueError: the file is damaged; names it.
    """
    path = folder / file
    if not path.is_file():
        return {}
    try:
        held = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} holds no settings: {error!r}") from None
    if not isinstance(held, dict):
        raise ValueError(f"{path} holds no settings, but {type(held).__name__}")
    return held


def hold_settings(folder: Path, settings: dict[str, Any], *, file: str = SETTINGS_FILE) -> None:
    """Keep a run's settings beside its answers; a rerun into the same folder must have the same ones.

    Args:
        folder: made where it does not exist.
        settings: JSON.
        file: that holds them.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    path = folder / file
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        # a name of its own first: a killed process leaves a whole file or none
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(settings, indent=1) + "\n")
        part.rename(path)
        return
    held = read_settings(folder, file=file)
    for name in [*settings, *(set(held) - set(settings))]:
        if held.get(name) != settings.get(name):
            raise ValueError(
                f"{folder} holds a run with {name} {held.get(name)!r}, this one has {settings.get(name)!r}; "
                "give the same, or another --out"
            )
