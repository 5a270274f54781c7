"""Make preference pairs: contexts with their questions, a right answer each, and a wrong one."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ic_train.evaluation.client import run_bounded
from ic_train.evaluation.engines import Engine
from ic_train.evaluation.hard_sets import KINDS, Asked, Fact, HardContext, build_context, short_context
from ic_train.evaluation.records import Records, hold_settings
from ic_train.evaluation.tasks import Context, Question
from ic_train.evaluation.wordings import LONGEST_NAME, Wording
from ic_train.preferences.answers import FAULTS, fault_of, in_right_form, right_answer, wrong_answer
from ic_train.preferences.store import Writer, write_record

ANSWERS_FILE = "answers.jsonl"
# of the contexts that a model is asked about at a time: more of them would push each other out of a prefix cache
_TOKENS_AT_ONCE = 2**17
# names and numbers of other contexts may take more tokens than those that lengths are reckoned with
_MARGIN_TOKENS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class PairPlan:
    """What pairs are made.

    Args:
        kinds: names out of KINDS.
        lengths_tokens: of prompts with their longer answer.
        short_tokens: of short prompts with their longer answer.
        pairs: per kind and length.
        pairs_per_context: pairs that share a context; "single" has one each.
        seed: of names, values, places and texts.
        haystack: text that hides the facts.
        tokenizer: the model's.
        wording: of facts, questions and answers.
    """

    kinds: tuple[str, ...]
    lengths_tokens: tuple[int, ...]
    short_tokens: int
    pairs: int
    pairs_per_context: int
    seed: int
    haystack: str
    tokenizer: PreTrainedTokenizerBase
    wording: Wording

    @property
    def settings(self) -> dict[str, Any]:
        """What decides every pair, as JSON."""
        sample = self.tokenizer(self.haystack[:10_000], add_special_tokens=False)["input_ids"]
        return {
            "kinds": list(self.kinds),
            "lengths_tokens": list(self.lengths_tokens),
            "short_tokens": self.short_tokens,
            "pairs_per_kind_and_length": self.pairs,
            "pairs_per_context": self.pairs_per_context,
            "seed": self.seed,
            "wording": self.wording.name,
            "haystack_sha256": hashlib.sha256(self.haystack.encode()).hexdigest(),
            "tokenizer_sha256": hashlib.sha256(json.dumps(sample).encode()).hexdigest(),
            "vocab_size": len(self.tokenizer),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """The pairs of one context."""

    kind: str
    context_tokens: int
    number: int
    ids: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wrong:
    """A wrong answer, where it came from, what is wrong with it, and a model's own words."""

    text: str
    source: str
    fault: str
    said: str | None = None


async def make_pairs(
    folder: Path, plan: PairPlan, settings: dict[str, Any], engine: Engine | None = None
) -> dict[str, Any]:
    """Make the pairs that a folder does not hold yet; the record of the whole.

    Args:
        folder: made where it does not exist.
        plan: what to make.
        settings: `plan.settings` and what else a rerun into the same folder must share.
        engine: asked for its own wrong answers; without one all are made.

    Raises:
        ValueError: a length has no room, or the folder holds pairs of other settings, or cannot be written.
        ServerError: a server gave up; what was written is kept, and the same call goes on from there.
    """
    _check_spelling(plan)
    groups = list(_groups(plan))
    for kind in plan.kinds:
        # a length without room is found before hours of work, not after
        made = _build(plan, next(group for group in groups if group.kind == kind))
        # with one more fact, which a model may take for the right one
        more = [fact for fact in made.facts if fact not in made.asked[0].facts][:1]
        _short(plan, replace(made.asked[0], others=(*made.asked[0].others, *more)), seed=0)
    try:
        hold_settings(folder, settings)
        with Writer(folder, settings["vocab_size"]) as writer, Records(folder / ANSWERS_FILE) as answers:
            total = sum(len(group.ids) for group in groups)
            with tqdm(total=total, initial=len(writer.lines), unit="pair") as bar:
                for _, like in groupby(groups, key=lambda group: (group.kind, group.context_tokens)):
                    await _make_all(plan, list(like), engine, writer, answers, bar)
                record = {**settings, **_counts(writer)}
        write_record(folder, record)
        # what counts of them stands in the pairs
        (folder / ANSWERS_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written: {error}; the same command goes on from what is there"
        ) from None
    return record


def _groups(plan: PairPlan) -> Iterator[_Group]:
    for kind in plan.kinds:
        each = _pairs_per_context(plan, kind)
        number = 0
        for tokens in plan.lengths_tokens:
            for start in range(0, plan.pairs, each):
                places = range(min(each, plan.pairs - start))
                ids = [f"{kind}-{tokens}-{start // each}-{place}" for place in places]
                yield _Group(kind=kind, context_tokens=tokens, number=number, ids=ids)
                number += 1


def _pairs_per_context(plan: PairPlan, kind: str) -> int:
    return 1 if kind == "single" else plan.pairs_per_context


def _build(plan: PairPlan, group: _Group) -> HardContext:
    reserved = _reserved_tokens(plan)
    try:
        return build_context(
            group.kind,
            plan.haystack,
            plan.tokenizer,
            plan.wording,
            context_tokens=group.context_tokens - reserved,
            count=_pairs_per_context(plan, group.kind),
            seed=plan.seed,
            number=group.number,
            held_out=False,
        )
    except ValueError as error:
        raise ValueError(
            f"--lengths has {group.context_tokens}, of which question and answer take {reserved}; "
            f"{group.kind}: {error}"
        ) from None


def _short(plan: PairPlan, asked: Asked, seed: int) -> list[int]:
    room = plan.short_tokens - _reserved_tokens(plan)
    try:
        return short_context(
            asked, plan.haystack, plan.tokenizer, plan.wording, context_tokens=room, seed=seed
        )
    except ValueError as error:
        raise ValueError(
            f"--short-tokens is {plan.short_tokens}, of which question and answer take "
            f"{plan.short_tokens - room}: {error}"
        ) from None


async def _make_all(
    plan: PairPlan,
    groups: list[_Group],
    engine: Engine | None,
    writer: Writer,
    answers: Records,
    bar: tqdm,
) -> None:
    """Write the pairs of these groups that are missing, in their order, whatever the order of a model's answers.

    Args:
        plan: of all pairs.
        groups: of one kind and length.
        engine: see `make_pairs`.
        writer: of the pairs.
        answers: by id, each written at once: what was answered is not asked again.
        bar: of all pairs.
    """
    left = [group for group in groups if any(name not in writer.lines for name in group.ids)]
    waiting = {group.number: group for group in left}
    done: dict[int, HardContext] = {}

    async def make(group: _Group) -> None:
        made = _build(plan, group)
        if engine is not None:
            await _ask(plan, group, made, engine, writer, answers)
        done[group.number] = made
        for number in list(waiting):
            if number not in done:
                break
            first = waiting.pop(number)
            bar.set_description(f"{first.kind} {first.context_tokens}")
            bar.update(_write(plan, first, done.pop(number), answers, writer))

    at_once = 1 if engine is None else max(1, _TOKENS_AT_ONCE // groups[0].context_tokens)
    await run_bounded(((lambda group=group: make(group)) for group in left), concurrency=at_once)


def _write(plan: PairPlan, group: _Group, made: HardContext, answers: Records, writer: Writer) -> int:
    """Write the pairs of a context that are missing; how many. Their contexts stand where they stood."""
    asked = dict(zip(group.ids, made.asked, strict=False))
    missing = [name for name in group.ids if name not in writer.lines]
    held = next((writer.lines[name]["context"] for name in group.ids if name in writer.lines), None)
    extent = held or writer.add_tokens(made.token_ids)
    elsewhere = {fact.value: fact for fact in made.facts}
    faults = FAULTS[group.kind]
    for name in missing:
        one, place = asked[name], group.ids.index(name)
        rng = np.random.default_rng([plan.seed, KINDS.index(group.kind), group.number, place])
        said = answers.by_id[name]["answer"] if name in answers.by_id else ""
        fault = fault_of(said, one, elsewhere) if name in answers.by_id else None
        if fault:
            one = _with_taken(one, said, elsewhere)
            text = _cut_to_room(plan, one, in_right_form(said, fault, one, elsewhere, plan.wording))
            wrong = _Wrong(text=text, source="model", fault=fault, said=said)
        else:
            turn = group.number * _pairs_per_context(plan, group.kind) + place
            fault = faults[turn % len(faults)]
            wrong = _Wrong(text=wrong_answer(one, plan.wording, fault, rng), source="made", fault=fault)
        short = writer.add_tokens(_short(plan, one, seed=int(rng.integers(2**31))))
        writer.add_pair(_line(plan, group, name, made.depth(one), one, wrong, extent, short))
    return len(missing)


async def _ask(
    plan: PairPlan, group: _Group, made: HardContext, engine: Engine, writer: Writer, answers: Records
) -> None:
    """Keep a model's answers to the questions that have neither a pair nor an answer yet.

    Each may be as long as a right one.
    """
    questions = [
        Question(
            id=name,
            text=_question(plan, one),
            expected=(),
            depth=None,
            quote="",
            max_tokens=_longest_answer_tokens(plan),
            stop=plan.wording.stop,
        )
        for name, one in zip(group.ids, made.asked, strict=False)
        if name not in writer.lines and name not in answers.by_id
    ]

    def answered(question: Question, answer: str) -> None:
        answers.append({"id": question.id, "answer": plan.wording.first_answer(answer)})

    if questions:
        await engine.ask(Context(token_ids=made.token_ids, questions=questions), answered)


def _with_taken(asked: Asked, said: str, elsewhere: dict[str, Fact]) -> Asked:
    """With the fact that a model took for the right one among those that matter."""
    value = re.search(r"\d+", said)
    taken = elsewhere.get(value[0]) if value else None
    return asked if taken is None or taken in asked.facts else replace(asked, others=(*asked.others, taken))


def _cut_to_room(plan: PairPlan, asked: Asked, text: str) -> str:
    """A model's answer, or as much of it as its contexts leave room for.

    A model's own words may have more tokens than it was allowed: a byte that is no UTF-8 comes back as a character
    of three. Cut, they are still what it says, as they are where it does not come to an end by itself.
    """
    room = _reserved_tokens(plan) - len(_question_ids(plan, asked))
    if len(_answer_ids(plan, text)) <= room:
        return text
    # one for the end of text
    kept = _spelled(plan, text)[: room - 1]
    # what is stored has to read back as the same tokens: no cut through a character
    while _spelled(plan, cut := plan.tokenizer.decode(kept, clean_up_tokenization_spaces=False)) != kept:
        kept.pop()
    return cut


def _line(
    plan: PairPlan,
    group: _Group,
    name: str,
    depth: float | None,
    asked: Asked,
    wrong: _Wrong,
    context: list[int],
    short: list[int],
) -> dict[str, Any]:
    right = right_answer(asked, plan.wording)
    chosen, rejected = _answer_ids(plan, right), _answer_ids(plan, wrong.text)
    question_ids = _question_ids(plan, asked)
    used = context[1] + len(question_ids) + max(len(chosen), len(rejected))
    assert used <= group.context_tokens, f"{name} has {used} tokens"
    return {
        "id": name,
        "kind": group.kind,
        "context_tokens": group.context_tokens,
        "depth": depth,
        "key": asked.key,
        "question": _question(plan, asked),
        "chosen": right,
        "rejected": wrong.text,
        "rejected_source": wrong.source,
        "fault": wrong.fault,
        **({} if wrong.said is None else {"model_answer": wrong.said}),
        "context": context,
        "short_context": short,
        "question_ids": question_ids,
        "chosen_ids": chosen,
        "rejected_ids": rejected,
    }


def _check_spelling(plan: PairPlan) -> None:
    """Refuse a tokenizer that loses letters: what it cannot spell, no model can read or say."""
    wording = plan.wording
    sentence = wording.needle.format(key=LONGEST_NAME, digits="13579")
    for text in (sentence, wording.answer.format(digits="24680", quote=sentence.strip()), wording.no_answer):
        spelled = plan.tokenizer.decode(_spelled(plan, text), clean_up_tokenization_spaces=False)
        if spelled != text:
            raise ValueError(
                f"the tokenizer cannot spell {text!r}; it reads back as {spelled!r}: give another one"
            )


def _question(plan: PairPlan, asked: Asked) -> str:
    return plan.wording.question.format(key=asked.key)


def _question_ids(plan: PairPlan, asked: Asked) -> list[int]:
    return plan.tokenizer(_question(plan, asked), add_special_tokens=False)["input_ids"]


def _spelled(plan: PairPlan, text: str) -> list[int]:
    """Token ids of text, special tokens that it spells out included: they stay text."""
    return plan.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _answer_ids(plan: PairPlan, text: str) -> list[int]:
    ids = _spelled(plan, text)
    end = plan.tokenizer.eos_token_id
    return ids if end is None else [*ids, end]


def _reserved_tokens(plan: PairPlan) -> int:
    """Most tokens of a question and an answer."""
    question = plan.wording.question.format(key=LONGEST_NAME)
    question_ids = plan.tokenizer(question, add_special_tokens=False)["input_ids"]
    return len(question_ids) + _longest_answer_tokens(plan) + _MARGIN_TOKENS


def _longest_answer_tokens(plan: PairPlan) -> int:
    """Tokens of an answer with the longest quote."""
    quote = plan.wording.correction.format(key=LONGEST_NAME, old="00000", digits="00000").strip()
    return len(_answer_ids(plan, plan.wording.answer.format(digits="00000", quote=quote)))


def _counts(writer: Writer) -> dict[str, Any]:
    """What `preferences.json` says beside the settings."""
    lines = list(writer.lines.values())

    def by(*names: str) -> dict[str, int]:
        counted = Counter(" ".join(str(line[name]) for name in names) for line in lines)
        return dict(sorted(counted.items()))

    return {
        "pairs": len(lines),
        "tokens": writer.tokens,
        "dtype": writer.dtype.str,
        "largest_token_id": writer.largest_token_id,
        "pairs_by_kind": by("kind"),
        "pairs_by_length": by("context_tokens"),
        "pairs_by_source": by("rejected_source"),
        "pairs_by_kind_and_fault": by("kind", "rejected_source", "fault"),
    }
