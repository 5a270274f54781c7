"""Questions to a running server, through the OpenAI-compatible API."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import openai
from ic_train.data.passkey import QUESTION

from demo.document import Document
from demo.progress import Progress, ticking
from demo.server import Server

PASS_KEY_ANSWER_TOKENS = 8
OWN_ANSWER_TOKENS = 64
_PASS_KEY_QUESTION = re.compile(r"(?:.*\s)?pass key for (?P<key>\w+)\s*\?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """An answer, and what it took.

    Args:
        text: without the space before it.
        prompt_tokens: document and question, as the server counted them.
        seconds: from request to answer.
    """

    text: str
    prompt_tokens: int
    seconds: float


def own_prompt(question: str) -> str:
    """A user's question as it is to stand behind the document.

    One for a pass key takes exactly the form that the embedded model was trained on.
    """
    pass_key = _PASS_KEY_QUESTION.fullmatch(question.strip())
    return QUESTION.format(key=pass_key["key"]) if pass_key else f"\nQuestion: {question.strip()} Answer:"


def shown(prompt: str) -> str:
    """What to show of a question: its words, without the frame that the model wants around them."""
    return prompt.strip().removeprefix("Question: ").split(" Answer:")[0]


class Reader:
    """Puts questions about one document to a server.

    Args:
        server: a healthy one.
        document: sent in front of every question; the server keeps what it has read of it.
        timeout_s: most for one request.
    """

    def __init__(self, server: Server, document: Document, *, timeout_s: float) -> None:
        self._server = server
        self._document = document
        self._timeout_s = timeout_s
        # the server asks for no key, but the client insists on one
        self._client = openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", timeout=timeout_s, max_retries=0
        )
        (card,) = self._client.models.list().data
        self._model = card.id
        # vLLM's addition to the model card
        self.context_tokens: int = (card.model_extra or {})["max_model_len"]

    def read(self, progress: Progress) -> Answer:
        """Have the server read the document, before any question."""
        return self._complete(self._document.text, 1, progress, f"{self._document.tokens:,} tokens sent")

    def ask(self, question: str, answer_tokens: int, progress: Progress) -> Answer:
        """Ask one question, as it is to stand behind the document.

        Raises:
            ServerError: the server died, or took too long.
        """
        return self._complete(self._document.text + question, answer_tokens, progress, shown(question))

    def _complete(self, prompt: str, answer_tokens: int, progress: Progress, doing: str) -> Answer:
        started = time.monotonic()
        try:
            with ticking(lambda: doing, progress):
                completion = self._client.completions.create(
                    model=self._model, prompt=prompt, temperature=0, max_tokens=answer_tokens, stop="\n"
                )
        except openai.APITimeoutError:
            raise self._server.failure(
                f"no answer after {self._timeout_s:.0f} s; --timeout SECONDS gives it longer"
            ) from None
        except openai.APIConnectionError as error:
            self._server.check_alive()
            raise self._server.failure(f"the connection to the server broke: {error}") from None
        except openai.APIStatusError as error:
            raise self._server.failure(f"the server refused the request: {error}") from None
        assert completion.usage is not None
        return Answer(
            text=completion.choices[0].text.strip(),
            prompt_tokens=completion.usage.prompt_tokens,
            seconds=time.monotonic() - started,
        )
