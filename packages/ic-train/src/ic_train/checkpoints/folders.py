"""Names of checkpoints: which are whole, which is the last, which are old."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

PREFIX = "checkpoint-"
# written last, before the folder gets its name
COMPLETE = "complete.json"
PARTIAL = ".partial"
AUTO = "auto"
# before the name of a checkpoint that the run did not go on from
ABANDONED = "abandoned-"
# in the output folder: the checkpoint that the run went on from
RESUMED_FILE = "resumed"
logger = logging.getLogger(__name__)


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


def leave_others(output_dir: str | Path, resumed: Path) -> None:
    """Set aside what the run did not go on from: "auto" and `remove_old` would prefer it to what follows.

    That is every later checkpoint of the run, or all of them where it goes on from another folder's. They are
    renamed, never deleted.

    Args:
        output_dir: of the run.
        resumed: the checkpoint whose state the run has.
    """
    folders = checkpoint_folders(output_dir)
    own = [folder.resolve() for folder in folders]
    place = own.index(resumed.resolve()) + 1 if resumed.resolve() in own else 0
    for folder in folders[place:]:
        aside = _free_name(folder.with_name(ABANDONED + folder.name))
        folder.rename(aside)
        logger.warning("%s is set aside as %s: the run goes on from %s", folder, aside.name, resumed)
    (Path(output_dir) / RESUMED_FILE).write_text(f"{resumed}\n")


def remove(folder: Path) -> None:
    """Remove a checkpoint; one that is half removed is not taken for whole."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def remove_old(output_dir: str | Path, keep: int | None) -> None:
    """Remove what interrupted saves left, and all but the last `keep` whole checkpoints; None keeps all."""
    for folder in Path(output_dir).glob(f"{PREFIX}*{PARTIAL}"):
        shutil.rmtree(folder, ignore_errors=True)
    if keep is not None:
        for folder in checkpoint_folders(output_dir)[: -max(keep, 1)]:
            remove(folder)


def _free_name(path: Path) -> Path:
    """The path, or the first of path.2, path.3, ... that there is nothing at."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free
