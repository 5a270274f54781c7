"""RULER as a suite: which of its tasks are asked, how long their prompts are, one sample at a time."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ic_train.evaluation.fitting import fit_units
from ic_train.evaluation.records import hold_settings
from ic_train.evaluation.ruler_tasks import (
    RULER,
    RULER_FILES,
    RULER_TASKS,
    Prompt,
    RulerPlan,
    RulerTask,
    library,
    ruler_settings,
    seeded,
)
from ic_train.evaluation.tasks import Context, Question

# samples of a length differ by this much, as their keys and values do; the size is found once for all of them
_SLACK_TOKENS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class RulerQuestion(Question):
    """A question whose context is the whole prompt; `asked` is its last sentence, for the record."""

    asked: str


def ruler_suites(names: Sequence[str], data: dict[str, Path]) -> list[str]:
    """Suites with `ruler` replaced by all its tasks for which the data is there.

    Args:
        names: of suites.
        data: files by option.

    Raises:
        ValueError: a task needs a file that was not given, or does not exist.
    """
    for option, path in data.items():
        if not path.is_file():
            raise ValueError(f"--{option} is {str(path)!r}, which does not exist")
    chosen: list[str] = []
    for name in names:
        own = [task.name for task in RULER_TASKS.values() if task.data is None or task.data in data]
        chosen += own if name == RULER else [name]
        task = RULER_TASKS.get(name)
        if task and task.data and task.data not in data:
            raise ValueError(
                f"--suite has {name}; give its data as --{task.data} FILE ({RULER_FILES[task.data]})"
            )
    used = {RULER_TASKS[name].data for name in chosen if name in RULER_TASKS}
    if idle := [option for option in data if option not in used]:
        raise ValueError(f"--{idle[0]} is given; it has no effect without --suite {RULER}")
    return list(dict.fromkeys(chosen))


def left_out(names: Sequence[str], data: dict[str, Path]) -> str:
    """What `ruler` in a list of suites does not ask, and what it needs; empty where nothing is left out."""
    missing = [task for task in RULER_TASKS.values() if task.data and task.data not in data]
    if RULER not in names or not missing:
        return ""
    parts = [f"{task.name} (--{task.data} FILE: {RULER_FILES[task.data or '']})" for task in missing]
    return f"not asked, for want of data: {', '.join(parts)}\n"


def ruler_ids(task: RulerTask, plan: RulerPlan, context_tokens: int) -> list[str]:
    """The ids of a task's samples at a length."""
    return [f"{task.name}-{context_tokens}-{number}" for number in range(plan.num_questions)]


def ruler_contexts(
    task: RulerTask, plan: RulerPlan, context_tokens: int, wanted: Callable[[str], bool]
) -> Iterator[Context]:
    """The wanted samples of a task, made one at a time: a context with one question each.

    Args:
        task: one of RULER_TASKS.
        plan: the run's.
        context_tokens: length of each prompt with its answer.
        wanted: whether the sample of an id is to be asked.

    Raises:
        ValueError: a sample does not fit; `check_ruler` finds lengths that none does.
    """
    units: tuple[int, float] | None = None
    for number, name in enumerate(ruler_ids(task, plan, context_tokens)):
        if not wanted(name):
            continue
        if units is None:
            # by the first sample, whichever is the first that is wanted: an interrupted run goes on with this size
            units = fit_units(
                lambda count: len(_made(task, plan, context_tokens, 0, count)[1]),
                goal_tokens=context_tokens - task.answer_tokens - _SLACK_TOKENS,
                least=task.least,
                most=task.most(plan),
            )
            # it holds the texts of all sizes
            library().prepare_niah.cached_sent_tokenize.cache_clear()
        yield _sample(task, plan, context_tokens, number, *units)


def hold_ruler_settings(folder: Path, plan: RulerPlan) -> None:
    """Keep what decides RULER's prompts beside the settings of the run; tasks may be added to a run later.

    Raises:
        ValueError: the folder holds a run with other settings, or lm-eval is not there.
    """
    hold_settings(folder, ruler_settings(plan), file="ruler.json")
    for name, path in plan.data.items():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        hold_settings(folder, {name: digest}, file=f"ruler-{name}.json")


def check_ruler(
    plan: RulerPlan, names: Iterable[str], lengths_tokens: Sequence[int], *, optional: Collection[str] = ()
) -> dict[tuple[str, int], str]:
    """Refuse what cannot be asked, before anything is.

    Args:
        plan: the run's.
        names: of suites; those that are not of RULER are passed over.
        lengths_tokens: contexts with their answers.
        optional: names that nobody asked for one by one; a length that they do not take is left out.

    Returns:
        why a task is left out, by its name and the length.

    Raises:
        ValueError: lm-eval is not there; a length has no room for a task, or a task not enough text for a length;
            there are fewer questions than asked for.
    """
    left_out_at: dict[tuple[str, int], str] = {}
    for task in (RULER_TASKS[name] for name in names if name in RULER_TASKS):
        if task.data and len(plan.questions(task.data)[0]) < plan.num_questions:
            count = len(plan.questions(task.data)[0])
            raise ValueError(f"--questions is {plan.num_questions}; --{task.data} has {count} of them")
        for tokens in lengths_tokens:
            shortest, longest = _taken_tokens(task, plan, tokens)
            if shortest <= tokens and (longest is None or tokens <= longest):
                continue
            takes = f"with this model takes from {shortest} {f'to {longest}' if longest else 'on'}"
            if task.name not in optional:
                raise ValueError(
                    f"--lengths has {tokens}; {task.name} {takes}: leave out the length, or the task"
                )
            left_out_at[task.name, tokens] = takes
    return left_out_at


def _taken_tokens(task: RulerTask, plan: RulerPlan, context_tokens: int) -> tuple[int, int | None]:
    """The shortest length that has room for every sample, and the longest that there is text for."""
    # only documents differ by more than the slack, with which the first sample gives the size of all
    numbers = range(plan.num_questions if task.data else 1)
    least = [len(_made(task, plan, context_tokens, number, task.least)[1]) for number in numbers]
    shortest = max(least[0] + _SLACK_TOKENS, *least) + task.answer_tokens
    most = task.most(plan)
    if most is None:
        return shortest, None
    return shortest, len(_made(task, plan, context_tokens, 0, most)[1]) + task.answer_tokens + _SLACK_TOKENS


def _made(
    task: RulerTask, plan: RulerPlan, context_tokens: int, number: int, units: int
) -> tuple[Prompt, list[int]]:
    """A sample with so many units, and its token ids."""
    with seeded(f"{plan.seed}/{task.name}/{context_tokens}/{number}"):
        prompt = task.build(plan, context_tokens, units, number)
    return prompt, plan.ids(prompt.text + task.delimiter + prompt.answered)


def _sample(
    task: RulerTask, plan: RulerPlan, context_tokens: int, number: int, units: int, tokens_per_unit: float
) -> Context:
    """One sample, with fewer units where it is too long."""
    name, limit = ruler_ids(task, plan, context_tokens)[number], context_tokens - task.answer_tokens
    prompt, ids = _made(task, plan, context_tokens, number, units)
    while len(ids) > limit:
        if units <= task.least:
            raise ValueError(
                f"--lengths has {context_tokens}; {name} alone needs {len(ids) + task.answer_tokens}"
            )
        units = max(task.least, units - math.ceil((len(ids) - limit) / tokens_per_unit))
        prompt, ids = _made(task, plan, context_tokens, number, units)
    only = prompt.outputs[0] if len(prompt.outputs) == 1 else None
    asked = RulerQuestion(
        id=name,
        text="",
        asked=f"{prompt.text.rsplit(chr(10), 1)[-1].strip()}{task.delimiter}{prompt.answered}",
        expected=prompt.outputs,
        depth=round(prompt.text.index(only) / len(prompt.text), 4) if only and not task.data else None,
        quote="\n".join(_quotes(prompt)),
        max_tokens=task.answer_tokens,
    )
    return Context(token_ids=ids, questions=[asked])


def _quotes(prompt: Prompt) -> list[str]:
    """The needles and assignments that hold the answer; tasks that count words, and documents, have none."""
    wanted = "|".join(map(re.escape, prompt.outputs))
    needles = re.findall(rf"One of the special magic \w+ for \S+ is: (?:{wanted})\.", prompt.text)
    return needles or re.findall(rf"VAR (?:{wanted}) = (?:VAR )?\w+", prompt.text)
