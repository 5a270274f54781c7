"""Facts that are hard to tell apart: near-duplicate names, values that are corrected later, absent names.

The one place that decides which facts a context holds. Evaluation asks about them; training makes pairs of answers
from them, with names of the other half of all names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic_train.data.passkey import random_digits
from ic_train.evaluation.passkey import hide_passages
from ic_train.evaluation.wordings import Wording, is_held_out, near_duplicate

# names that differ by little from each other
FAMILY = 4
# places for a fact that is alone in its context; contexts take turns
_DEPTHS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """A sentence in a context.

    Args:
        key: the name.
        value: its number.
        sentence: that states it, as it stands in the context.
        slot: which of the context's equal parts holds it, from 0.
    """

    key: str
    value: str
    sentence: str
    slot: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A name to ask for, and what the context says about it.

    Args:
        key: the name.
        fact: the one that counts; None where the context has none.
        outdated: the one that `fact` corrects.
        others: facts that it may be taken for, the likeliest first.
    """

    key: str
    fact: Fact | None
    outdated: Fact | None
    others: tuple[Fact, ...]

    @property
    def facts(self) -> list[Fact]:
        """All of them, in order of depth."""
        chosen = [fact for fact in (self.outdated, self.fact) if fact]
        return sorted([*chosen, *self.others], key=lambda fact: fact.slot)


@dataclass(frozen=True, kw_only=True, slots=True)
class HardContext:
    """A context of an exact length, and the names to ask for.

    Args:
        token_ids: context, without a question.
        facts: all that it holds.
        asked: names.
        depths: of the facts by their slots, from 0 (start) to 1 (end).
    """

    token_ids: list[int]
    facts: list[Fact]
    asked: list[Asked]
    depths: list[float]

    def depth(self, asked: Asked) -> float | None:
        """Where the fact that counts stands."""
        return None if asked.fact is None else round(self.depths[asked.fact.slot], 4)


class _Drawer:
    """Draws names and values that no fact of the context has yet."""

    def __init__(self, rng: np.random.Generator, wording: Wording, *, held_out: bool) -> None:
        self._rng = rng
        self._wording = wording
        self._held_out = held_out
        self._taken: set[str] = set()

    def name(self) -> str:
        """A new name of this side."""
        return self._new(lambda: self._wording.new_name(self._rng), self._is_ours)

    def family(self, size: int) -> list[str]:
        """Names that are near duplicates of the first one."""
        first = self.name()
        near = (self._new(lambda: near_duplicate(first, self._rng), self._is_ours) for _ in range(size - 1))
        return [first, *near]

    def value(self) -> str:
        """A new number of five digits.

        Evaluation asks for none that starts with 0, which some models shorten. Training has them: a model that
        never sees one learns to say that it is not there.
        """
        return self._new(
            lambda: random_digits(self._rng), lambda value: value[0] != "0" or not self._held_out
        )

    def _is_ours(self, name: str) -> bool:
        return is_held_out(name) == self._held_out

    def _new(self, draw: Callable[[], str], accepts: Callable[[str], bool]) -> str:
        while (drawn := draw()) in self._taken or not accepts(drawn):
            pass
        self._taken.add(drawn)
        return drawn

    def place(self, slots: int) -> list[int]:
        """Places 0 to slots - 1 in random order."""
        return self._rng.permutation(slots).tolist()

    def state(self, key: str, slot: int) -> Fact:
        """A fact with a new value."""
        value = self.value()
        sentence = self._wording.needle.format(key=key, digits=value)
        return Fact(key=key, value=value, sentence=sentence, slot=slot)

    def correct(self, fact: Fact, slot: int) -> Fact:
        """A later fact that replaces one."""
        value = self.value()
        sentence = self._wording.correction.format(key=fact.key, old=fact.value, digits=value)
        return Fact(key=fact.key, value=value, sentence=sentence, slot=slot)


# number of slots, facts in them, names to ask for
_Layout = tuple[int, list[Fact], list[Asked]]


def _single(draw: _Drawer, count: int, number: int) -> _Layout:
    """One fact; contexts take turns through the depths."""
    assert count == 1, "a context with one fact has one question"
    fact = draw.state(draw.name(), number % _DEPTHS)
    return _DEPTHS, [fact], [Asked(key=fact.key, fact=fact, outdated=None, others=())]


def _multi(draw: _Drawer, count: int, number: int) -> _Layout:
    """Many names."""
    facts = [draw.state(draw.name(), slot) for slot in range(max(count, FAMILY))]
    return len(facts), facts, [_among(fact, facts, None) for fact in facts[:count]]


def _distractors(draw: _Drawer, count: int, number: int) -> _Layout:
    """Families of names that differ by little; each of them is asked for."""
    families = [draw.family(FAMILY) for _ in range(-(-count // FAMILY))]
    slots = draw.place(len(families) * FAMILY)
    facts, asked = [], []
    for family in families:
        alike = [draw.state(key, slots.pop()) for key in family]
        facts += alike
        asked += [_among(fact, alike, None) for fact in alike]
    return len(facts), facts, asked[:count]


def _corrections(draw: _Drawer, count: int, number: int) -> _Layout:
    """Names that get a value, and later another one."""
    names = max(count, FAMILY)
    slots = draw.place(2 * names)
    firsts, lasts = [], []
    for start in range(0, 2 * names, 2):
        earlier, later = sorted(slots[start : start + 2])
        firsts.append(draw.state(draw.name(), earlier))
        lasts.append(draw.correct(firsts[-1], later))
    asked = [_among(last, lasts, first) for first, last in zip(firsts, lasts, strict=True)]
    return 2 * names, firsts + lasts, asked[:count]


def _absent(draw: _Drawer, count: int, number: int) -> _Layout:
    """Families of which some names are in the context; those that are not are asked for."""
    families = [draw.family(2 * FAMILY) for _ in range(-(-count // FAMILY))]
    slots = draw.place(len(families) * FAMILY)
    facts, asked = [], []
    for family in families:
        alike = tuple(draw.state(key, slots.pop()) for key in family[:FAMILY])
        facts += alike
        asked += [Asked(key=key, fact=None, outdated=None, others=alike) for key in family[FAMILY:]]
    return len(facts), facts, asked[:count]


_LAYOUTS: dict[str, Callable[[_Drawer, int, int], _Layout]] = {
    "single": _single,
    "multi": _multi,
    "distractors": _distractors,
    "corrections": _corrections,
    "absent": _absent,
}
KINDS = tuple(_LAYOUTS)


def build_context(
    kind: str,
    haystack: str,
    tokenizer: PreTrainedTokenizerBase,
    wording: Wording,
    *,
    context_tokens: int,
    count: int,
    seed: int,
    number: int,
    held_out: bool,
) -> HardContext:
    """A context with facts that are hard to tell apart, and the names to ask for.

    Args:
        kind: one of KINDS.
        haystack: text that hides the facts.
        tokenizer: the model's.
        wording: of the facts.
        context_tokens: most tokens of the context, without question and answer.
        count: names to ask for; 1 for "single".
        seed: of all contexts.
        number: of this one; another number gives other names, values, places and another stretch of text.
        held_out: whether names are those of evaluation; training takes the others.

    Raises:
        ValueError: the facts alone are longer than the context.
    """
    rng = np.random.default_rng([seed, number, KINDS.index(kind)])
    slots, facts, asked = _LAYOUTS[kind](_Drawer(rng, wording, held_out=held_out), count, number)
    passages = [""] * slots
    for fact in facts:
        passages[fact.slot] = fact.sentence
    token_ids, depths = hide_passages(
        haystack,
        tokenizer,
        passages,
        before=wording.before,
        context_tokens=context_tokens,
        seed=int(rng.integers(2**31)),
    )
    return HardContext(token_ids=token_ids, facts=facts, asked=asked, depths=depths)


def short_context(
    asked: Asked,
    haystack: str,
    tokenizer: PreTrainedTokenizerBase,
    wording: Wording,
    *,
    context_tokens: int,
    seed: int,
) -> list[int]:
    """Token ids of a short text with the facts that matter for one name, in the same order.

    Raises:
        ValueError: the facts alone are longer than the context.
    """
    passages = [fact.sentence for fact in asked.facts]
    token_ids, _ = hide_passages(
        haystack, tokenizer, passages, before=wording.before, context_tokens=context_tokens, seed=seed
    )
    return token_ids


def _among(fact: Fact, facts: list[Fact], outdated: Fact | None) -> Asked:
    """A fact with those it may be taken for: at most as many as a family has."""
    index = facts.index(fact)
    others = (facts[index + 1 :] + facts[:index])[: FAMILY - 1]
    return Asked(key=fact.key, fact=fact, outdated=outdated, others=tuple(others))
