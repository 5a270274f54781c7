"""Sequences of equal length cut from packed corpora, each a pure function of its number.

Letters: T tokens per sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch.utils.data import Dataset

from ic_train.data.text import TokenCorpus

# sequences take their corpora by these places in [0, 1), over and over: multiples of the golden ratio
PLACES = (np.arange(4096) * ((5**0.5 - 1) / 2)) % 1.0


def refuse_share(name: str, share: float) -> NoReturn:
    """Say that a stream of sequences has none of the places.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"{name} has a share of {share:.2g} of the sequences, of which none would come: shares from 0.0005 on do; "
        "give it a larger weight, or leave it out"
    )


class PackedText(Dataset[dict[str, torch.Tensor]]):
    """Sequences `[T]` of corpora in a random order that depends on the seed only.

    Every corpus is cut into consecutive sequences, from a place that changes with every pass over it, and all
    of them come once before any comes again. A sequence holds parts of several documents, with end tokens between
    them, and attention reaches across: nothing is padded and nothing is left out.

    Args:
        corpora: packed tokens.
        tokens_per_sequence: T.
        seed: of the order.
        num_sequences: length; default: one pass over the corpora.
        weights: share of each corpus in the sequences; default: by its tokens.
        name: of the recipe's key for T, for messages.

    Raises:
        ValueError: a corpus has fewer than 2 T tokens, the weights do not fit, or a share is so small that it
            would never come.
    """

    def __init__(
        self,
        corpora: Sequence[TokenCorpus],
        *,
        tokens_per_sequence: int,
        seed: int,
        num_sequences: int | None = None,
        weights: Sequence[float] = (),
        name: str = "tokens_per_sequence",
    ) -> None:
        self.corpora = corpora
        self.tokens_per_sequence = tokens_per_sequence
        self.seed = seed
        self._counts = [len(corpus.tokens) // tokens_per_sequence - 1 for corpus in corpora]
        for corpus, count in zip(corpora, self._counts, strict=True):
            if count < 1:
                raise ValueError(
                    f"{name} is {tokens_per_sequence}; a corpus of {len(corpus.tokens)} tokens is too short: it "
                    f"needs at least {2 * tokens_per_sequence}"
                )
        if weights and (len(weights) != len(corpora) or min(weights) <= 0):
            raise ValueError(
                f"corpus_weights is {list(weights)}; it must have a number above 0 for each of "
                f"{len(corpora)} corpora"
            )
        shares = np.asarray(weights or self._counts, dtype=np.float64)
        # ends of the corpora's shares of [0, 1)
        self._shares = (shares / shares.sum()).cumsum()
        for number, count in enumerate(self._block_counts()):
            if not count:
                refuse_share(f"corpus {number} ({corpora[number].folder})", shares[number] / shares.sum())
        self._length = num_sequences or sum(self._counts)
        self._orders: dict[tuple[int, int], tuple[np.ndarray, int]] = {}

    @property
    def records(self) -> list[dict[str, Any]]:
        """What the corpora are, without the checksums."""
        return [
            {name: value for name, value in corpus.record.items() if name != "block_crc32"}
            for corpus in self.corpora
        ]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """`input_ids [T]`; they are the labels, too.

        Raises:
            ValueError: the corpus's file is damaged.
        """
        chosen, turn = self._choose(number)
        epoch, place = divmod(turn, self._counts[chosen])
        order, offset = self._order(chosen, epoch)
        start = offset + int(order[place]) * self.tokens_per_sequence
        tokens = self.corpora[chosen].read(start, start + self.tokens_per_sequence)
        return {"input_ids": torch.from_numpy(tokens.astype(np.int64))}

    def _choose(self, number: int) -> tuple[int, int]:
        """The corpus of a sequence, and how many of that corpus come before it.

        The golden ratio's multiples fill [0, 1) evenly, so that after any number of sequences every corpus has
        had its share; the count before is that number times the share, found exactly by counting in blocks.
        """
        block, within = divmod(number, len(PLACES))
        counts = self._block_counts()
        corpora = self._block()
        chosen = int(corpora[within])
        before = int((corpora[:within] == chosen).sum())
        return chosen, block * int(counts[chosen]) + before

    def _block(self) -> np.ndarray:
        if not hasattr(self, "_block_cache"):
            self._block_cache = np.searchsorted(self._shares[:-1], PLACES, side="right")
        return self._block_cache

    def _block_counts(self) -> np.ndarray:
        return np.bincount(self._block(), minlength=len(self.corpora))

    def _order(self, chosen: int, epoch: int) -> tuple[np.ndarray, int]:
        key = (chosen, epoch)
        if key not in self._orders:
            # the workers of a loader go through epochs in step: old ones are not asked for again
            self._orders = {old: value for old, value in self._orders.items() if old[1] >= epoch - 1}
            rng = np.random.default_rng([self.seed, chosen, epoch])
            offset = int(rng.integers(self.tokens_per_sequence))
            self._orders[key] = rng.permutation(self._counts[chosen]), offset
        return self._orders[key]
