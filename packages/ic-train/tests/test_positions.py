"""Positions jump where they may, as far as they should."""

import numpy as np

from ic_train.data.positions import MAX_JUMPS, skipped_positions

WINDOW = 100_000


def positions(
    sequences: int = 2000, tokens: int = 300, window: int = WINDOW
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    boundaries = np.sort(rng.integers(1, tokens, (sequences, 6)), axis=1)
    made = skipped_positions(rng, boundaries, tokens_per_sequence=tokens, window_tokens=window)
    return made, boundaries


def test_positions_increase_and_stay_in_the_window() -> None:
    made, _ = positions()
    assert made.shape == (2000, 300)
    assert (np.diff(made, axis=1) >= 1).all()
    assert made.max() < WINDOW


def test_jumps_happen_at_boundaries_only() -> None:
    made, boundaries = positions()
    jumped = np.diff(made, axis=1, prepend=0) > 1
    for row, allowed in zip(jumped, boundaries, strict=True):
        assert set(np.flatnonzero(row)) <= set(allowed.tolist())
    assert 1 <= jumped.sum(1).max() <= MAX_JUMPS


def test_every_distance_of_the_window_is_met_and_short_ones_stay_frequent() -> None:
    made, _ = positions()
    total = made[:, -1] - 299
    largest = WINDOW - 300
    # half of the totals are uniform: each tenth of the window gets at least a twentieth of all
    assert (np.histogram(total, bins=10, range=(0, largest))[0] >= 0.035 * len(total)).all()
    # half are log-uniform: below a hundredth of the window lie about two fifths of those
    assert 0.15 < (total < largest / 100).mean() < 0.5


def test_a_window_no_longer_than_the_sequence_skips_nothing() -> None:
    for window in (0, 300):
        made, _ = positions(sequences=3, window=window)
        assert np.array_equal(made, np.tile(np.arange(300), (3, 1)))
