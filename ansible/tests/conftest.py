"""One bed of machines for all tests, and Ansible as its users run it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import image
import pytest
import training
from ansible_play import Play, player
from bed import GATEWAY, Bed


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A folder with a short name: ssh's control sockets have 108 characters."""
    folder = Path(tempfile.mkdtemp(prefix="icbed"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def base(scratch: Path) -> Path:
    """The bare system of all machines. IC_BED_CACHE names a folder that keeps it."""
    image.install_tools()
    kept = os.environ.get("IC_BED_CACHE")
    return image.build(Path(kept) if kept else scratch / "image")


@pytest.fixture(scope="session")
def bed(base: Path, scratch: Path) -> Iterator[Bed]:
    """Three machines of bare Debian: c1, n1 and n2."""
    shared = scratch / "shared"
    shared.mkdir()
    bed = Bed(
        base=base,
        packages=base.parent / "debian",
        scratch=scratch,
        names=["c1", "n1", "n2"],
        binds=training.folders(),
        shared=shared,
    )
    with bed as made:
        yield made


@dataclass(frozen=True)
class Web:
    """A web server inside of the bed's network."""

    folder: Path
    url: str


@pytest.fixture(scope="session")
def web(bed: Bed, scratch: Path) -> Iterator[Web]:
    """What the machines can download."""
    made = Web(scratch / "web", f"http://{GATEWAY}:8090")
    made.folder.mkdir()
    serve = bed.inside(
        sys.executable, "-m", "http.server", "--bind", GATEWAY, "--directory", made.folder, "8090"
    )
    server = subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield made
    server.terminate()
    server.wait(timeout=20)


@pytest.fixture(scope="session")
def play(bed: Bed) -> Play:
    """Run a playbook on the bed: play("slurm", groups, variables, "--check")."""
    return player(bed)
