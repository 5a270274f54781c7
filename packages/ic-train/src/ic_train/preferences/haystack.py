"""Text that training hides facts in: never the one that evaluation uses."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ic_train.data.corpus import load_corpus
from ic_train.evaluation.haystack import HAYSTACKS, load_haystack

SOURCES = "sources"
_SOURCES_MB = 32
# stretches of evaluation's text that are looked for in training's
_PROBES, _PROBE_CHARACTERS = 64, 200


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingText:
    """Text for training, and what a record says of it.

    Args:
        text: the whole.
        name: of the file, or "sources".
        licence: of each part.
    """

    text: str
    name: str
    licence: dict[str, str]


def load_training_text(
    name: str, licence: str | None, *, allow_evaluation_text: bool = False
) -> TrainingText:
    """The text that hides facts in training.

    Args:
        name: "sources" for the sources of installed packages, which ic-nano was trained on, too; or the path of
            a UTF-8 text file, plain or gzipped.
        licence: of the file; must be None for "sources", whose packages say theirs.
        allow_evaluation_text: take text that evaluation hides its facts in.

    Raises:
        ValueError: there is no such text, its licence is missing, or evaluation uses it.
    """
    if name == SOURCES:
        if licence:
            raise ValueError(f"--licence is {licence!r}; it has no effect with --haystack {SOURCES}")
        corpus = load_corpus(max_mb=_SOURCES_MB)
        # the last file is cut at that size, and a few files are in other encodings
        text = corpus.text.tobytes().decode(errors="ignore")
        licences = {f"{package} {version}": _licence(package) for package, version in corpus.sources.items()}
        return TrainingText(text=text, name=name, licence=licences)
    if not Path(name).is_file() and name not in HAYSTACKS:
        raise ValueError(f"--haystack is {name!r}; give a UTF-8 text file, or {SOURCES!r}")
    text = load_haystack(name)
    if not text.strip():
        raise ValueError(f"--haystack is {name!r}; it holds no text")
    if not licence:
        raise ValueError(
            f"--licence is missing; give that of --haystack {name}, as 'public-domain' or an SPDX name"
        )
    if not allow_evaluation_text and (used := _shared(text)):
        raise ValueError(
            f"--haystack is {name!r}; it holds text of {used!r}, which evaluation uses: a model trained on it has "
            "seen the test. Give another text, or --allow-evaluation-haystack"
        )
    file = Path(name).name
    return TrainingText(text=text, name=file, licence={file: licence})


def _shared(text: str) -> str | None:
    """The haystack of evaluation that a text holds parts of."""
    for name in HAYSTACKS:
        used = load_haystack(name)
        step = len(used) // _PROBES
        if any(used[start : start + _PROBE_CHARACTERS] in text for start in range(0, len(used), step)):
            return name
    return None


def _licence(package: str) -> str:
    if package == "python":
        return "PSF-2.0"
    about = metadata.metadata(package.replace("_", "-"))
    classified = [
        line.split(" :: ")[-1] for line in about.get_all("Classifier") or [] if "License ::" in line
    ]
    # not by index: the backport of importlib.metadata, once imported, raises for what is not there
    expression, free = (" ".join(about.get_all(name) or []) for name in ("License-Expression", "License"))
    stated = expression or " AND ".join(classified) or free or "unstated"
    # some packages put the whole text there
    return stated.splitlines()[0]
