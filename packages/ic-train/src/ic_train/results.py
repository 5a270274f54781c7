"""Write a measurement the way `bench/results` keeps them: flat rows, with how they came to be."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

HOST_FIELDS = ("commit", "dirty", "gpu", "driver", "versions")
VERSIONED = ("torch", "triton", "transformers", "vllm", "numpy")


def new_result_folder(results: Path, topic: str, *, device: str | None = None) -> Path:
    """Make `results/<yyyymmdd>-<gpu>-<topic>`, with a number behind it where that exists already.

    Args:
        results: usually `bench/results`.
        topic: short name, lower-case letters, digits and dashes.
        device: that measured; None: this machine's.

    Raises:
        ValueError: the topic has other characters.
    """
    if not re.fullmatch(r"[a-z0-9-]+", topic):
        raise ValueError(f"topic is {topic!r}; use lower-case letters, digits and dashes")
    slug = re.sub(r"[^a-z0-9]+", "-", (device or device_name()).lower().replace("nvidia ", "")).strip("-")
    name = f"{datetime.datetime.now(datetime.UTC):%Y%m%d}-{slug}-{topic}"
    results.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = results / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("unreachable: count never ends")


def write_result(
    folder: Path,
    topic: str,
    rows: list[dict[str, Any]],
    *,
    seed: int | None = None,
    host: Mapping[str, Any] | None = None,
) -> None:
    """Write `result.json`; a long measurement may do so after every row.

    Args:
        folder: from `new_result_folder`.
        topic: the same as there.
        rows: one flat mapping per measurement; raw samples may stand in a list beside the summary.
        seed: of the run.
        host: of the machine that measured, where that is not this one: what `host_of` says.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("rows is empty; a result needs at least one measurement")
    head, dirty = commit()
    result = {
        "topic": topic,
        "command": _command(),
        "commit": head,
        "dirty": dirty,
        "gpu": device_name(),
        "driver": _driver(),
        "versions": versions(),
        "seed": seed,
        **(host or {}),
        "rows": rows,
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")


def host_of(result: Path) -> dict[str, Any]:
    """What another result says of its machine and code, for rows that were made of what those measured.

    Args:
        result: a `result.json`.

    Raises:
        ValueError: it is none.
    """
    try:
        found = json.loads(result.read_text())
        return {field: found[field] for field in HOST_FIELDS}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{result} is no result: {error!r}; give a result.json that `bench` or `ic-train` wrote"
        ) from error


def device_name() -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide numbers."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _command() -> str:
    program = Path(sys.argv[0]).name
    return " ".join(["ic-train" if program in ("__main__.py", "cli.py") else program, *sys.argv[1:]])


def commit() -> tuple[str | None, bool | None]:
    """The commit that runs, and whether the tree differed from it.

    The variable IC_COMMIT says so where there is no repository, or another one, as in a container, on a job's node
    or on a machine that a tree was copied to.
    """
    if os.environ.get("IC_COMMIT"):
        return os.environ["IC_COMMIT"], None
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return head.stdout.strip(), bool(status.stdout.strip())


def _driver() -> str | None:
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return asked.stdout.strip().splitlines()[0]
