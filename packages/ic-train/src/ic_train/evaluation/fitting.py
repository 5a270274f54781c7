"""How much of something fits into a number of tokens, found by few measurements."""

from __future__ import annotations

import math
from collections.abc import Callable

# what is shorter by less than this share is not made longer
_CLOSE = 0.005
_MOST_TRIES = 8


def fit_units(
    count: Callable[[int], int], *, goal_tokens: int, least: int, most: int | None
) -> tuple[int, float]:
    """The number of units whose text is as long as fits, and its tokens per unit.

    Two short measurements give a straight line, the next ones are near the goal: all of them together read a few
    times the length, whatever it is. Adding to a text until it is long enough reads its length squared.

    Args:
        count: tokens of a text of so many units; each call tokenises it.
        goal_tokens: not to be exceeded; `least` units fit.
        least: units, at least 1.
        most: units; None for any number.
    """
    units, tokens = least, count(least)
    assert tokens <= goal_tokens
    best, per_unit = units, tokens / units
    other, other_tokens = units, tokens
    units = 2 * units + 8
    for _ in range(_MOST_TRIES):
        units = max(least, units if most is None else min(units, most))
        if units == other:
            break
        tokens = count(units)
        slope = max((tokens - other_tokens) / (units - other), 1e-3)
        if tokens <= goal_tokens:
            if units > best:
                best, per_unit = units, tokens / units
            if goal_tokens - tokens < max(slope, _CLOSE * goal_tokens):
                break
        other, other_tokens = units, tokens
        # a short measurement says little about a long text: a hundred times its length is far enough
        units = min(units + math.floor((goal_tokens - tokens) / slope), 100 * units)
    return best, per_unit
