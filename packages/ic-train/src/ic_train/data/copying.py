"""Periodic strings: the densest way to learn to look back for what followed the same words before.

Almost every byte of a periodic string can be told by finding the bytes before it one period earlier, which is
what answering a pass key takes, and what text alone teaches slowly (induction heads, arXiv 2209.11895). Few
different letters make short matches ambiguous, so that long ones are learned, too.

Letters: B sequences, T tokens per sequence.
"""

from __future__ import annotations

import string

import numpy as np

_ALPHABET = np.frombuffer((string.ascii_letters + string.digits).encode(), np.uint8)
_FEWEST_LETTERS = 3
_SHORTEST_PERIOD = 16


def periodic_batch(rng: np.random.Generator, *, num_sequences: int, tokens_per_sequence: int) -> np.ndarray:
    """Write sequences that repeat a random string of random length over a random choice of letters.

    Args:
        rng: source of all randomness.
        num_sequences: B.
        tokens_per_sequence: T, at least 64.

    Returns:
        `[B, T + 1]` uint8. The period is between 16 and T / 2, so that at least the last half can be told.

    Raises:
        ValueError: T is below 64.
    """
    if tokens_per_sequence < 64:
        raise ValueError(f"tokens_per_sequence is {tokens_per_sequence}; a copying stage needs at least 64")
    longest = tokens_per_sequence // 2
    # log-uniform: as many small alphabets as large ones
    low, high = np.log(_FEWEST_LETTERS), np.log(len(_ALPHABET) + 1)
    letters = np.exp(rng.uniform(low, high, (num_sequences, 1))).astype(np.int64)
    chosen = rng.permuted(np.tile(_ALPHABET, (num_sequences, 1)), axis=1)
    drawn = (rng.random((num_sequences, longest)) * letters).astype(np.int64)
    text = np.take_along_axis(chosen, drawn, axis=1)
    periods = rng.integers(_SHORTEST_PERIOD, longest + 1, (num_sequences, 1))
    return np.take_along_axis(text, np.arange(tokens_per_sequence + 1) % periods, axis=1)
