"""Prometheus and Alertmanager: those of the machine, or Debian's, fetched by apt-get and unpacked elsewhere.

Unpacked, not installed: a package's installation would start its service, which listens on all interfaces. But
Debian's Alertmanager reads its templates from /usr/share and takes no other place, so that it runs with its own
folder laid over that one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("prometheus", "prometheus-alertmanager")
APT_TIMEOUT_S = 240
# in a mount namespace of its own; who is not root is root in one of users
LAID_OVER = """#!/bin/sh
as=
[ "$(id -u)" = 0 ] || as=--map-root-user
exec unshare $as --mount sh -c '
    mount -t overlay overlay -o "lowerdir=$0/share:/usr/share" /usr/share && exec "$@"
' {usr} {usr}/bin/{name} "$@"
"""


@dataclass(frozen=True, kw_only=True)
class Programs:
    """Paths of the programs."""

    prometheus: Path
    promtool: Path
    alertmanager: Path
    amtool: Path


NAMES = {
    "prometheus": "prometheus",
    "promtool": "promtool",
    "alertmanager": "prometheus-alertmanager",
    "amtool": "amtool",
}


def programs() -> Programs:
    """The four programs, fetched when one is missing."""
    found = {key: shutil.which(name) for key, name in NAMES.items()}
    if not all(found.values()):
        folder = _unpacked()
        found = {key: str(folder / name) for key, name in NAMES.items()}
    return Programs(**{key: Path(path) for key, path in found.items() if path})


def _unpacked() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infinite-context"
    folder = base / "prometheus-debian" / "run"
    if folder.is_dir():
        return folder
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base) as name:
        scratch = Path(name)
        # apt drops its rights to a user who must be able to write here
        scratch.chmod(0o777)
        if _apt("download", *PACKAGES, folder=scratch).returncode:
            # a fresh machine has no lists of packages yet
            updated = _apt("update", folder=scratch)
            assert not updated.returncode, updated.stderr
            fetched = _apt("download", *PACKAGES, folder=scratch)
            assert not fetched.returncode, fetched.stderr
        for package in scratch.glob("*.deb"):
            subprocess.run(
                ["dpkg-deb", "--extract", package, scratch / "root"], check=True, timeout=APT_TIMEOUT_S
            )
        (scratch / "root/run").mkdir()
        for program in NAMES.values():
            script = scratch / "root/run" / program
            script.write_text(LAID_OVER.format(usr=folder.parent / "usr", name=program))
            script.chmod(0o755)
        shutil.rmtree(folder.parent, ignore_errors=True)
        (scratch / "root").rename(folder.parent)
    return folder


def _apt(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["apt-get", "--quiet", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=APT_TIMEOUT_S,
        env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        check=False,
    )


def run(program: Path, *arguments: Any) -> str:
    """What a program prints; it must succeed."""
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout
