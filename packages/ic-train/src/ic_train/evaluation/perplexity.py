"""Perplexity by position: does a model still read well far into a text?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ic_train.evaluation.passkey import text_of

_FIRST_BIN_TOKENS = 1024
# neighbouring tokens are not independent: the interval is that of the means of blocks
_BLOCK_TOKENS = 256
_LOGITS_AT_A_TIME = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """A part of the haystack, which goes on with its start behind its end.

    Args:
        start: its first character.
        characters: that it has; more than the haystack's where it repeats that.
    """

    start: int
    characters: int


def place_texts(
    haystack: str, tokenizer: PreTrainedTokenizerBase, *, context_tokens: int, texts: int, seed: int
) -> list[Stretch]:
    """Where the texts of a length stand: at random places, or, should these overlap, one after the other.

    Args:
        haystack: text.
        tokenizer: the model's.
        context_tokens: length of each text.
        texts: how many.
        seed: of the places.
    """

    def stretch(start: int) -> Stretch:
        return Stretch(start=start, characters=len(text_of(haystack, tokenizer, context_tokens, start=start)))

    size = len(haystack)
    drawn = [stretch(int(np.random.default_rng(seed + number).integers(size))) for number in range(texts)]
    if _times_read(drawn, size) == 1:
        return drawn
    following = drawn[:1]
    while len(following) < texts:
        following.append(stretch((following[-1].start + following[-1].characters) % size))
    return following


def repetition(texts: Sequence[Stretch], haystack_characters: int) -> dict[str, float]:
    """How much the texts of a length repeat.

    Args:
        texts: of a length.
        haystack_characters: of the whole haystack.

    Returns:
        `haystack_share`, the longest text's share of the haystack: above 1 it repeats itself. `times_read`, how
        often the texts read a character that they read, on average: 1 where nothing is read twice.
    """
    longest = max(text.characters for text in texts)
    return {
        "haystack_share": round(longest / haystack_characters, 3),
        "times_read": round(_times_read(texts, haystack_characters), 3),
    }


def repetition_note(row: dict[str, Any]) -> str | None:
    """What a row's repetition means for its perplexity; None where there is none.

    Args:
        row: with `context_tokens`, `texts` and the fields of `repetition`; rows of older runs lack these.
    """
    where = f"perplexity at {row['context_tokens']:,} tokens"
    if row.get("haystack_share", 0) > 1:
        return (
            f"{where}: a text is {row['haystack_share']:g} times the haystack. What lies behind its end the model "
            "reads again, and perplexity falls for that reason: give a longer --haystack"
        )
    if row.get("times_read", 1) > 1:
        return (
            f"{where}: {row['texts']} texts overlap, and what they read is read {row['times_read']:g} times. The "
            "interval takes them as independent and is too narrow: give fewer --texts or a longer --haystack"
        )
    return None


@torch.inference_mode()
def token_losses(model: PreTrainedModel, token_ids: torch.Tensor, *, chunk_tokens: int = 0) -> torch.Tensor:
    """The negative log-likelihood of every token after the first, in nats; logits exist for some at a time.

    Args:
        model: in evaluation mode.
        token_ids: `[S]` int64.
        chunk_tokens: tokens read per forward pass; 0 reads all at once. See CachedContext.

    Returns:
        `[S - 1]` float32 on the CPU.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    cache, losses, read = None, [], 0
    for chunk in token_ids.split(chunk_tokens or len(token_ids)):
        outputs = decoder(chunk[None].to(model.device), past_key_values=cache, use_cache=chunk_tokens > 0)
        cache = outputs.past_key_values
        for part in outputs.last_hidden_state[0].split(_LOGITS_AT_A_TIME):
            # the last token has no next one
            labels = token_ids[read + 1 : read + 1 + len(part)].to(model.device)
            logits = head(part[: len(labels)]).float()
            losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none").cpu())
            read += len(part)
    return torch.cat(losses)


def perplexity_record(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    haystack: str,
    *,
    context_tokens: int,
    name: str,
    start: int,
    chunk_tokens: int = 0,
) -> dict[str, Any]:
    """Losses of a stretch of text in bins of positions, which double: up to 1,024 tokens, 2,048, 4,096, ...

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        haystack: text.
        context_tokens: length of the stretch.
        name: id of the record.
        start: character of the haystack that the stretch starts with.
        chunk_tokens: see `token_losses`.
    """
    text = text_of(haystack, tokenizer, context_tokens, start=start)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"][0]
    losses = token_losses(model, ids[:context_tokens], chunk_tokens=chunk_tokens)
    bins = []
    edge = 0
    while edge < len(losses):
        end = min(max(2 * edge, _FIRST_BIN_TOKENS), context_tokens)
        part = losses[edge:end]
        means = [round(float(block.double().mean()), 5) for block in part.split(_BLOCK_TOKENS)]
        bins.append(
            {
                "from_tokens": edge,
                "to_tokens": end,
                "tokens": len(part),
                "nll": float(part.double().mean()),
                "block_nlls": means,
            }
        )
        edge = end
    return {
        "id": name,
        "task": "perplexity",
        "context_tokens": context_tokens,
        "start": start,
        "characters": len(text),
        "haystack_characters": len(haystack),
        "bins": bins,
    }


def perplexity_rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per bin over all texts of a length: perplexity, with the 95 % interval of the blocks' mean.

    Args:
        records: of one length.
    """
    rows, repeated = [], {}
    # older runs did not keep where their texts stood
    if all("start" in record for record in records):
        texts = [Stretch(start=record["start"], characters=record["characters"]) for record in records]
        repeated = repetition(texts, records[0]["haystack_characters"])
    for bins in zip(*(record["bins"] for record in records), strict=False):
        tokens = sum(one["tokens"] for one in bins)
        mean = sum(one["nll"] * one["tokens"] for one in bins) / tokens
        blocks = np.array([value for one in bins for value in one["block_nlls"]])
        half = 1.96 * blocks.std(ddof=1) / math.sqrt(len(blocks)) if len(blocks) > 1 else math.inf
        rows.append(
            {
                "task": "perplexity",
                "context_tokens": records[0]["context_tokens"],
                "from_tokens": bins[0]["from_tokens"],
                "to_tokens": bins[0]["to_tokens"],
                "tokens": tokens,
                "texts": len(bins),
                "perplexity": math.exp(mean),
                "low": math.exp(mean - half) if math.isfinite(half) else None,
                "high": math.exp(mean + half) if math.isfinite(half) else None,
                **repeated,
            }
        )
    return rows


def _times_read(texts: Sequence[Stretch], haystack_characters: int) -> float:
    """How often the texts read a character that they read, on average."""
    covered = np.zeros(haystack_characters, dtype=bool)
    for text in texts:
        end = min(text.start + text.characters, text.start + haystack_characters)
        covered[text.start : end] = True
        covered[: max(0, end - haystack_characters)] = True
    return sum(text.characters for text in texts) / int(covered.sum())
