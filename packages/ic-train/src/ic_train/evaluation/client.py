"""Questions to any OpenAI-compatible server: bounded in number, in time and in retries."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

APIS = ("completions", "chat")
# between tries after an answer that is no JSON; doubles
_FIRST_PAUSE_S = 0.5


class ServerError(RuntimeError):
    """A server gave no usable answer after all retries.

    Args:
        message: what happened.
        status: of HTTP, where the server refused.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """What a server says about a model.

    Args:
        name: to ask for it by.
        max_tokens: the longest context with question and answer; None where the server does not say.
        engine: who runs it, as "vllm"; "server" where it does not say.
    """

    name: str
    max_tokens: int | None
    engine: str


class Client:
    """An OpenAI-compatible server.

    429, 5xx, time-outs and lost connections are retried by the `openai` package, which backs off and keeps to
    Retry-After, but does not try again where that is more than two minutes; answers that are no JSON or have no
    text, here.

    Args:
        url: base URL, as `http://host:8000/v1`; `/v1` is added where the path is empty.
        timeout_s: of one try.
        retries: tries after the first.
        api_key: any text for servers that ask for none.
    """

    def __init__(self, url: str, *, timeout_s: float = 600, retries: int = 5, api_key: str = "none") -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--server is {url!r}; it must start with http:// or https://")
        self.url = url.rstrip("/")
        if self.url.count("/") == 2:
            self.url += "/v1"
        # takes a second, which commands that ask no server are to be spared
        import openai

        self._retries = retries
        self._openai = openai.AsyncOpenAI(
            base_url=self.url, api_key=api_key, timeout=timeout_s, max_retries=retries
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._openai.close()

    async def served_model(self, name: str | None = None) -> ServedModel:
        """What the server says about a model.

        Args:
            name: None for the only one that it serves.

        Raises:
            ValueError: it does not serve that model, or name is None and it serves several.
            ServerError: it gave no usable answer.
        """
        models = await self._try(self._openai.models.list, lambda page: list(page.data))
        names = [model.id for model in models]
        if (name not in names) if name else (len(names) != 1):
            raise ValueError(f"model is {name!r}; {self.url} serves {', '.join(names) or 'none'}")
        model = models[names.index(name) if name else 0]
        owner = getattr(model, "owned_by", None)
        return ServedModel(
            name=model.id, max_tokens=getattr(model, "max_model_len", None), engine=owner or "server"
        )

    async def complete(self, model: str, prompt: list[int], *, max_tokens: int) -> str:
        """The greedy continuation of token ids.

        Raises:
            ServerError: no usable answer after all retries.
        """
        return await self._try(
            # as a parameter the package would copy it id by id: seconds for each question about a long context
            lambda: self._openai.completions.create(
                model=model, prompt="", max_tokens=max_tokens, temperature=0, extra_body={"prompt": prompt}
            ),
            lambda answer: _text(answer.choices[0].text),
        )

    async def chat(self, model: str, messages: list[dict[str, str]], *, max_tokens: int) -> str:
        """The greedy answer to messages.

        Raises:
            ServerError: no usable answer after all retries.
        """
        chosen: Any = messages
        return await self._try(
            lambda: self._openai.chat.completions.create(
                model=model, messages=chosen, max_tokens=max_tokens, temperature=0
            ),
            # null is what a server sends where the model said nothing
            lambda answer: _text(answer.choices[0].message.content or ""),
        )

    async def _try(self, send: Callable[[], Awaitable[Any]], pick: Callable[[Any], Any]) -> Any:
        import openai

        problem: Exception | None = None
        for attempt in range(self._retries + 1):
            try:
                return pick(await send())
            except openai.APIStatusError as error:
                wait = error.response.headers.get("Retry-After")
                asked = f" (Retry-After: {wait})" if wait else ""
                raise ServerError(
                    f"{self.url} answered {error.status_code}{asked}: {error.message}",
                    status=error.status_code,
                ) from error
            except openai.APIConnectionError as error:
                raise ServerError(f"{self.url} does not answer: {error.__cause__ or error}") from error
            # what came is no JSON, or has not the fields of an answer
            except (ValueError, TypeError, AttributeError, IndexError, openai.OpenAIError) as error:
                problem = error
            if attempt < self._retries:
                await asyncio.sleep(min(_FIRST_PAUSE_S * 2**attempt, 8))
        raise ServerError(
            f"{self.url} gave no usable answer in {self._retries + 1} tries; the last one: {problem}"
        ) from problem


async def run_bounded(jobs: Iterable[Callable[[], Awaitable[None]]], *, concurrency: int) -> None:
    """Run jobs, at most `concurrency` at a time; after a failure no new one starts, and those that run may end.

    Raises:
        ServerError: the first failure.
    """
    waiting = iter(jobs)
    failures: list[ServerError] = []

    async def work() -> None:
        for job in waiting:
            if failures:
                return
            try:
                await job()
            except ServerError as error:
                failures.append(error)

    await asyncio.gather(*(work() for _ in range(concurrency)))
    if failures:
        raise failures[0]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"the answer's text is {value!r}")
    return value
