"""Sequences packed from whole documents, with longer documents more often, each a pure function of its number.

Letters: T tokens per sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ic_train.context_parallel import local_tokens
from ic_train.data.packing import PLACES, refuse_share
from ic_train.data.positions import skipped_positions
from ic_train.data.text import TOKENS_FILE, TokenCorpus, load_token_corpus
from ic_train.trainers.linear_loss import IGNORED

_SCANNED_TOKENS = 2**24


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """How sequences are made.

    Args:
        tokens_per_sequence: T.
        cross_document_attention: whether tokens see the documents packed before their own (UltraLong, arXiv
            2504.06214, has it so; ProLong, arXiv 2410.02660, has not).
        long_document_tokens: documents of at least so many tokens count as long; 0: T / 2.
        long_document_share: share of the sequences that are made of long documents alone, the others being made
            of short ones (length upsampling, arXiv 2402.10171, section 3); negative: documents as they come.
        skipped_window_tokens: positions jump ahead up to this length (PoSE, arXiv 2309.10400); 0: they do not.
        seed: of the order and of the jumps.
    """

    tokens_per_sequence: int
    cross_document_attention: bool = True
    long_document_tokens: int = 0
    long_document_share: float = -1.0
    skipped_window_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate."""
        if self.tokens_per_sequence < 2:
            raise ValueError(f"tokens_per_sequence is {self.tokens_per_sequence}; it must be at least 2")
        if self.long_document_share > 1:
            raise ValueError(
                f"long_document_share is {self.long_document_share}; it must be from 0 to 1, or negative for "
                "documents as they come"
            )
        window = self.skipped_window_tokens
        if window and window <= self.tokens_per_sequence:
            raise ValueError(
                f"pose_window_tokens is {window}; it must be more than tokens_per_sequence "
                f"({self.tokens_per_sequence}), or 0"
            )


@dataclass(frozen=True, slots=True)
class _Stream:
    """Documents of one corpus that are packed together."""

    corpus: TokenCorpus
    starts: np.ndarray
    lengths: np.ndarray
    share: float
    name: str


class PackedDocuments(Dataset[dict[str, Any]]):
    """Sequences of T tokens, or one process's tokens of them.

    In every pass the documents of a stream are shuffled, joined and cut every T tokens from a random place on, so
    that nothing is padded and a document that is cut is cut elsewhere in the next pass. Of each pass the
    last tokens, fewer than T, are left out; another order leaves out others.

    Args:
        corpora: packed tokens.
        packing: how.
        num_sequences: how many there are.
        weights: share of each corpus; default: by its tokens.
        parts: processes that share a sequence.
        batch_sequences: sequences that a process takes at once, which the numbers of items are counted in.

    Raises:
        ValueError: there are too few tokens, the weights do not fit, a share is so small that it would never come,
            or a corpus's file is damaged.
    """

    def __init__(
        self,
        corpora: Sequence[TokenCorpus],
        packing: Packing,
        *,
        num_sequences: int,
        weights: Sequence[float] = (),
        parts: int = 1,
        batch_sequences: int = 1,
    ) -> None:
        if weights and (len(weights) != len(corpora) or min(weights) <= 0):
            raise ValueError(
                f"corpus_weights is {list(weights)}; it must have a number above 0 for each of "
                f"{len(corpora)} corpora"
            )
        self.packing = packing
        self.parts = parts
        self.batch_sequences = batch_sequences
        self._num_sequences = num_sequences
        total = sum(len(corpus.tokens) for corpus in corpora)
        shares = [len(corpus.tokens) / total for corpus in corpora]
        if weights:
            shares = [weight / sum(weights) for weight in weights]
        self._streams = [
            stream
            for number, (corpus, share) in enumerate(zip(corpora, shares, strict=True))
            for stream in _streams(corpus, share, packing, f"corpus {number}")
        ]
        self._ends = np.cumsum([stream.share for stream in self._streams])
        self._ends /= self._ends[-1]
        counts = np.bincount(self._block(), minlength=len(self._streams))
        for stream, count in zip(self._streams, counts, strict=True):
            if not count:
                refuse_share(f"{stream.name} ({stream.corpus.folder})", stream.share)

    def __len__(self) -> int:
        """Number of items: sequences times the processes that share each."""
        return self._num_sequences * self.parts

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One process's part of a sequence; the parts of one follow each other, a batch at a time."""
        batch, row = divmod(number, self.batch_sequences)
        sequence, part = divmod(batch, self.parts)
        item = self.sequence(sequence * self.batch_sequences + row)
        if self.parts == 1:
            return item
        chosen = local_tokens(self.packing.tokens_per_sequence, self.parts, part)
        return {
            name: value[chosen] if isinstance(value, torch.Tensor) else value for name, value in item.items()
        }

    def sequence(self, number: int) -> dict[str, Any]:
        """A whole sequence.

        Returns:
            `input_ids`, `labels` and `position_ids`, each `[T]` int64, and `document_starts`, a list of places, or
            None where documents see each other. Labels are shifted: `labels[t]` follows `input_ids[t]`.

        Raises:
            ValueError: a token is not in the vocabulary that the corpus was made with.
        """
        rng = np.random.default_rng([self.packing.seed, 1, number])
        length = self.packing.tokens_per_sequence
        chosen, turn = self._choose(number)
        tokens, edges = self._read(chosen, turn)
        positions = np.arange(length)
        if self.packing.skipped_window_tokens:
            positions = skipped_positions(
                rng,
                np.arange(length)[None],
                tokens_per_sequence=length,
                window_tokens=self.packing.skipped_window_tokens,
            )[0]
        labels = tokens[1:].copy()
        starts: list[int] | None = None
        if not self.packing.cross_document_attention:
            starts = [0, *(int(edge) for edge in edges if 0 < edge < length)]
            # what begins the next document cannot be known from this one
            labels[[edge - 1 for edge in edges if 0 < edge <= length]] = IGNORED
            ends = np.diff([*starts, length])
            positions = positions - np.repeat(positions[starts], ends)
        return {
            "input_ids": torch.from_numpy(tokens[:-1]),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions.astype(np.int64)),
            "document_starts": starts,
        }

    @property
    def streams(self) -> list[dict[str, Any]]:
        """What sequences are made of, for the record."""
        return [
            {
                "stream": stream.name,
                "documents": len(stream.lengths),
                "tokens": int(stream.lengths.sum()),
                "share": round(float(stream.share), 6),
            }
            for stream in self._streams
        ]

    def _choose(self, number: int) -> tuple[int, int]:
        """The stream of a sequence, and how many of that stream's come before it.

        The golden ratio's multiples fill [0, 1) evenly: after any number of sequences every stream has had its
        share. Blocks of them are alike, so that counting is cheap.
        """
        block, within = divmod(number, len(PLACES))
        chosen = self._block()
        stream = int(chosen[within])
        per_block = int((chosen == stream).sum())
        return stream, block * per_block + int((chosen[:within] == stream).sum())

    def _block(self) -> np.ndarray:
        """The streams of a block of sequences, `[4096]`."""
        return np.searchsorted(self._ends[:-1], PLACES, side="right")

    def _read(self, chosen: int, turn: int) -> tuple[np.ndarray, np.ndarray]:
        """T + 1 tokens of a stream, and where documents begin among them."""
        stream, length = self._streams[chosen], self.packing.tokens_per_sequence
        # one token of the next sequence is the last label, and the random start takes up to T
        per_pass = (int(stream.lengths.sum()) - 1) // length - 1
        epoch, place = divmod(turn, per_pass)
        order, ends, offset = self._order(chosen, epoch)
        first = offset + place * length
        document = int(np.searchsorted(ends, first, side="right"))
        pieces: list[np.ndarray] = []
        edges: list[int] = []
        position, wanted = first, first + length + 1
        while position < wanted:
            begin = int(ends[document - 1]) if document else 0
            if position == begin:
                edges.append(position - first)
            start = int(stream.starts[order[document]]) + position - begin
            count = min(int(ends[document]), wanted) - position
            pieces.append(stream.corpus.read(start, start + count))
            position += count
            document += 1
        tokens = np.concatenate(pieces).astype(np.int64)
        vocabulary = stream.corpus.record["vocab_size"]
        if int(tokens.max()) >= vocabulary:
            raise ValueError(
                f"{stream.name} has token {int(tokens.max())}; its record says {vocabulary} tokens: "
                f"{stream.corpus.folder / TOKENS_FILE} is damaged, make the corpus again"
            )
        return tokens, np.array(edges, dtype=np.int64)

    def _order(self, chosen: int, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        return _shuffled(self, chosen, epoch)

    def order_of(self, chosen: int, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The documents of a stream in a pass, where each ends in it, and from which token on it is cut."""
        stream = self._streams[chosen]
        rng = np.random.default_rng([self.packing.seed, 0, chosen, epoch])
        offset = int(rng.integers(self.packing.tokens_per_sequence))
        order = rng.permutation(len(stream.lengths))
        return order, stream.lengths[order].cumsum(), offset


@lru_cache(maxsize=16)
def _shuffled(data: PackedDocuments, chosen: int, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
    return data.order_of(chosen, epoch)


def open_corpora(paths: Sequence[str], vocabulary: int, *, name: str = "corpora") -> list[TokenCorpus]:
    """Corpora that a model of this vocabulary can be trained on.

    Args:
        paths: their folders.
        vocabulary: number of the model's tokens.
        name: of the recipe's key, for messages.

    Raises:
        ValueError: there are none, one is no corpus or damaged, or has tokens that the model does not know.
    """
    if not paths:
        raise ValueError(f"{name} is empty; give folders that `ic-train data text` made")
    corpora = [load_token_corpus(path) for path in paths]
    for path, corpus in zip(paths, corpora, strict=True):
        if corpus.record["vocab_size"] > vocabulary:
            raise ValueError(
                f"{name} has {path}, made with a tokenizer of {corpus.record['vocab_size']} tokens; the model "
                f"has {vocabulary}"
            )
    return corpora


def _streams(corpus: TokenCorpus, share: float, packing: Packing, name: str) -> list[_Stream]:
    starts, lengths = _documents(corpus)
    needed = 3 * packing.tokens_per_sequence
    if packing.long_document_share < 0:
        kinds = [(np.ones(len(lengths), bool), share, name)]
    else:
        limit = packing.long_document_tokens or packing.tokens_per_sequence // 2
        long = lengths >= limit
        kinds = [
            (long, share * packing.long_document_share, f"{name}, documents of at least {limit} tokens"),
            (~long, share * (1 - packing.long_document_share), f"{name}, documents under {limit} tokens"),
        ]
    found = []
    for chosen, part, kind in kinds:
        if part == 0:
            continue
        if int(lengths[chosen].sum()) < needed:
            raise ValueError(
                f"{kind}: {int(lengths[chosen].sum())} tokens; tokens_per_sequence "
                f"{packing.tokens_per_sequence} needs at least {needed}"
            )
        found.append(_Stream(corpus, starts[chosen], lengths[chosen], part, kind))
    return found


def _documents(corpus: TokenCorpus) -> tuple[np.ndarray, np.ndarray]:
    """Where documents begin and how long they are, end token included."""
    end, total = corpus.record["eos_token_id"], len(corpus.tokens)
    found = [
        np.flatnonzero(corpus.read(first, min(first + _SCANNED_TOKENS, total)) == end) + first
        for first in range(0, total, _SCANNED_TOKENS)
    ]
    edges = np.concatenate(found) + 1
    if not len(edges) or edges[-1] != total:
        edges = np.append(edges, total)
    starts = np.concatenate(([0], edges[:-1]))
    return starts, edges - starts
