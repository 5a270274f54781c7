"""Ask many questions about one long context that is read once.

Letters: B batch (here 1), S context tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import torch
from ic_model import ICForCausalLM, LatentCache
from transformers import Cache, DynamicCache, PreTrainedModel

# most tokens that are read behind a kept start: more need a mask of their number times the whole context's,
# and then reading everything anew is cheaper
_REREAD_TOKENS = 2048


class CachedContext:
    """A context in a latent cache, to which questions are put one after the other.

    Args:
        model: in evaluation mode.
        context_ids: `[S]` int64 token ids.
        spare_tokens: most tokens of a question and its answer together.
        chunk_tokens: tokens read per forward pass; bounds the memory of the prefill. 0 reads all at once,
            which is fastest: a later chunk needs a mask and expands the cached rows again.
    """

    def __init__(
        self, model: ICForCausalLM, context_ids: torch.Tensor, *, spare_tokens: int, chunk_tokens: int = 0
    ) -> None:
        self.model = model
        self.cache = LatentCache(model.config.num_hidden_layers, len(context_ids) + spare_tokens)
        self.context_tokens = len(context_ids)
        for chunk in context_ids.split(chunk_tokens or len(context_ids)):
            self._forward(chunk)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cache.reset()

    def greedy(self, question_ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
        """The most likely `new_tokens` tokens after a question `[T]`; the context stays as it was."""
        answer = [self._forward(question_ids)]
        for _ in range(new_tokens - 1):
            answer.append(self._forward(answer[-1]))
        self.cache.crop(self.context_tokens - self.cache.get_seq_length())
        return torch.cat(answer)

    @torch.inference_mode()
    def _forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Append tokens `[T]`; the most likely next one, `[1]`."""
        outputs = self.model(
            token_ids[None].to(self.model.device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return outputs.logits[0, -1].argmax(-1, keepdim=True)


class PrefixReader:
    """Greedy answers to prompts; what a prompt shares with the one before it is not read again.

    Args:
        model: any causal language model of transformers, in evaluation mode.
        chunk_tokens: tokens read per forward pass; see CachedContext.
    """

    def __init__(self, model: PreTrainedModel, *, chunk_tokens: int = 0) -> None:
        self._model = model
        self._chunk_tokens = chunk_tokens
        self._cache: Cache | None = None
        self._cached_ids = torch.empty(0, dtype=torch.int64)
        ends = model.generation_config.eos_token_id if model.generation_config else None
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())

    @torch.inference_mode()
    def complete(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        is_over: Callable[[list[int]], bool] = lambda answer: False,
    ) -> list[int]:
        """The most likely continuation, up to the model's end of text, which is left out.

        Args:
            prompt: token ids.
            max_tokens: of the continuation.
            is_over: asked after every token of the continuation, which ends where it says so.
        """
        ids = torch.tensor(prompt)
        kept = _common_tokens(ids, self._cached_ids)
        if self._cache is None or len(ids) - kept > _REREAD_TOKENS:
            kept = 0
            # before the new one is allocated
            self._cache = None
            self._cache = self._new_cache(len(ids) + max_tokens + _REREAD_TOKENS)
        elif kept < len(self._cached_ids):
            self._cache.crop(kept - len(self._cached_ids))
        *chunks, last = ids[kept:].split(self._chunk_tokens or len(ids))
        for chunk in chunks:
            self._forward(chunk)
        token = self._forward(last)
        answer: list[int] = []
        while int(token) not in self._ends:
            answer.append(int(token))
            if len(answer) == max_tokens or is_over(answer):
                break
            token = self._forward(token)
        # the last token was not read where the answer ended without the model's end of text
        self._cached_ids = torch.cat([ids, torch.tensor(answer, dtype=torch.int64)])
        self._cached_ids = self._cached_ids[: self._cache.get_seq_length()]
        return answer

    def _forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        outputs = self._model(
            token_ids[None].to(self._model.device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return outputs.logits[0, -1].argmax(-1, keepdim=True)

    def _new_cache(self, capacity_tokens: int) -> Cache:
        if isinstance(self._model, ICForCausalLM):
            return LatentCache(self._model.config.num_hidden_layers, capacity_tokens)
        return DynamicCache(config=self._model.config)


def _common_tokens(ids: torch.Tensor, cached: torch.Tensor) -> int:
    """Length of the common start, at most all but the last of `ids`: that one is read for its logits."""
    length = min(len(ids) - 1, len(cached))
    different = (ids[:length] != cached[:length]).nonzero()
    return int(different[0]) if len(different) else length
