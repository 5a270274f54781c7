"""Measure a judge on pairs whose better answer is known, before it is believed.

Two kinds of pairs: known ones (a right answer and one with a fault of retrieval) and equal ones (the same right
answer, short and long). Each answer is scored, each pair is compared in both orders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ic_train.data.passkey import random_digits, random_key
from ic_train.evaluation.passkey import wilson_interval
from ic_train.judge.grading import UNPARSABLE, Case, Judge, Request, outcome

FAULTS = ("distractor", "truncated", "invented", "refused", "not absent")
_NOT_THERE = "The document does not say."
_PADDING = (
    " I have read the quoted passage with care, from its first to its last word, before answering. The question"
    " asks for one thing only, and the passage is the only source that was used for the answer given here."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two answers to a case.

    Args:
        case: the question.
        first: the right answer; of an equal pair, the short one.
        second: the wrong answer; of an equal pair, the long one.
        fault: of the second answer, one of FAULTS; None makes an equal pair.
    """

    case: Case
    first: str
    second: str
    fault: str | None

    def requests(self, judge: Judge) -> Iterator[Request]:
        """Four judgements: a score for each answer, and the comparison in both orders."""
        name = self.case.id
        yield judge.absolute(f"{name}/first", self.case, self.first)
        yield judge.absolute(f"{name}/second", self.case, self.second)
        yield from judge.pair(name, self.case, self.first, self.second)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A measure of a judge with its limits.

    Args:
        name: of the measure.
        count: of `total`; halves where a pair counts for either side.
        total: pairs or judgements that it is measured on.
        interval: Wilson's, 95 %.
        limits: the interval has to lie within them.
    """

    name: str
    count: float
    total: int
    interval: tuple[float, float]
    limits: tuple[float, float]

    @property
    def passed(self) -> bool:
        """Whether the whole interval lies within the limits: a judge has to show it."""
        return self.total > 0 and self.limits[0] <= self.interval[0] and self.interval[1] <= self.limits[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a judge has to keep to.

    Args:
        agreement: least share of known pairs that it gets right.
        flips: most known pairs whose verdict follows the place.
        lenient: most wrong answers with a score of 4 or 5.
        preference: most distance from one half of a preference for a place or a length.
        unparsable: most judgements without a verdict.
    """

    agreement: float = 0.8
    flips: float = 0.2
    lenient: float = 0.2
    preference: float = 0.2
    unparsable: float = 0.05


def calibration_pairs(count: int, seed: int) -> list[Pair]:
    """`count` known pairs, each fault equally often, and `count` equal pairs.

    In every other known pair of a fault the wrong answer is the longer one, so that length says nothing.
    """
    rng = np.random.default_rng(seed)
    known = [_known_pair(rng, number) for number in range(count)]
    return known + [_equal_pair(rng, number) for number in range(count)]


def findings(
    pairs: list[Pair], judgements: Mapping[str, dict[str, Any]], limits: Limits | None = None
) -> list[Finding]:
    """All measures of a judge; unparsable judgements agree with nothing.

    Args:
        pairs: from `calibration_pairs`.
        judgements: by id, with `verdict`.
        limits: by default those of Limits.
    """
    limits = limits or Limits()
    known = [pair for pair in pairs if pair.fault]
    equal = [pair for pair in pairs if not pair.fault]

    def score(pair: Pair, which: str) -> int:
        # 0 for unparsable
        return judgements[f"{pair.case.id}/{which}"]["verdict"] or 0

    results = {pair.case.id: outcome(judgements, pair.case.id) for pair in pairs}
    parsed = [pair for pair in pairs if results[pair.case.id] != UNPARSABLE]
    verdicts = [
        judgements[f"{pair.case.id}/{part}"]["verdict"]
        for pair in pairs
        for part in ("first", "second", "ab", "ba")
    ]
    scored = [pair for pair in equal if score(pair, "first") and score(pair, "second")]
    middle = (0.5 - limits.preference, 0.5 + limits.preference)
    chosen: list[tuple[str, tuple[float, float], list[float]]] = [
        ("unparsable", (0, limits.unparsable), [verdict is None for verdict in verdicts]),
        (
            "agreement of comparisons",
            (limits.agreement, 1),
            [results[pair.case.id] == "first" for pair in known],
        ),
        (
            "agreement of scores",
            (limits.agreement, 1),
            [score(pair, "first") >= 4 and 1 <= score(pair, "second") <= 2 for pair in known],
        ),
        ("lenient", (0, limits.lenient), [score(pair, "second") >= 4 for pair in known]),
        ("flips", (0, limits.flips), [results[pair.case.id] == "flip" for pair in known if pair in parsed]),
        ("preference for the first place", middle, [_first_place(judgements, pair) for pair in parsed]),
        (
            "preference for the longer in comparisons",
            middle,
            [
                _side(results[pair.case.id] == "second", results[pair.case.id] == "first")
                for pair in parsed
                if not pair.fault
            ],
        ),
        (
            "preference for the longer in scores",
            middle,
            [
                _side(
                    score(pair, "second") > score(pair, "first"), score(pair, "second") < score(pair, "first")
                )
                for pair in scored
            ],
        ),
    ]
    return [_finding(name, values, within) for name, within, values in chosen]


def agreement_by_fault(
    pairs: list[Pair], judgements: Mapping[str, dict[str, Any]]
) -> dict[str, tuple[int, int]]:
    """Right comparisons and pairs per fault: which kind of wrong answer a judge does not see."""
    found = {}
    for fault in FAULTS:
        names = [pair.case.id for pair in pairs if pair.fault == fault]
        if names:
            found[fault] = (sum(outcome(judgements, name) == "first" for name in names), len(names))
    return found


def _finding(name: str, values: list[float], limits: tuple[float, float]) -> Finding:
    count = float(sum(values))
    interval = wilson_interval(count, len(values)) if values else (0.0, 1.0)
    # rounding leaves 1 + 1e-16 and -1e-17 at the ends
    interval = (max(0.0, interval[0]), min(1.0, interval[1]))
    return Finding(name=name, count=count, total=len(values), interval=interval, limits=limits)


def _side(one: bool, other: bool) -> float:
    return 0.5 + 0.5 * one - 0.5 * other


def _first_place(judgements: Mapping[str, dict[str, Any]], pair: Pair) -> float:
    """1 where both orders name place A, 0 where both name B."""
    votes = [judgements[f"{pair.case.id}/{order}"]["verdict"] for order in ("ab", "ba")]
    return votes.count("A") / 2


def _known_pair(rng: np.random.Generator, number: int) -> Pair:
    fault = FAULTS[number % len(FAULTS)]
    key, other, digits, distractor = _names(rng)
    quote = f"The pass key for {other} is {distractor}.\nThe pass key for {key} is {digits}."
    right, reference = f"The pass key for {key} is {digits}.", f"The pass key for {key} is {digits}."
    invented = random_digits(rng)
    wrong = f"The pass key for {key} is {{}}."
    if fault == "not absent":
        quote = quote.splitlines()[0]
        right = reference = _NOT_THERE
    wrong = {
        "distractor": wrong.format(distractor),
        "truncated": wrong.format(digits[:3]),
        "invented": wrong.format(invented),
        "refused": _NOT_THERE,
        "not absent": wrong.format(invented),
    }[fault]
    longer_is_wrong = number // len(FAULTS) % 2 == 0
    if longer_is_wrong:
        wrong += _PADDING
    else:
        right += _PADDING
    case = Case(
        id=f"known-{number}", question=f"What is the pass key for {key}?", reference=reference, quote=quote
    )
    return Pair(case=case, first=right, second=wrong, fault=fault)


def _equal_pair(rng: np.random.Generator, number: int) -> Pair:
    key, other, digits, distractor = _names(rng)
    answer = f"The pass key for {key} is {digits}."
    case = Case(
        id=f"equal-{number}",
        question=f"What is the pass key for {key}?",
        reference=answer,
        quote=f"The pass key for {other} is {distractor}.\n{answer}",
    )
    return Pair(case=case, first=answer, second=answer + _PADDING, fault=None)


def _names(rng: np.random.Generator) -> tuple[str, str, str, str]:
    """Two keys and two values, all different."""

    def two(draw: Callable[[np.random.Generator], str]) -> tuple[str, str]:
        one = draw(rng)
        while (other := draw(rng)) == one:
            pass
        return one, other

    return *two(random_key), *two(random_digits)
