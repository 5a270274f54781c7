"""Fetch a checkpoint's files and hold each to its SHA-256; what is there and right is not fetched again.

A file is written beside its final name and renamed when its sum is right, so that a killed download leaves
nothing that looks finished; the next try goes on where it stopped, where the server allows that.
Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

BLOCK_BYTES = 1 << 20
TIMEOUT_S = 60


class DownloadError(Exception):
    """A file could not be fetched, or is not what was announced."""


def sha256(path: Path) -> str:
    """Sum of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(url: str, wanted: str, target: Path, *, token: str | None = None) -> bool:
    """Fetch one file; False when it was there already.

    Raises:
        DownloadError: the server refuses, or the sum is another one. The message names both sums.
    """
    if target.is_file() and sha256(target) == wanted:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    _receive(url, part, token)
    got = sha256(part)
    if got != wanted:
        part.unlink()
        raise DownloadError(f"{url} has the sha256 {got}, but {wanted} was announced; nothing was kept")
    part.replace(target)
    return True


def _receive(url: str, part: Path, token: str | None) -> None:
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    if token:
        # not sent on to where a redirect leads: stores of large files want none, and must not learn it
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            announced = answer.headers.get("Content-Length")
            # 200 to a Range means that the server starts from the beginning
            got = _copy(answer, part, "ab" if answer.status == 206 else "wb")
    except urllib.error.HTTPError as error:
        # 416: nothing is left to send; the sum decides whether that is the whole file
        if not (error.code == 416 and have):
            raise DownloadError(f"{url} answered {error.code} {error.reason}") from None
    except OSError as error:
        raise DownloadError(f"{url}: {error}") from None
    else:
        # a connection that breaks looks like an end; what came stays, for the next try
        if announced is not None and got < int(announced):
            raise DownloadError(f"{url} broke off after {got} of {announced} bytes")


def _copy(answer: IO[bytes], part: Path, mode: str) -> int:
    got = 0
    with part.open(mode) as file:
        while block := answer.read(BLOCK_BYTES):
            file.write(block)
            got += len(block)
    return got


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 when all files are there."""
    parser = argparse.ArgumentParser(description="Fetch files and check their sums.")
    parser.add_argument("--files", type=Path, required=True, help="JSON: a list of {url, sha256, name}")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tries", type=int, default=5)
    options = parser.parse_args(arguments)
    for entry in json.loads(options.files.read_text(encoding="utf-8")):
        for attempt in range(1, options.tries + 1):
            try:
                new = fetch(
                    entry["url"],
                    entry["sha256"],
                    options.folder / entry["name"],
                    token=os.environ.get("DOWNLOAD_TOKEN"),
                )
            except DownloadError as error:
                sys.stderr.write(f"try {attempt} of {options.tries}: {error}\n")
                if attempt == options.tries:
                    return 1
                time.sleep(min(2**attempt, 30))
            else:
                sys.stdout.write(f"{entry['name']}: {'fetched' if new else 'there already'}\n")
                break
    return 0


if __name__ == "__main__":
    sys.exit(main())
