"""The size of a context is found by few measurements, whatever a unit costs."""

import random

import pytest

from ic_train.evaluation.fitting import fit_units


@pytest.mark.parametrize("seed", range(300))
def test_as_much_as_fits_is_found_while_a_few_times_the_goal_is_read(seed: int) -> None:
    rng = random.Random(seed)
    goal, least = rng.choice([600, 4_000, 32_000, 131_072, 1_048_576]), rng.choice([1, 4, 20, 40])
    offset, per_unit = rng.uniform(0, 200), rng.uniform(0.5, 200 / least)
    # units that cost more or less the further on they come, by up to a tenth
    bend = rng.uniform(-0.1, 0.1)
    most = rng.choice([None, None, max(least, int(rng.uniform(0.1, 2) * goal / per_unit))])
    read = []

    def count(units: int) -> int:
        assert units >= least and (most is None or units <= most)
        share = min(1, units * per_unit / goal)
        read.append(int(offset + units * per_unit * (1 + bend * share)))
        return read[-1]

    best, tokens_per_unit = fit_units(count, goal_tokens=goal, least=least, most=most)
    assert sum(read) < 8 * goal
    assert count(best) <= goal
    assert tokens_per_unit > 0
    assert best == most or goal - read[-1] < max(2 * per_unit, 0.02 * goal)
