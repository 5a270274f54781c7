"""One evaluation: every question of every task and length, answered once, and the report of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from ic_train.evaluation.engines import Engine
from ic_train.evaluation.perplexity import (
    perplexity_record,
    perplexity_rows,
    place_texts,
    repetition,
    repetition_note,
)
from ic_train.evaluation.records import Records, hold_settings
from ic_train.evaluation.report import write_report
from ic_train.evaluation.ruler import (
    RulerQuestion,
    check_ruler,
    hold_ruler_settings,
    ruler_contexts,
    ruler_ids,
)
from ic_train.evaluation.ruler_tasks import LM_EVAL_VERSION, RULER, RULER_TASKS, RulerPlan
from ic_train.evaluation.tasks import (
    SPARE_TOKENS,
    TASKS,
    Context,
    Plan,
    Question,
    check_room,
    contexts,
    question_ids,
)

PERPLEXITY = "perplexity"
SUITES = (*TASKS, PERPLEXITY, RULER, *RULER_TASKS)
ANSWERS_FILE = "answers.jsonl"
_SHORTEST_TOKENS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What an evaluation asks, and where it writes.

    Args:
        folder: of answers and report.
        plan: how contexts are made.
        suites: names out of SUITES; tasks of RULER by their own names.
        lengths_tokens: contexts with question and answer.
        texts: stretches of text per length for perplexity.
        labels: `model, engine, kv_dtype`, part of every row.
        settings: what a rerun into the same folder must share.
        ruler: how RULER's prompts are made; None where none of its tasks is asked.
        optional: tasks of RULER that nobody named one by one; lengths that they do not take are left out.
        chunk_tokens: for perplexity; see CachedContext.
    """

    folder: Path
    plan: Plan
    suites: Sequence[str]
    lengths_tokens: Sequence[int]
    texts: int
    labels: dict[str, str]
    settings: dict[str, Any]
    ruler: RulerPlan | None = None
    optional: Collection[str] = ()
    chunk_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A task at a length.

    Args:
        task: its name.
        ids: of all its questions.
        contexts: those that hold wanted questions.
        score: of an answer: right or wrong, or a share.
    """

    task: str
    ids: list[str]
    contexts: Callable[[Callable[[str], bool]], Iterator[Context]]
    score: Callable[[str, tuple[str, ...]], bool | float]


def check_lengths(lengths_tokens: Sequence[int], longest_tokens: int | None, *, source: str) -> None:
    """Refuse lengths that a model does not take.

    Args:
        lengths_tokens: wished.
        longest_tokens: the model's limit; None where nobody knows it.
        source: of the limit, for the message.

    Raises:
        ValueError: a length is too long, or too short for any question.
    """
    for tokens in lengths_tokens:
        if tokens < _SHORTEST_TOKENS or (longest_tokens and tokens > longest_tokens):
            most = f"to {longest_tokens} ({source})" if longest_tokens else "on"
            raise ValueError(f"--lengths has {tokens}; this model takes from {_SHORTEST_TOKENS} {most}")


async def evaluate(run: Run, engine: Engine, model: PreTrainedModel | None = None) -> str:
    """Ask what the folder does not hold yet, then write the report; its Markdown table.

    Args:
        run: what to ask.
        engine: who answers.
        model: for perplexity, which needs one in this process.

    Raises:
        ValueError: a length has no room for a task, the folder holds another run, or its answers cannot be read.
        ServerError: a server gave up; what was answered is kept, and the same call goes on from there.
    """
    assert model is not None or PERPLEXITY not in run.suites
    # before the folder is held: a mistake that is found later could be mended in another folder only
    left_out = _check(run)
    notes = [f"not asked: {suite} at {tokens:,} tokens: {why}" for (suite, tokens), why in left_out.items()]
    print("".join(f"{note}\n" for note in notes), end="", file=sys.stderr)
    hold_settings(run.folder, run.settings)
    if run.ruler:
        hold_ruler_settings(run.folder, run.ruler)
    pairs = [(suite, tokens) for suite in run.suites for tokens in run.lengths_tokens]
    asked = [pair for pair in pairs if pair not in left_out]
    with Records(run.folder / ANSWERS_FILE) as records:
        for suite, tokens in asked:
            if suite == PERPLEXITY:
                _measure_perplexity(run, model, records, tokens)
            else:
                await _ask(_part(run, suite, tokens), engine, records, tokens)
        rows = [row for suite, tokens in asked for row in _rows(run, suite, tokens, records)]
    repeated = [repetition_note(row) for row in rows if row["task"] == PERPLEXITY]
    # a length has a row for each bin
    notes += dict.fromkeys(note for note in repeated if note)
    return write_report(run.folder, rows, seed=run.plan.seed, notes=notes)


def _check(run: Run) -> dict[tuple[str, int], str]:
    """Refuse what could not be asked; what is left out, with the reason."""
    for suite in run.suites:
        if suite in TASKS:
            check_room(TASKS[suite], run.plan, min(run.lengths_tokens))
    if not run.ruler:
        return {}
    left_out = check_ruler(run.ruler, run.suites, run.lengths_tokens, optional=run.optional)
    if len(left_out) == len(run.suites) * len(run.lengths_tokens):
        (suite, tokens), why = next(iter(left_out.items()))
        raise ValueError(f"--lengths has {tokens}; {suite} {why}, and no other task takes it")
    return left_out


def _part(run: Run, suite: str, tokens: int) -> _Part:
    if suite in RULER_TASKS:
        plan, ruler_task = run.ruler, RULER_TASKS[suite]
        assert plan is not None
        return _Part(
            task=suite,
            ids=ruler_ids(ruler_task, plan, tokens),
            contexts=lambda wanted: ruler_contexts(ruler_task, plan, tokens, wanted),
            score=ruler_task.score,
        )
    task = TASKS[suite]
    return _Part(
        task=suite,
        ids=[name for group in question_ids(task, run.plan, tokens) for name in group],
        contexts=lambda wanted: contexts(task, run.plan, tokens, wanted),
        score=task.score,
    )


async def _ask(part: _Part, engine: Engine, records: Records, context_tokens: int) -> None:
    held = [records.by_id[name]["correct"] for name in part.ids if name in records.by_id]
    correct = sum(held)
    description = f"{part.task} {context_tokens}"
    with tqdm(total=len(part.ids), initial=len(held), desc=description, unit="question") as bar:

        def answered(context: Context, question: Question, answer: str) -> None:
            nonlocal correct
            right = part.score(answer, question.expected)
            correct += right
            records.append(_record(part.task, context_tokens, context, question, answer, right))
            bar.update()
            bar.set_postfix(correct=round(correct, 2))

        contexts_left = part.contexts(lambda name: name not in records.by_id)
        if part.task in RULER_TASKS:
            await engine.ask_each(contexts_left, answered)
        else:
            for context in contexts_left:
                await engine.ask(context, partial(answered, context))


def _record(
    task: str, context_tokens: int, context: Context, question: Question, answer: str, right: bool | float
) -> dict[str, Any]:
    return {
        "id": question.id,
        "task": task,
        "context_tokens": context_tokens,
        "document_tokens": len(context.token_ids),
        "depth": question.depth,
        "question": question.asked if isinstance(question, RulerQuestion) else question.text.strip(),
        "reference": ", ".join(question.expected),
        "quote": question.quote,
        "answer": answer,
        "correct": right,
    }


def _measure_perplexity(
    run: Run, model: PreTrainedModel | None, records: Records, context_tokens: int
) -> None:
    assert model is not None
    names = _text_ids(run, context_tokens)
    if all(name in records.by_id for name in names):
        return
    haystack, tokenizer = run.plan.haystack, run.plan.tokenizer
    texts = place_texts(
        haystack, tokenizer, context_tokens=context_tokens, texts=run.texts, seed=run.plan.seed
    )
    row = {"context_tokens": context_tokens, "texts": run.texts, **repetition(texts, len(haystack))}
    if note := repetition_note(row):
        print(f"warning: {note}", file=sys.stderr)
    bar = tqdm(zip(names, texts, strict=True), f"{PERPLEXITY} {context_tokens}", run.texts, unit="text")
    for name, text in bar:
        if name not in records.by_id:
            record = perplexity_record(
                model,
                tokenizer,
                haystack,
                context_tokens=context_tokens,
                name=name,
                start=text.start,
                chunk_tokens=run.chunk_tokens,
            )
            records.append(record)


def _rows(run: Run, suite: str, tokens: int, records: Records) -> list[dict[str, Any]]:
    if suite == PERPLEXITY:
        measured = [records.by_id[name] for name in _text_ids(run, tokens)]
        return [{**run.labels, **row} for row in perplexity_rows(measured)]
    samples = [records.by_id[name] for name in _part(run, suite, tokens).ids]
    made: dict[str, Any] = {"spare_tokens": SPARE_TOKENS}
    if run.ruler and suite in RULER_TASKS:
        made = {
            "spare_tokens": RULER_TASKS[suite].answer_tokens,
            "lm_eval": LM_EVAL_VERSION,
            "haystack": run.ruler.haystack_name,
        }
    return [
        {
            **run.labels,
            "task": suite,
            "context_tokens": tokens,
            "correct": round(sum(sample["correct"] for sample in samples), 6),
            "total": len(samples),
            # a task whose answer has several parts is scored by the share of them
            "shares": any(isinstance(sample["correct"], float) for sample in samples),
            **made,
            "samples": samples,
        }
    ]


def _text_ids(run: Run, context_tokens: int) -> list[str]:
    return [f"{PERPLEXITY}-{context_tokens}-{number}" for number in range(run.texts)]
