"""Long texts in the public domain to hide pass keys in; none of them is training text."""

from __future__ import annotations

import gzip
from importlib import resources
from pathlib import Path

# name -> file beside this module; haystacks/README.md says where each comes from
HAYSTACKS = {"jargon": "jargon-4.4.7.txt.gz"}


def load_haystack(name: str) -> str:
    """A haystack's whole text.

    Args:
        name: one of HAYSTACKS, or the path of a UTF-8 text file, plain or gzipped.

    Raises:
        ValueError: there is no such haystack or file, or it is not UTF-8 text.
    """
    if name in HAYSTACKS:
        data = resources.files("ic_train.evaluation").joinpath("haystacks", HAYSTACKS[name]).read_bytes()
    elif Path(name).is_file():
        data = Path(name).read_bytes()
    else:
        raise ValueError(f"haystack {name!r} is neither a file nor one of {sorted(HAYSTACKS)}")
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"haystack {name!r} is not UTF-8 text: {error}") from None
