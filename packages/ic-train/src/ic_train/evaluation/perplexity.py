"""Perplexity by position: does a model still read well far into a text?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ic_train.evaluation.passkey import text_of

_FIRST_BIN_TOKENS = 1024
# neighbouring tokens are not independent: the interval is that of the means of blocks
_BLOCK_TOKENS = 256
_LOGITS_AT_A_TIME = 1024


@torch.inference_mode()
def token_losses(model: PreTrainedModel, token_ids: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of every token after the first, in nats.

    One forward pass reads the text; logits exist for some tokens at a time.

    Args:
        model: in evaluation mode.
        token_ids: `[S]` int64.

    Returns:
        `[S - 1]` float32 on the CPU.
    """
    hidden = model.get_decoder()(token_ids[None].to(model.device), use_cache=False).last_hidden_state[0, :-1]
    head = model.get_output_embeddings()
    losses = []
    for start in range(0, len(hidden), _LOGITS_AT_A_TIME):
        part = hidden[start : start + _LOGITS_AT_A_TIME]
        labels = token_ids[start + 1 : start + 1 + len(part)].to(model.device)
        losses.append(torch.nn.functional.cross_entropy(head(part).float(), labels, reduction="none").cpu())
    return torch.cat(losses)


def perplexity_record(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    haystack: str,
    *,
    context_tokens: int,
    name: str,
    seed: int,
) -> dict[str, Any]:
    """Losses of a stretch of text in bins of positions, which double: up to 1,024 tokens, 2,048, 4,096, ...

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        haystack: text; the stretch starts at a random place.
        context_tokens: length of the stretch.
        name: id of the record.
        seed: of the place.
    """
    start = int(np.random.default_rng(seed).integers(len(haystack)))
    text = text_of(haystack[start:] + haystack[:start], tokenizer, context_tokens)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"][0]
    losses = token_losses(model, ids[:context_tokens])
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
    return {"id": name, "task": "perplexity", "context_tokens": context_tokens, "bins": bins}


def perplexity_rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per bin over all texts of a length: perplexity, with the 95 % interval of the blocks' mean.

    Args:
        records: of one length.
    """
    rows = []
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
            }
        )
    return rows
