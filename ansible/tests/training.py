"""The environment in which the project trains, for jobs on the bed's machines."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from ansible_play import ANSIBLE
from image import BedError, run

ROOT = ANSIBLE.parent
PACKAGE = ROOT / "packages" / "ic-train"


def python() -> Path:
    """Python with accelerate and ic_train: IC_TRAIN_PYTHON, or that of hatch's default environment."""
    named = os.environ.get("IC_TRAIN_PYTHON")
    if not named:
        try:
            found = subprocess.run(
                ["hatch", "env", "find", "default"], cwd=ROOT, capture_output=True, text=True
            )
        except FileNotFoundError as error:
            raise BedError("no hatch: set IC_TRAIN_PYTHON to a Python that has ic-train installed") from error
        named = f"{found.stdout.strip().splitlines()[0]}/bin/python"
    if not Path(named).exists():
        raise BedError(f"{named} is not there: run `hatch env create`, or set IC_TRAIN_PYTHON")
    return Path(named)


def folders() -> list[Path]:
    """What a machine has to see for that Python to run: its environment, the Python below it, the project.

    Debian's own Python is there already: the machines are of the same release, and need their own /usr to boot.
    """
    asked = "import sys; print(sys.prefix); print(sys.base_prefix)"
    found = [Path(line) for line in run(python(), "-c", asked).stdout.splitlines()]
    return [ROOT, *(folder for folder in found if folder != Path("/usr"))]


def make_toys(folder: Path) -> None:
    """A small model and a corpus, as ic-train's own tests make them."""
    code = "import sys, pathlib, training_runs; training_runs.make_toys(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE / "tests")}
    run(python(), "-c", code, folder, env=environment)
