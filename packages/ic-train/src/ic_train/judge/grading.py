"""Put answers to a judge: scores against a reference, and pairs in both orders.

A judge sees the question, the reference, the answer and the quoted passage; never the context.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ic_train.evaluation.client import Client, ServerError, run_bounded
from ic_train.evaluation.records import Records
from ic_train.judge.prometheus import (
    absolute_messages,
    merged,
    parse_choice,
    parse_score,
    relative_messages,
)

# 2,000 tokens: a judge of 8k tokens still has room for two answers and its feedback
MAX_QUOTE_CHARACTERS = 8_000
_FIELDS = ("question", "reference", "answer")
UNPARSABLE = "unparsable"
# how the system's text reaches a judge: as a message of its own, or before the user's
SEPARATE, MERGED = "separate", "merged"
# how servers say that a chat template knows no system's message
_ROLES = re.compile(r"\b(?:system|roles?)\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What a judge may know about a question.

    Args:
        id: of the question.
        question: as it was asked.
        reference: the right answer.
        quote: the passages of the document that hold the answer; may be empty.
    """

    id: str
    question: str
    reference: str
    quote: str

    @property
    def instruction(self) -> str:
        """The question with its passage, as the judge reads it."""
        return (
            f"{self.question}\n\nInput (quoted from the document):\n{self.quote}"
            if self.quote
            else self.question
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One judgement: its id, what is sent, and how the verdict is read."""

    id: str
    messages: list[dict[str, str]]
    parse: Callable[[str], int | str | None]

    @property
    def digest(self) -> str:
        """Of all that is asked: a judgement of an answer is none of the answer that took its place."""
        return hashlib.sha256(json.dumps(self.messages).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """A judge behind a server.

    Args:
        client: the server.
        model: its name there.
        rubric: see `load_rubric`.
        max_tokens: of feedback and verdict.
        concurrency: most judgements at a time.
    """

    client: Client
    model: str
    rubric: Mapping[str, str]
    max_tokens: int
    concurrency: int

    def absolute(self, name: str, case: Case, answer: str) -> Request:
        """A request for a score from 1 to 5."""
        messages = absolute_messages(
            instruction=case.instruction, response=answer, reference=case.reference, rubric=self.rubric
        )
        return Request(id=name, messages=messages, parse=parse_score)

    def pair(self, name: str, case: Case, first: str, second: str) -> tuple[Request, Request]:
        """Requests for the better of two answers, in both orders: `<name>/ab` and `<name>/ba`."""

        def ask(order: str, a: str, b: str) -> Request:
            messages = relative_messages(
                instruction=case.instruction,
                response_a=a,
                response_b=b,
                reference=case.reference,
                rubric=self.rubric,
            )
            return Request(id=f"{name}/{order}", messages=messages, parse=parse_choice)

        return ask("ab", first, second), ask("ba", second, first)

    async def grade(
        self, requests: Iterable[Request], records: Records, done: Callable[[], Any], *, system: str | None
    ) -> str:
        """Ask for every judgement that the records lack; unparsable ones are kept with verdict None.

        Asking again would not help: at temperature 0 the same text comes back.

        Args:
            requests: judgements.
            records: gets `id, verdict, text, asked, system` as soon as each is there; `asked` is a digest.
            done: called after each.
            system: SEPARATE or MERGED; None finds out, by the first request, which of them the server takes.

        Returns:
            how the system's text was sent.

        Raises:
            ServerError: the server gave up; what was judged is kept.
        """
        how = system or SEPARATE

        async def ask(request: Request) -> None:
            messages = request.messages if how == SEPARATE else merged(request.messages)
            text = await self.client.chat(self.model, messages, max_tokens=self.max_tokens)
            made = {"id": request.id, "verdict": request.parse(text), "text": text}
            records.append({**made, "asked": request.digest, "system": how})
            done()

        missing = [request for request in requests if request.id not in records.by_id]
        if system is None and missing:
            # alone: what the server says to it holds for all
            first = missing.pop(0)
            try:
                await ask(first)
            except ServerError as error:
                if error.status != 400 or not _ROLES.search(str(error)):
                    raise
                print(f"{error}\nThe system's text is sent with the user's from here on.", file=sys.stderr)
                how = MERGED
                await ask(first)
        jobs = ((lambda request=request: ask(request)) for request in missing)
        await run_bounded(jobs, concurrency=self.concurrency)
        return how


def held_system(records: Records) -> str | None:
    """How the system's text was sent for judgements that are there; None where there are none."""
    # earlier versions knew one way and did not note it
    return next((record.get("system", SEPARATE) for record in records.by_id.values()), None)


def require_unchanged(path: Path, records: Mapping[str, dict[str, Any]], requests: Iterable[Request]) -> None:
    """Refuse judgements of what has changed since.

    Args:
        path: of the records, for the message.
        records: by id; those of earlier versions have no digest: their settings hold the answers' files.
        requests: as they would be asked now.

    Raises:
        ValueError: a judgement is of another question, reference, answer or quote.
    """
    for request in requests:
        held = records.get(request.id, {}).get("asked", request.digest)
        if held != request.digest:
            raise ValueError(
                f"{path} has a judgement of {request.id}, whose question, reference, answer or quote was another "
                "then; move the folder away, or give another --out"
            )


def outcome(records: Mapping[str, dict[str, Any]], name: str) -> str:
    """What the two orders of a pair say: "first", "second", "flip" (a tie), or "unparsable".

    A flip is a judge that names the same place in both orders.
    """
    ab, ba = (records[f"{name}/{order}"]["verdict"] for order in ("ab", "ba"))
    if ab is None or ba is None:
        return UNPARSABLE
    if ab == ba:
        return "flip"
    return "first" if ab == "A" else "second"


def read_cases(path: Path, records: Mapping[str, dict[str, Any]]) -> dict[str, Case]:
    """The cases of an answers file, as `ic-train evaluate` writes it; perplexity records have none.

    Args:
        path: of the file, for messages.
        records: its records.

    Raises:
        ValueError: a record lacks a field, its quote is too long for a judge, or there is no case.
    """
    cases = {}
    for name, record in records.items():
        if record.get("task") == "perplexity":
            continue
        for field in _FIELDS:
            if not isinstance(record.get(field), str):
                raise ValueError(
                    f"{path}: {name} has {field} {record.get(field)!r}; a judge needs it as text"
                )
        quote = record.get("quote") or ""
        if len(quote) > MAX_QUOTE_CHARACTERS:
            raise ValueError(
                f"{path}: the quote of {name} has {len(quote)} characters; a judge reads passages of at most "
                f"{MAX_QUOTE_CHARACTERS}, not contexts"
            )
        cases[name] = Case(id=name, question=record["question"], reference=record["reference"], quote=quote)
    if not cases:
        raise ValueError(f"{path} has no answers")
    return cases
