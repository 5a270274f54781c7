"""Position-skipping: short sequences that see the positions of long ones (PoSE, arXiv 2309.10400)."""

from __future__ import annotations

import numpy as np

MAX_JUMPS = 3


def skipped_positions(
    rng: np.random.Generator, boundaries: np.ndarray, *, tokens_per_sequence: int, window_tokens: int
) -> np.ndarray:
    """Positions that jump ahead up to three times, for training on distances longer than the sequence.

    The total of a sequence's jumps is uniform half of the time, so that every distance of the window is
    met, and log-uniform the other half, so that short distances stay frequent. It is split among one to
    three jumps.

    Args:
        rng: source of all randomness.
        boundaries: `[B, K]` int64, places in `[0, T)` where a jump may happen: a jump inside a needle or a
            question would tear apart what no real context tears apart.
        tokens_per_sequence: T.
        window_tokens: largest position + 1 that may occur; at T or below, nothing is skipped.

    Returns:
        `[B, T]` int64 positions, increasing.
    """
    num_sequences = len(boundaries)
    positions = np.broadcast_to(np.arange(tokens_per_sequence), (num_sequences, tokens_per_sequence))
    largest = window_tokens - tokens_per_sequence
    if largest < 1:
        return positions.copy()
    uniform = rng.random(num_sequences)
    total = np.where(
        rng.random(num_sequences) < 0.5, uniform * largest, np.expm1(uniform * np.log1p(largest))
    )
    used = np.arange(MAX_JUMPS) < rng.integers(1, MAX_JUMPS + 1, (num_sequences, 1))
    shares = rng.random((num_sequences, MAX_JUMPS)) * used
    jumps = (total[:, None] * shares / shares.sum(1, keepdims=True)).astype(np.int64)
    chosen = rng.integers(0, boundaries.shape[1], (num_sequences, MAX_JUMPS))
    places = np.take_along_axis(boundaries, chosen, axis=1)
    skipped = np.zeros((num_sequences, tokens_per_sequence), np.int64)
    # two jumps may fall on one place, so they are added one column at a time
    for jump in range(MAX_JUMPS):
        skipped[np.arange(num_sequences), places[:, jump]] += jumps[:, jump]
    return positions + skipped.cumsum(1)
