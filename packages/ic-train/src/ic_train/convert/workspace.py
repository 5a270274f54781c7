"""The folder in which a conversion grows: whole files only, so that it can be continued after any interruption."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

_SETTINGS = "settings.json"


class Workspace:
    """Files by name, each written under another name first and renamed when it is on disk.

    Args:
        folder: made where it does not exist.
        settings: what the files depend on. Files made under other settings are removed.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        text = json.dumps(settings, sort_keys=True, indent=1)
        marker = folder / _SETTINGS
        if folder.exists() and not (marker.is_file() and marker.read_text() == text):
            if any(folder.iterdir()) and not marker.is_file():
                raise ValueError(f"{folder} is in the way: it is not the working folder of a conversion")
            shutil.rmtree(folder)
        with _disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not marker.is_file():
                _replace(marker, lambda path: path.write_text(text))

    def path(self, name: str) -> Path:
        """Where a file of that name is."""
        return self.folder / name

    def has(self, name: str) -> bool:
        """Whether it is there, which means whole."""
        return self.path(name).is_file()

    def save(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write tensors.

        Raises:
            ValueError: the disk is full, or does not take them for another reason.
        """
        held = {key: value.contiguous() for key, value in tensors.items()}
        with _disk(self.folder):
            _replace(self.path(name), lambda path: save_file(held, path, metadata={"format": "pt"}))

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """Read tensors."""
        return load_file(self.path(name))

    def save_json(self, name: str, value: Any) -> None:
        """Write a value as JSON.

        Raises:
            ValueError: the disk is full.
        """
        with _disk(self.folder):
            _replace(self.path(name), lambda path: path.write_text(json.dumps(value, indent=1) + "\n"))

    def load_json(self, name: str) -> Any:
        """Read JSON."""
        return json.loads(self.path(name).read_text())

    def remove(self, name: str) -> None:
        """Delete a file if it is there."""
        self.path(name).unlink(missing_ok=True)


class _disk:
    """Turns what the disk does not take into one clear error."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError | SafetensorError):
            raise ValueError(
                f"{self.folder} cannot be written: {error}. Nothing half-written counts: make "
                "room and run the same "
                "command again, it continues"
            ) from None


def _replace(path: Path, write: Any) -> None:
    # the process's number: two that were started by mistake do not write into one file
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(partial)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
