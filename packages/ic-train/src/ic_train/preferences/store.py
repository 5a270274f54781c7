"""Preference pairs on disk: contexts once in a memory-mapped file of token ids, pairs that point into it.

A folder holds

- `tokens.bin`: token ids, little-endian uint16 or uint32, without a header: contexts and short contexts;
- `pairs.jsonl`: a line per pair: its answers, and where its contexts start in `tokens.bin` and how long they are;
- `preferences.json`: what the pairs are and how they were made; written last: a folder without it is not whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ic_train.evaluation.records import Records, read_records

FORMAT = "ic-train preferences 1"
TOKENS_FILE, PAIRS_FILE, RECORD_FILE = "tokens.bin", "pairs.jsonl", "preferences.json"
_PART_TOKENS = 16_777_216


@dataclass(frozen=True, slots=True)
class Pair:
    """A question with a right and a wrong answer, as token ids.

    Args:
        id: of the pair in its folder.
        kind: one of `ic_train.evaluation.hard_sets.KINDS`.
        context_tokens: the length asked for; `prompt_ids` with either answer is at most that long.
        depth: of the fact in the context, from 0 (start) to 1 (end); None where it is absent.
        prompt_ids: `[tokens]` int64, context and question.
        short_prompt_ids: `[tokens]` int64, the same question after a short stretch of text with the same facts.
        chosen_ids: `[tokens]` int64, the right answer, up to the end of text where the tokenizer has one.
        rejected_ids: `[tokens]` int64, the wrong answer, likewise.
        rejected_source: who gave the wrong answer: "model" or "made".
    """

    id: str
    kind: str
    context_tokens: int
    depth: float | None
    prompt_ids: np.ndarray
    short_prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    rejected_source: str


class Preferences:
    """Pairs of a folder; contexts are read from disk when a pair is asked for.

    Args:
        folder: of the pairs.
        record: what `preferences.json` says.
        lines: what `pairs.jsonl` says, by pair.
    """

    def __init__(self, folder: Path, record: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        self.record = record
        self._lines = lines
        self._tokens = np.memmap(folder / TOKENS_FILE, dtype=record["dtype"], mode="r")

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[Pair]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Pair:
        """The pair at an index from 0; one at a time, for many would fill the memory."""
        line = self._lines[index]
        return Pair(
            id=line["id"],
            kind=line["kind"],
            context_tokens=line["context_tokens"],
            depth=line["depth"],
            prompt_ids=self._prompt(line["context"], line["question_ids"]),
            short_prompt_ids=self._prompt(line["short_context"], line["question_ids"]),
            chosen_ids=np.array(line["chosen_ids"], np.int64),
            rejected_ids=np.array(line["rejected_ids"], np.int64),
            rejected_source=line["rejected_source"],
        )

    @property
    def digest(self) -> str:
        """Tells these pairs from others: SHA-256 of their lines and their record."""
        content = json.dumps([self.record, self._lines], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def kinds(self) -> list[str]:
        """Kinds that occur, in alphabetical order."""
        return sorted(self.counts())

    def counts(self) -> dict[str, int]:
        """Pairs of each kind."""
        return dict(sorted(Counter(line["kind"] for line in self._lines).items()))

    @property
    def answer_tokens(self) -> np.ndarray:
        """`[pairs]` int64, lengths of the longer answers."""
        lengths = (max(len(line["chosen_ids"]), len(line["rejected_ids"])) for line in self._lines)
        return np.fromiter(lengths, np.int64, len(self))

    @property
    def prompt_tokens(self) -> np.ndarray:
        """`[pairs]` int64, lengths of the prompts, without reading them."""
        return np.array([line["context"][1] + len(line["question_ids"]) for line in self._lines], np.int64)

    def split(self, validation_pairs: int, seed: int) -> tuple[list[int], list[int]]:
        """Numbers of the pairs to train on and of those to measure, each in random order.

        Pairs of a context have its text, its facts and its distractors in common: they stay together, for what
        was learnt of them by heart would pass for what was understood.

        Args:
            validation_pairs: least to measure; contexts are taken whole until there are so many.
            seed: of the order.

        Raises:
            ValueError: no context would be left to train on.
        """
        order = np.random.default_rng(seed).permutation(len(self)).tolist()
        pairs_of = Counter(self._context(number) for number in order)
        measured: set[int] = set()
        count = 0
        # in the order of their first pairs
        for context, pairs in pairs_of.items():
            if count >= validation_pairs:
                break
            measured.add(context)
            count += pairs
        if len(measured) == len(pairs_of):
            raise ValueError(
                f"validation_pairs is {validation_pairs}; that leaves nothing to train on: there are {len(self)} "
                f"pairs in {len(pairs_of)} contexts, and those of a context stay together"
            )
        return (
            [number for number in order if self._context(number) not in measured],
            [number for number in order if self._context(number) in measured],
        )

    def contexts(self, numbers: Sequence[int]) -> int:
        """How many contexts these pairs have between them."""
        return len({self._context(number) for number in numbers})

    def _context(self, number: int) -> int:
        """Where a pair's context starts, which tells it from others."""
        return self._lines[number]["context"][0]

    def _prompt(self, extent: list[int], question_ids: list[int]) -> np.ndarray:
        start, length = extent
        return np.concatenate([self._tokens[start : start + length], question_ids]).astype(np.int64)


def load_preferences(path: str | Path, vocab_size: int) -> Preferences:
    """Map a folder of pairs into memory.

    Args:
        path: the folder that `ic-train data preferences` made.
        vocab_size: of the model that will read them.

    Raises:
        ValueError: the folder holds no pairs, is not whole, or has token ids that the model does not know.
    """
    folder = Path(path)
    if not (folder / RECORD_FILE).is_file():
        unfinished = (folder / PAIRS_FILE).is_file()
        reason = "is not whole: the command that began it goes on" if unfinished else "holds no preferences"
        raise ValueError(f"{folder} {reason}; it has no {RECORD_FILE}; `ic-train data preferences` makes it")
    record = json.loads((folder / RECORD_FILE).read_text())
    if record.get("format") != FORMAT:
        raise ValueError(
            f"format in {folder / RECORD_FILE} is {record.get('format')!r}; accepted: {FORMAT!r}"
        )
    if record["largest_token_id"] >= vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}; {folder} has token ids up to {record['largest_token_id']}: "
            "it was made with another tokenizer"
        )
    lines = list(read_records(folder / PAIRS_FILE).values())
    size = (folder / TOKENS_FILE).stat().st_size if (folder / TOKENS_FILE).is_file() else 0
    wanted = record["tokens"] * np.dtype(record["dtype"]).itemsize
    if len(lines) != record["pairs"] or size != wanted:
        raise ValueError(
            f"{folder} has {len(lines)} pairs and {size} bytes of tokens; its record says {record['pairs']} and "
            f"{wanted}: it is not whole"
        )
    return Preferences(folder, record, lines)


class Writer:
    """Writes pairs in order, held by one process at a time; goes on after the last one that is whole.

    Args:
        folder: must exist.
        vocab_size: of the tokenizer; decides the width of a token id.

    Raises:
        ValueError: another process writes the folder, or its pairs cannot be read.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._records = Records(folder / PAIRS_FILE)
        self._tokens = (folder / TOKENS_FILE).open("ab")
        lines = self._records.by_id.values()
        ends = (sum(line[name]) for line in lines for name in ("context", "short_context"))
        self._end = max(ends, default=0)
        stored_bytes, wanted_bytes = self._tokens.seek(0, os.SEEK_END), self._end * self.dtype.itemsize
        if stored_bytes < wanted_bytes:
            self.close()
            raise ValueError(f"{folder / TOKENS_FILE} is damaged: it is shorter than {PAIRS_FILE} says")
        if stored_bytes > wanted_bytes:
            # tokens whose pairs were not written any more
            self._tokens.truncate(wanted_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def lines(self) -> dict[str, dict[str, Any]]:
        """Lines of all written pairs, by id."""
        return self._records.by_id

    @property
    def tokens(self) -> int:
        """Token ids in `tokens.bin`."""
        return self._end

    @property
    def largest_token_id(self) -> int:
        """Of all prompts and answers; a model has to know it."""
        names = ("question_ids", "chosen_ids", "rejected_ids")
        largest = max(
            (token for line in self.lines.values() for name in names for token in line[name]), default=0
        )
        stored = np.memmap(self._tokens.name, dtype=self.dtype, mode="r") if self._end else np.zeros(1)
        # in parts: the file may be larger than memory
        return max(
            largest, *(int(part.max()) for part in np.array_split(stored, -(-len(stored) // _PART_TOKENS)))
        )

    def add_tokens(self, token_ids: Sequence[int] | np.ndarray) -> list[int]:
        """Store a context; its start and length, for the lines of its pairs."""
        extent = [self._end, len(token_ids)]
        self._tokens.write(np.asarray(token_ids, self.dtype).tobytes())
        self._end += len(token_ids)
        return extent

    def add_pair(self, line: dict[str, Any]) -> None:
        """Write a pair's line; its contexts are on the disk before it."""
        self._tokens.flush()
        self._records.append(line)

    def close(self) -> None:
        """Give the folder free."""
        self._records.__exit__(None, None, None)
        self._tokens.close()


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write `preferences.json`, which says that a folder is whole: whole, or not at all."""
    part = folder / f"{RECORD_FILE}.partial"
    part.write_text(json.dumps({"format": FORMAT, **record}, indent=1) + "\n")
    part.rename(folder / RECORD_FILE)
