"""Token windows for measuring, choosing and judging, from texts that do not overlap.

Letters: B windows, T tokens of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ic_train.data.text import read_documents, text_files
from ic_train.evaluation.haystack import load_haystack

# of every calibration text: measured on, chosen on, judged on (where no held-out text is given)
PARTS = (0.9, 0.05, 0.05)
# texts longer than this are cut: tokenising takes a minute for 40 million characters
MAX_CHARACTERS = 8_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """Token ids `[B, T]` of each part, and where they came from.

    Args:
        calibration: moments are taken on it.
        search: plans are compared on it.
        evaluation: perplexities are reported on it.
        record: names, sizes and hashes.
    """

    calibration: torch.Tensor
    search: torch.Tensor
    evaluation: torch.Tensor
    record: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowSizes:
    """How much text is used.

    Args:
        calibration_samples: windows for moments.
        calibration_tokens: tokens of each.
        evaluation_samples: windows for perplexities; half as many for the search.
        evaluation_tokens: tokens of each.
        seed: of their places.
    """

    calibration_samples: int = 128
    calibration_tokens: int = 256
    evaluation_samples: int = 8
    evaluation_tokens: int = 1024
    seed: int = 42

    def __post_init__(self) -> None:
        """Validate."""
        for name in ("calibration_samples", "calibration_tokens", "evaluation_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.evaluation_tokens < 2:
            raise ValueError(f"evaluation_tokens is {self.evaluation_tokens}; it must be at least 2")


def choose_windows(
    tokenizer: PreTrainedTokenizerBase,
    calibration: Sequence[str],
    held_out: Sequence[str],
    sizes: WindowSizes,
) -> Windows:
    """Tokenise texts and draw windows from them, the same ones for the same texts and seed.

    Args:
        tokenizer: the source's.
        calibration: files or folders; without any, the embedded Jargon File.
        held_out: files or folders to judge on; without any, the end of every calibration text.
        sizes: how many windows of what length.

    Raises:
        ValueError: a text cannot be read, or is too short.
    """
    texts, record = _read(calibration)
    own_end = not held_out
    share = PARTS[0], PARTS[0] + PARTS[1] + (0.0 if own_end else PARTS[2])
    ids = [_encode(tokenizer, text) for text in texts]
    measured = [one[: int(len(one) * share[0])] for one in ids]
    searched = [one[int(len(one) * share[0]) : int(len(one) * share[1])] for one in ids]
    judged = [one[int(len(one) * share[1]) :] for one in ids]
    record = {"calibration": record, "seed": sizes.seed}
    if held_out:
        texts, record["held_out"] = _read(held_out)
        judged = [_encode(tokenizer, text) for text in texts]
    search_samples = max(1, sizes.evaluation_samples // 2)
    length = sizes.evaluation_tokens
    return Windows(
        calibration=_draw(
            measured, sizes.calibration_samples, sizes.calibration_tokens, sizes.seed, "calibration"
        ),
        search=_draw(searched, search_samples, length, sizes.seed + 1, "calibration (the part to choose on)"),
        evaluation=_draw(judged, sizes.evaluation_samples, length, sizes.seed + 2, "held-out"),
        record=record,
    )


def _read(paths: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
    texts, record = [], []
    for path in paths or ["jargon"]:
        text = _joined(path) if paths else load_haystack("jargon")
        texts.append(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        record.append({"name": path.rstrip("/").split("/")[-1], "characters": len(text), "sha256": digest})
    return texts, record


def _joined(path: str) -> str:
    """All documents below a path in order, as far as MAX_CHARACTERS."""
    parts, size = [], 0
    for file in text_files(path):
        for document in read_documents(file):
            parts.append(document)
            size += len(document)
            if size >= MAX_CHARACTERS:
                return "\n\n".join(parts)[:MAX_CHARACTERS]
    return "\n\n".join(parts)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _draw(texts: list[torch.Tensor], samples: int, tokens: int, seed: int, what: str) -> torch.Tensor:
    """`[samples, tokens]` from random places, every text in turn; texts shorter than a window are left out."""
    generator = torch.Generator().manual_seed(seed)
    usable = [text for text in texts if len(text) >= tokens]
    found = sum(len(text) for text in usable)
    if found < samples * tokens:
        raise ValueError(
            f"the {what} text is too short: it has {found} tokens in texts of at least {tokens}, and {samples} "
            f"samples of {tokens} need {samples * tokens}; give more text, or ask for fewer samples"
        )
    rows = []
    for number in range(samples):
        text = usable[number % len(usable)]
        start = int(torch.randint(len(text) - tokens + 1, (1,), generator=generator))
        rows.append(text[start : start + tokens])
    return torch.stack(rows)
