"""Retrieval tasks: contexts of an exact length, their questions, and how an answer is scored.

A context is a prefix that its questions share, so that a server with prefix caching reads it once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic_train.evaluation.hard_sets import build_context
from ic_train.evaluation.passkey import make_document
from ic_train.evaluation.wordings import Wording, wording_for

# room for a question and its answer in any tokenizer
SPARE_TOKENS = 160
VALUES_PER_KEY = 3
# of an answer that a prompt has begun: it goes on with the number
ANSWER_TOKENS = 12
# the shortest that `evaluate` takes
_FIRST_TRY_TOKENS = 512

# Mohtashami and Jaggi, "Landmark Attention", arXiv 2305.16300, appendix; the lines are joined by line breaks
_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NEEDLE = "The pass key is {number}. Remember it. {number} is the pass key."
_QUESTION = "\nWhat is the pass key? The pass key is"
_LARGEST_NUMBER = 50_000

_VALUES_QUESTION = "\nQuestion: all {count} pass keys for {key}? Answer: The pass keys for {key} are"
# how answers say that a document does not hold what was asked for
_ABSENCE = re.compile(
    r"\b(?:not|no|none|never|nothing|nowhere|absent|missing|unknown|cannot|unable|without)\b|n['\u2019]t\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question about a context.

    Args:
        id: of the question in its run; the same settings give the same ids.
        text: follows the context directly.
        expected: what the answer must hold.
        depth: of the fact in the context, from 0 (start) to 1 (end); None for several facts.
        quote: the passages that hold the answer.
        max_tokens: of the answer.
        stop: text at whose end nothing more is wanted of the answer, which may go on behind it.
    """

    id: str
    text: str
    expected: tuple[str, ...]
    depth: float | None
    quote: str
    max_tokens: int
    stop: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """A context and its questions; `token_ids` are what a model reads, without special tokens."""

    token_ids: list[int]
    questions: list[Question]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How contexts are made.

    Args:
        haystack: text that keys are hidden in; `passkey` has its own.
        tokenizer: the model's.
        num_questions: per task and length.
        keys_per_context: questions that share a context, in the tasks that hide several keys.
        seed: of texts, keys and depths.
        wording: of `distractors`, `corrections` and `absent`; None for what suits the tokenizer.
        answer_tokens: most tokens of an answer with one number, in `passkey`, `niah` and `multivalue`.
    """

    haystack: str
    tokenizer: PreTrainedTokenizerBase
    num_questions: int
    keys_per_context: int
    seed: int
    wording: Wording | None = None
    answer_tokens: int = ANSWER_TOKENS


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A task: how many contexts it has, how one is made, when an answer is right."""

    name: str
    build: Callable[[Plan, int, int, list[str]], Context]
    score: Callable[[str, tuple[str, ...]], bool]
    shares_context: bool = True


def question_ids(task: Task, plan: Plan, context_tokens: int) -> list[list[str]]:
    """The ids of all questions of a task at a length, a list per context; nothing is built for them."""
    each = plan.keys_per_context if task.shares_context else 1
    names = [
        f"{task.name}-{context_tokens}-{number // each}-{number % each}"
        for number in range(plan.num_questions)
    ]
    return [names[start : start + each] for start in range(0, len(names), each)]


def contexts(task: Task, plan: Plan, context_tokens: int, wanted: Callable[[str], bool]) -> Iterator[Context]:
    """The contexts that have wanted questions, with these questions only, made one at a time.

    Args:
        task: one of TASKS.
        plan: the run's.
        context_tokens: length of each context with its question and its answer.
        wanted: whether the question of an id is to be asked.

    Raises:
        ValueError: the length has no room for what is hidden.
    """
    for number, names in enumerate(question_ids(task, plan, context_tokens)):
        if not any(map(wanted, names)):
            continue
        made = task.build(plan, context_tokens - SPARE_TOKENS, number, names)
        asked = [question for question in made.questions if wanted(question.id)]
        yield Context(token_ids=made.token_ids, questions=asked)


def check_room(task: Task, plan: Plan, context_tokens: int) -> None:
    """Refuse a length that has no room for what is hidden in any context of a task.

    What is hidden does not depend on the length, so a context that can be made shorter has room: little is made
    even of a million tokens.

    Args:
        task: one of TASKS.
        plan: the run's.
        context_tokens: length of each context with its question and its answer.

    Raises:
        ValueError: names the length, the task and what it needs.
    """
    for number, names in enumerate(question_ids(task, plan, context_tokens)):
        tokens = min(_FIRST_TRY_TOKENS, context_tokens)
        while True:
            try:
                task.build(plan, tokens - SPARE_TOKENS, number, names)
                break
            except ValueError as error:
                if tokens == context_tokens:
                    raise ValueError(
                        f"--lengths has {tokens}, of which question and answer take {SPARE_TOKENS}; "
                        f"{task.name}: {error}"
                    ) from None
                tokens = min(2 * tokens, context_tokens)
        if 2 * tokens <= context_tokens:
            # the others have other names, which never take twice the room
            return


def _passkey(plan: Plan, tokens: int, number: int, names: list[str]) -> Context:
    """One number in the published filler; depths go evenly from the end to the start.

    All contexts of a length start alike, down to their number: with the deepest first, a cache of prefixes
    spares half of the reading on average.
    """
    rng = np.random.default_rng([plan.seed, number])
    wanted = 1 - (number + rng.random()) / plan.num_questions
    value = str(int(rng.integers(1, _LARGEST_NUMBER + 1)))
    needle = _NEEDLE.format(number=value)
    sample = _token_count(plan.tokenizer, " ".join([_FILLER] * 33)) - _token_count(plan.tokenizer, _FILLER)
    fixed = _token_count(plan.tokenizer, f"{_TASK}\n\n{needle}\n")
    characters = int((tokens - fixed) / (sample / 32) * (len(_FILLER) + 1))
    while characters > len(_FILLER):
        endless = (_FILLER + " ") * (2 + characters // len(_FILLER))
        before = int(wanted * characters)
        text = "\n".join([_TASK, endless[:before], needle, endless[: characters - before]])
        token_ids = _ids(plan.tokenizer, text)
        if len(token_ids) <= tokens:
            depth = text.index(needle) / len(text)
            asked = _question(names[0], _QUESTION, (value,), depth, needle, plan.answer_tokens)
            return Context(token_ids=token_ids, questions=[asked])
        characters -= max(1, int((len(token_ids) - tokens) / len(token_ids) * characters))
    raise ValueError(
        f"context_tokens is {tokens + SPARE_TOKENS}; the pass key's sentences need at least "
        f"{fixed + SPARE_TOKENS + sample // 32}"
    )


def _niah(plan: Plan, tokens: int, number: int, names: list[str]) -> Context:
    """Named keys in a text, each asked for; the others are its distractors."""
    document = make_document(
        plan.haystack,
        plan.tokenizer,
        context_tokens=tokens,
        num_keys=plan.keys_per_context,
        seed=plan.seed + number,
    )
    questions = [
        _question(name, key.question, (key.digits,), key.depth, key.needle.strip(), plan.answer_tokens)
        for name, key in zip(names, document.pass_keys, strict=False)
    ]
    return Context(token_ids=document.token_ids.tolist(), questions=questions)


def _multivalue(plan: Plan, tokens: int, number: int, names: list[str]) -> Context:
    """Names that stand in several places, each time with another value; all of them are asked for."""
    count = len(names) * VALUES_PER_KEY
    seed, room = plan.seed + number, tokens
    while True:
        document = make_document(
            plan.haystack, plan.tokenizer, context_tokens=room, num_keys=count, seed=seed
        )
        text = plan.tokenizer.decode(document.token_ids)
        found = document.pass_keys
        for index, key in enumerate(found):
            text = text.replace(key.needle, key.needle.replace(key.key, found[index % len(names)].key), 1)
        token_ids = _ids(plan.tokenizer, text)
        if len(token_ids) <= tokens:
            break
        # other names may take more tokens
        room -= len(token_ids) - tokens
    questions = []
    # a whole sentence with the first number has room for the others, which follow it without one
    max_tokens = max(ANSWER_TOKENS * VALUES_PER_KEY, plan.answer_tokens)
    for index, name in enumerate(names):
        same = found[index :: len(names)]
        needles = [key.needle.strip().replace(key.key, same[0].key) for key in same]
        text = _VALUES_QUESTION.format(count=len(same), key=same[0].key)
        values = tuple(key.digits for key in same)
        questions.append(_question(name, text, values, None, "\n".join(needles), max_tokens))
    return Context(token_ids=token_ids, questions=questions)


def _hard(kind: str) -> Callable[[Plan, int, int, list[str]], Context]:
    """The builder of a task whose facts are hard to tell apart."""

    def build(plan: Plan, tokens: int, number: int, names: list[str]) -> Context:
        """Context `number` of `tokens` tokens, a question for each name; ValueError where they have no room."""
        wording = plan.wording or wording_for(plan.tokenizer)
        # a question with instructions inside of a chat template may be longer than the spare tokens
        longer = max(0, wording.reserved_tokens(plan.tokenizer) - SPARE_TOKENS)
        made = build_context(
            kind,
            plan.haystack,
            plan.tokenizer,
            wording,
            context_tokens=tokens - longer,
            count=plan.keys_per_context,
            seed=plan.seed,
            number=number,
            held_out=True,
        )
        questions = [
            _question(
                name,
                wording.question.format(key=asked.key),
                (asked.fact.value,) if asked.fact else (wording.no_answer.strip(),),
                made.depth(asked),
                # what an answer is right by, or what is no reason for one
                "\n".join(fact.sentence.strip() for fact in ([asked.fact] if asked.fact else asked.others)),
                wording.answer_tokens,
            )
            for name, asked in zip(names, made.asked, strict=False)
        ]
        return Context(token_ids=made.token_ids, questions=questions)

    return build


def first_number_is(answer: str, expected: tuple[str, ...]) -> bool:
    """Whether the first whole number of an answer is the expected one."""
    match = re.search(r"\d+", answer)
    return bool(match) and match[0] == expected[0]


def all_numbers_in(answer: str, expected: tuple[str, ...]) -> bool:
    """Whether every expected number stands in an answer as a whole number."""
    return set(expected) <= set(re.findall(r"\d+", answer))


def states_absence(answer: str) -> bool:
    """Whether an answer says that the document does not hold what was asked for."""
    return bool(_ABSENCE.search(answer))


def only_states_absence(answer: str, expected: tuple[str, ...]) -> bool:
    """Whether an answer states absence and gives no number, of the document or another one."""
    return states_absence(answer) and not re.search(r"\d", answer)


TASKS = {
    task.name: task
    for task in (
        Task(name="passkey", build=_passkey, score=first_number_is, shares_context=False),
        Task(name="niah", build=_niah, score=first_number_is),
        Task(name="multivalue", build=_multivalue, score=all_numbers_in),
        Task(name="distractors", build=_hard("distractors"), score=first_number_is),
        Task(name="corrections", build=_hard("corrections"), score=first_number_is),
        Task(name="absent", build=_hard("absent"), score=only_states_absence),
    )
}


def _question(
    name: str, text: str, expected: tuple[str, ...], depth: float | None, quote: str, max_tokens: int
) -> Question:
    return Question(
        id=name,
        text=text,
        expected=expected,
        depth=None if depth is None else round(depth, 4),
        quote=quote,
        max_tokens=max_tokens,
    )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _token_count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(_ids(tokenizer, text))
