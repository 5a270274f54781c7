"""Right answers with their quotes, and the wrong ones that models really give."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from ic_train.data.passkey import random_digits
from ic_train.evaluation.hard_sets import Asked, Fact
from ic_train.evaluation.tasks import states_absence
from ic_train.evaluation.wordings import Wording

# of data.passkey.random_digits
VALUE_DIGITS = 5
# faults of made answers, by kind; a list is gone through in turn, so the likeliest fault of a kind stands twice
FAULTS: Mapping[str, tuple[str, ...]] = {
    "single": ("refused", "truncated", "invented"),
    "multi": ("distractor", "refused", "truncated", "invented"),
    "distractors": ("distractor", "refused", "distractor", "truncated", "distractor", "invented"),
    "corrections": ("outdated", "refused", "outdated", "truncated", "outdated", "distractor"),
    "absent": ("distractor", "invented"),
}


def right_answer(asked: Asked, wording: Wording) -> str:
    """The value that counts with the sentence that states it, or that there is none."""
    if asked.fact is None:
        return wording.no_answer
    return _stating(asked.fact, wording)


def wrong_answer(asked: Asked, wording: Wording, fault: str, rng: np.random.Generator) -> str:
    """An answer with a fault, in the form of a right one, so that form says nothing.

    Args:
        asked: what it is about.
        wording: of the answer.
        fault: one of FAULTS of the context's kind.
        rng: of invented numbers, and of the distractor.
    """
    if fault == "refused":
        return wording.no_answer
    if fault == "distractor":
        return _stating(asked.others[int(rng.integers(len(asked.others)))], wording)
    if fault == "outdated":
        return _outdated(asked, wording)
    known = {fact.value for fact in asked.facts}
    if fault == "truncated":
        assert asked.fact is not None, "what is not there cannot be truncated"
        value = asked.fact.value[: int(rng.integers(2, len(asked.fact.value)))]
    else:
        assert fault == "invented", fault
        while (value := random_digits(rng)) in known:
            pass
    return _made_up(value, asked, wording)


def in_right_form(
    answer: str, fault: str, asked: Asked, elsewhere: Mapping[str, Fact], wording: Wording
) -> str:
    """What a model said wrongly, in the words of a right answer: its value counts, and form says nothing.

    Args:
        answer: the model's.
        fault: of `fault_of`.
        asked: what it is about.
        elsewhere: all facts of the context, by value.
        wording: of the answer.

    Returns:
        the answer with the value and a quote that states it; the model's own words where it gave no value, or one
        longer than any value is.
    """
    if fault == "refused":
        return wording.no_answer
    numbers = re.findall(r"\d+", answer)
    if not numbers or len(numbers[0]) > VALUE_DIGITS:
        return answer
    if fault == "outdated":
        return _outdated(asked, wording)
    if fault == "distractor":
        return _stating(elsewhere[numbers[0]], wording)
    return _made_up(numbers[0], asked, wording)


def fault_of(answer: str, asked: Asked, elsewhere: Mapping[str, Fact]) -> str | None:
    """What is wrong with a model's answer; None where it is right, or not surely wrong.

    Args:
        answer: the model's.
        asked: what it is about.
        elsewhere: all facts of the context, by value.
    """
    numbers = re.findall(r"\d+", answer)
    if asked.fact is None:
        # a number beside "not in the document" may be meant as an example
        if not numbers or states_absence(answer):
            return None
    elif asked.fact.value in numbers:
        # the right value behind another one may be an explanation
        return None
    if not numbers:
        return "refused" if states_absence(answer) else "no number"
    value = numbers[0]
    if asked.outdated and value == asked.outdated.value:
        return "outdated"
    if value in elsewhere:
        return "distractor"
    if asked.fact and asked.fact.value.startswith(value):
        return "truncated"
    return "invented"


def _outdated(asked: Asked, wording: Wording) -> str:
    assert asked.fact is not None and asked.outdated is not None, (
        "only a corrected fact has an outdated value"
    )
    # quoted from the correction, its values exchanged: by the first sentence, without "Correction", answers could
    # be told apart without a look at their values
    new, old = asked.fact.value, asked.outdated.value
    sentence = re.sub(f"{new}|{old}", lambda match: old if match[0] == new else new, asked.fact.sentence)
    return wording.answer.format(digits=old, quote=sentence.strip())


def _made_up(value: str, asked: Asked, wording: Wording) -> str:
    """A value that the document has nowhere, with the sentence that would state it."""
    if asked.fact is None:
        sentence = wording.needle.format(key=asked.key, digits=value)
    else:
        sentence = asked.fact.sentence.replace(asked.fact.value, value)
    return wording.answer.format(digits=value, quote=sentence.strip())


def _stating(fact: Fact, wording: Wording) -> str:
    return wording.answer.format(digits=fact.value, quote=fact.sentence.strip())
