"""Training text that every environment of this project already has: the sources of its own packages."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

# what a training environment has to have anyway; the versions are recorded with every run
PACKAGES = ("torch", "transformers", "accelerate", "numpy", "safetensors", "tokenizers", "huggingface_hub")
SUFFIXES = frozenset({".py", ".pyi", ".md", ".rst", ".txt", ".h"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Text as bytes, and where it came from.

    Args:
        text: `[bytes]` uint8.
        sources: package names and versions.
        sha256: of the text.
    """

    text: np.ndarray
    sources: dict[str, str]
    sha256: str


def load_corpus(paths: list[str] | None = None, *, max_mb: int = 64) -> Corpus:
    """Read text files into one array of bytes, in an order that file names alone decide.

    Args:
        paths: files or folders to read; by default the standard library and the PACKAGES above.
        max_mb: stop after this many million bytes.

    Raises:
        ValueError: a path does not exist, or no text was found.
    """
    if paths:
        missing = [path for path in paths if not Path(path).exists()]
        if missing:
            raise ValueError(f"corpus paths {missing} do not exist; give files or folders with text")
        roots, sources = [Path(path) for path in paths], dict.fromkeys(paths, "")
    else:
        roots, sources = _installed_sources()
    chunks: list[bytes] = []
    size = 0
    for file in _text_files(roots):
        if size >= max_mb * 1_000_000:
            break
        chunks.append(file.read_bytes())
        size += len(chunks[-1])
    if not size:
        raise ValueError(f"no text found in {[str(root) for root in roots]}; looked for {sorted(SUFFIXES)}")
    text = b"\n".join(chunks)[: max_mb * 1_000_000]
    return Corpus(
        text=np.frombuffer(text, np.uint8), sources=sources, sha256=hashlib.sha256(text).hexdigest()
    )


def _installed_sources() -> tuple[list[Path], dict[str, str]]:
    roots = [Path(sysconfig.get_path("stdlib"))]
    sources = {"python": sysconfig.get_python_version()}
    for package in PACKAGES:
        distribution = metadata.distribution(package.replace("_", "-"))
        roots.append(Path(str(distribution.locate_file(package))))
        sources[package] = distribution.version
    return roots, sources


def _text_files(roots: list[Path]) -> list[Path]:
    """Text files in an order that depends on their names only and mixes the roots, so that a cap samples all."""
    named: list[tuple[str, Path]] = []
    for root in roots:
        if root.is_file():
            named.append((root.name, root))
            continue
        for folder, folders, files in os.walk(root):
            # it lies inside the standard library's folder and would bring everything along
            folders[:] = [name for name in folders if name != "site-packages"]
            for path in (Path(folder, name) for name in files):
                if path.suffix in SUFFIXES and path.is_file():
                    named.append((f"{root.name}/{path.relative_to(root).as_posix()}", path))
    return [path for _, path in sorted(named, key=lambda item: hashlib.sha256(item[0].encode()).digest())]
