"""Pass-key retrieval: how many keys hidden in a long text does a model find?

Every context hides its keys evenly over its depth and every key is asked for on its own, right after the
context. Exact match of all five digits is the metric (after Mohtashami and Jaggi, arXiv 2305.16300, with
many keys per context instead of one, so that a model also has to tell them apart).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ic_model import ICForCausalLM
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ic_train.data.passkey import ANSWER, PassKey, hide_pass_keys, parse_answer
from ic_train.evaluation.generation import CachedContext

# room for a question and its answer in any tokenizer; a byte-level one needs 49
_SPARE_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A text of an exact number of tokens with pass keys in it."""

    token_ids: torch.Tensor
    pass_keys: list[PassKey]


def make_document(
    haystack: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_tokens: int,
    num_keys: int,
    seed: int,
    spare_tokens: int = 0,
) -> Document:
    """Cut a haystack to length and hide pass keys in it.

    The text starts at a random place of the haystack and wraps around at its end.

    Args:
        haystack: text; repeated where it is too short.
        tokenizer: the model's.
        context_tokens: length of the result in tokens, needles included.
        num_keys: pass keys to hide.
        seed: of the place, the keys and their depths.
        spare_tokens: that the caller keeps free behind it, for the message.

    Raises:
        ValueError: the keys alone are longer than the context.
    """
    rng = np.random.default_rng(seed)
    start = int(rng.integers(len(haystack)))
    # the keys depend on the seed alone, so their length can be taken before the text is known
    _, keys = hide_pass_keys("\n" * num_keys, num_keys, seed)
    needle_tokens = sum(_token_count(tokenizer, key.needle) for key in keys)
    if needle_tokens >= context_tokens:
        raise ValueError(
            f"context_tokens is {context_tokens + spare_tokens}; {num_keys} pass keys alone need {needle_tokens} "
            + (f"tokens, and question and answer {spare_tokens}" if spare_tokens else "tokens")
        )
    text = text_of(haystack, tokenizer, context_tokens - needle_tokens, start=start)
    hidden, pass_keys = hide_pass_keys(text, num_keys, seed)
    return Document(token_ids=torch.tensor(_ids(tokenizer, hidden)), pass_keys=pass_keys)


def hide_passages(
    haystack: str,
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[str],
    *,
    before: str = "",
    context_tokens: int,
    seed: int,
) -> tuple[list[int], list[float]]:
    """Cut a haystack to length and hide passages in it, one in each of as many equal parts.

    Args:
        haystack: text; repeated where it is too short. Special tokens that it spells out stay text.
        tokenizer: the model's.
        passages: in order of depth; an empty one leaves its part as it is.
        before: precedes the text; special tokens that it spells out are special tokens.
        context_tokens: most tokens of the result; a tokenizer that joins words over a passage's ends may leave
            a few unused.
        seed: of the place in the haystack, and of the passages' places in their parts.

    Returns:
        token ids, and the depth of each passage in the text.

    Raises:
        ValueError: the passages alone are longer than the context.
    """
    start = int(np.random.default_rng(seed).integers(len(haystack)))
    first_ids = tokenizer(before, add_special_tokens=False, verbose=False)["input_ids"]
    fixed_tokens = len(first_ids) + sum(_token_count(tokenizer, passage) for passage in passages)
    room = context_tokens - fixed_tokens
    while room >= len(passages):
        text = text_of(haystack, tokenizer, room, start=start)
        hidden, places = hide_pass_keys(text, len(passages), seed)
        for place, passage in zip(places, passages, strict=True):
            hidden = hidden.replace(place.needle, passage, 1)
        token_ids = [*first_ids, *_ids(tokenizer, hidden)]
        if len(token_ids) <= context_tokens:
            return token_ids, [place.depth for place in places]
        room -= len(token_ids) - context_tokens
    raise ValueError(
        f"context_tokens is {context_tokens}; what is hidden there alone needs "
        f"{fixed_tokens + len(passages)} tokens: ask for fewer keys per context, or give a longer one"
    )


def evaluate_passkey(
    model: ICForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    haystack: str,
    *,
    context_tokens: int,
    num_contexts: int,
    keys_per_context: int,
    seed: int,
    chunk_tokens: int = 0,
) -> Iterator[dict[str, Any]]:
    """Ask for every key of every context; yields one sample per key, with a progress bar.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: the model's.
        haystack: text to hide the keys in.
        context_tokens: length of each context in tokens, the question and its answer included.
        num_contexts: contexts, each with its own stretch of text and its own keys.
        keys_per_context: keys per context.
        seed: of the first context; the others follow.
        chunk_tokens: see CachedContext.

    Yields:
        `context, document_tokens, depth, key, expected, answer, correct, prefill_s`; `document_tokens` is the
        exact length of the document, without question and answer.
    """
    new_tokens = _token_count(tokenizer, ANSWER.format(digits="00000"))
    bar = tqdm(total=num_contexts * keys_per_context, desc=f"{context_tokens} tokens", unit="key")
    correct = 0
    for context in range(num_contexts):
        document = make_document(
            haystack,
            tokenizer,
            context_tokens=context_tokens - _SPARE_TOKENS,
            num_keys=keys_per_context,
            seed=seed + context,
            spare_tokens=_SPARE_TOKENS,
        )
        started = time.perf_counter()
        with CachedContext(
            model, document.token_ids, spare_tokens=_SPARE_TOKENS, chunk_tokens=chunk_tokens
        ) as cached:
            _wait_for(model.device)
            prefill_s = time.perf_counter() - started
            for pass_key in document.pass_keys:
                question = tokenizer(pass_key.question, return_tensors="pt", add_special_tokens=False)
                answer = tokenizer.decode(cached.greedy(question["input_ids"][0], new_tokens))
                found = parse_answer(answer) == pass_key.digits
                correct += found
                bar.update()
                bar.set_postfix(correct=correct)
                yield {
                    "context": context,
                    "document_tokens": len(document.token_ids),
                    "depth": round(pass_key.depth, 4),
                    "key": pass_key.key,
                    "expected": pass_key.digits,
                    "answer": answer,
                    "correct": found,
                    "prefill_s": round(prefill_s, 3),
                }
    bar.close()


def wilson_interval(correct: float, total: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927), which unlike the normal one is right near 1."""
    z = 1.959964
    share = correct / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return centre - half, centre + half


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # a haystack about language models spells out their end of text
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return ids["input_ids"]


def _token_count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(_ids(tokenizer, text))


def text_of(haystack: str, tokenizer: PreTrainedTokenizerBase, tokens: int, *, start: int = 0) -> str:
    """The part of the endlessly repeated haystack that has `tokens` tokens.

    Args:
        haystack: text, not empty.
        tokenizer: the model's.
        tokens: length of the result.
        start: character of the haystack that the part starts with.
    """
    sample = _stretch(haystack, start, min(10_000, len(haystack)))
    tokens_per_character = _token_count(tokenizer, sample) / len(sample)
    characters = int(tokens / tokens_per_character * 1.1) + 1_000
    while True:
        text = _stretch(haystack, start, characters)
        ids = _ids(tokenizer, text)
        if len(ids) >= tokens:
            # a cut through a character decodes to replacement characters: better a token short than garbage
            return tokenizer.decode(ids[:tokens]).rstrip("\ufffd")
        characters *= 2


def _stretch(haystack: str, start: int, characters: int) -> str:
    """Characters of the endlessly repeated haystack; only they are copied."""
    pieces = [haystack[start : start + characters]]
    missing = characters - len(pieces[0])
    pieces += [haystack] * (missing // len(haystack)) + [haystack[: missing % len(haystack)]]
    return "".join(pieces)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
