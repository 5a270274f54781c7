"""Names of checkpoints: which are whole, which is the last, which are old."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

PREFIX = "checkpoint-"
# written last, before the folder gets its name
COMPLETE = "complete.json"
PARTIAL = ".partial"
AUTO = "auto"


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """The whole checkpoints of a run, the oldest first."""
    found = []
    for folder in Path(output_dir).glob(f"{PREFIX}*"):
        number = re.fullmatch(rf"{PREFIX}(\d+)", folder.name)
        if number and (folder / COMPLETE).is_file():
            found.append((int(number[1]), folder))
    return [folder for _, folder in sorted(found)]


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The last whole checkpoint of a run, or None."""
    folders = checkpoint_folders(output_dir)
    return folders[-1] if folders else None


def resolve_resume(resume: str, output_dir: str | Path) -> Path | None:
    """The checkpoint that `resume` means.

    Args:
        resume: "auto" for the last whole one of the output folder, if there is one; a checkpoint's folder;
        or empty. output_dir: of the run.

    Raises:
        ValueError: the folder is no whole checkpoint.
    """
    if not resume:
        return None
    if resume == AUTO:
        return latest_checkpoint(output_dir)
    folder = Path(resume)
    if not (folder / COMPLETE).is_file():
        raise ValueError(
            f"resume is {resume!r}, which has no {COMPLETE}: it is no checkpoint, or its save was interrupted; "
            f"accepted: 'auto', or a folder {PREFIX}N of a run"
        )
    return folder


def read_record(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        ValueError: the record is damaged.
    """
    try:
        return json.loads((folder / COMPLETE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / COMPLETE} cannot be read: {error}") from None


def remove_old(output_dir: str | Path, keep: int | None) -> None:
    """Remove what interrupted saves left, and all but the last `keep` whole checkpoints; None keeps all."""
    for folder in Path(output_dir).glob(f"{PREFIX}*{PARTIAL}"):
        shutil.rmtree(folder, ignore_errors=True)
    if keep is not None:
        for folder in checkpoint_folders(output_dir)[: -max(keep, 1)]:
            # the mark first: what is half removed must not be taken for whole
            (folder / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
