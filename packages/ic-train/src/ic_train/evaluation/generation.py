"""Ask many questions about one long context that is read once.

Letters: B batch (here 1), S context tokens.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch
from ic_model import ICForCausalLM, LatentCache


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
