"""Who answers: a model in this process, or a server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ic_train.evaluation.client import Client, ServedModel, run_bounded
from ic_train.evaluation.generation import PrefixReader
from ic_train.evaluation.tasks import Context, Question

Answered = Callable[[Question, str], None]
AnsweredIn = Callable[[Context, Question, str], None]


class Engine(Protocol):
    """Answers the questions of a context, and hands over each answer as soon as it is there."""

    async def ask(self, context: Context, answered: Answered) -> None:
        """Ask all questions of a context."""

    async def ask_each(self, contexts: Iterable[Context], answered: AnsweredIn) -> None:
        """Ask all questions of contexts that have no start in common."""


class InProcess:
    """A model of transformers.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: the model's.
        chunk_tokens: see CachedContext.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, chunk_tokens: int = 0
    ) -> None:
        self._reader = PrefixReader(model, chunk_tokens=chunk_tokens)
        self._tokenizer = tokenizer

    async def ask(self, context: Context, answered: Answered) -> None:
        """Ask one after the other."""
        for question in context.questions:
            prompt = _prompt(context, question, self._tokenizer)

            def is_over(ids: list[int], stop: str = question.stop) -> bool:
                return bool(stop) and stop in self._text(ids)

            ids = self._reader.complete(prompt, max_tokens=question.max_tokens, is_over=is_over)
            answered(question, self._text(ids))

    async def ask_each(self, contexts: Iterable[Context], answered: AnsweredIn) -> None:
        """Ask one after the other."""
        for context in contexts:
            await self.ask(context, partial(answered, context))

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class Server:
    """A model behind an OpenAI-compatible server.

    Args:
        client: the server.
        model: what it serves.
        tokenizer: the model's; contexts are measured with it.
        api: "completions" sends token ids, so that the server reads the same tokens as a model in this process;
            "chat" sends text as one message of the user.
        concurrency: most questions at a time.
    """

    def __init__(
        self,
        client: Client,
        model: ServedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        api: str = "completions",
        concurrency: int = 16,
    ) -> None:
        self._client = client
        self._model = model
        self._tokenizer = tokenizer
        self._api = api
        self._concurrency = concurrency
        # of all contexts that are asked about together
        self._slots = asyncio.Semaphore(concurrency)

    async def ask(self, context: Context, answered: Answered) -> None:
        """Ask the first question alone, and the others at once: they find the context in the prefix cache."""

        async def ask(question: Question) -> None:
            answered(question, await self._answer(context, question))

        first, *others = context.questions
        await run_bounded([lambda: ask(first)], concurrency=1)
        jobs = ((lambda question=question: ask(question)) for question in others)
        await run_bounded(jobs, concurrency=self._concurrency)

    async def ask_each(self, contexts: Iterable[Context], answered: AnsweredIn) -> None:
        """Ask several at once; a context is made when its turn comes."""

        async def ask(context: Context) -> None:
            for question in context.questions:
                answered(context, question, await self._answer(context, question))

        jobs = ((lambda context=context: ask(context)) for context in contexts)
        await run_bounded(jobs, concurrency=self._concurrency)

    async def _answer(self, context: Context, question: Question) -> str:
        async with self._slots:
            if self._api == "completions":
                prompt = _prompt(context, question, self._tokenizer)
                return await self._client.complete(self._model.name, prompt, max_tokens=question.max_tokens)
            text = self._tokenizer.decode(context.token_ids) + question.text
            messages = [{"role": "user", "content": text}]
            return await self._client.chat(self._model.name, messages, max_tokens=question.max_tokens)


def _prompt(context: Context, question: Question, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return context.token_ids + tokenizer(question.text, add_special_tokens=False)["input_ids"]
