"""Longer contexts by YaRN, the way DeepSeek-V3 does it: frequencies by ramp, and a temperature on the scores.

YaRN (arXiv 2309.00071, sections 3.2 and 3.4); DeepSeek-V3 (arXiv 2412.19437, section 4.3): on the decoupled rotary
key only, which in MLA is all that rotates, with `mscale = mscale_all_dim = 1`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from ic_model import ICConfig
from ic_model.attention import ICAttention
from ic_model.rope import softmax_scale, yarn_mscale
from torch import nn

BETA_FAST, BETA_SLOW = 32.0, 1.0


def extend_context(
    model: nn.Module, config: ICConfig, *, context_tokens: int, factor: float, original_context_tokens: int
) -> None:
    """Change a model's positions for a longer context, in place.

    A second extension starts from the original frequencies, not from the extended ones: `factor` is always
    relative to `original_context_tokens`. A model whose angles are given one by one, as converted ones have
    them, gets the same ramp on its angles; its scores get YaRN's temperature through the query projection,
    which is exact.

    Args:
        model: an InfiniteContextForCausalLM.
        config: its configuration.
        context_tokens: what `max_position_embeddings` becomes.
        factor: how much the slow frequencies are stretched; 1 changes no frequency.
        original_context_tokens: the context that the model was trained on before any extension.

    Raises:
        ValueError: the numbers do not fit the model or each other.
    """
    check_extension(config, context_tokens, factor, original_context_tokens)
    config.max_position_embeddings = context_tokens
    if factor == 1:
        return
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    if rope["rope_type"] == "explicit":
        angles = torch.tensor(rope["inverse_frequencies"], dtype=torch.float64)
        rope["inverse_frequencies"] = stretch(angles, factor, original_context_tokens).tolist()
        config.rope_parameters = rope
        _scale_scores(model, yarn_mscale(factor, 1.0) ** 2)
        return
    config.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": rope["rope_theta"],
        "factor": float(factor),
        "original_max_position_embeddings": original_context_tokens,
        "beta_fast": BETA_FAST,
        "beta_slow": BETA_SLOW,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    # attention modules keep the scale that they were built with
    for module in model.modules():
        if isinstance(module, ICAttention):
            module.scaling = softmax_scale(config)


def stretch(angles: torch.Tensor, factor: float, original_context_tokens: int) -> torch.Tensor:
    """YaRN's ramp on given angles per token (eqs. 17 to 19): fast pairs stay, slow ones are divided by the factor.

    Args:
        angles: `[R / 2]`, radians per token; 0 stays 0.
        factor: of the context.
        original_context_tokens: a pair that turns BETA_FAST times or more within them keeps its angle, one that
            turns BETA_SLOW times or less is stretched in full.
    """
    rotations = original_context_tokens * angles / (2 * math.pi)
    kept = ((rotations - BETA_SLOW) / (BETA_FAST - BETA_SLOW)).clamp(0, 1)
    return angles * kept + angles / factor * (1 - kept)


def check_extension(
    config: ICConfig, context_tokens: int, factor: float, original_context_tokens: int
) -> None:
    """Refuse an extension that the model cannot be given.

    Raises:
        ValueError: see `extend_context`.
    """
    if context_tokens < 1:
        raise ValueError(f"context_tokens is {context_tokens}; it must be at least 1")
    if not 1 <= factor < math.inf:
        raise ValueError(f"yarn_factor is {factor}; it must be a number of at least 1")
    if factor == 1:
        return
    if original_context_tokens < 1:
        raise ValueError(
            f"original_context_tokens is {original_context_tokens}; with yarn_factor {factor} it must say how "
            "many tokens the model was trained on before any extension"
        )
    rope = config.rope_parameters or {}
    before = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "yarn" and before != original_context_tokens:
        raise ValueError(
            f"original_context_tokens is {original_context_tokens}; the model was extended before, from {before}: "
            "give that"
        )
    if rope.get("rope_type") == "explicit" and config.max_position_embeddings != original_context_tokens:
        raise ValueError(
            f"original_context_tokens is {original_context_tokens}; the model's angles are for "
            f"{config.max_position_embeddings} tokens (max_position_embeddings): give that, or a model that was "
            "not extended before: angles that are given one by one do not say what they were"
        )
    if factor * original_context_tokens < context_tokens and rope.get("rope_type") != "explicit":
        raise ValueError(
            f"yarn_factor is {factor}; {original_context_tokens} tokens times that are fewer than context_tokens "
            f"({context_tokens}): give at least {context_tokens / original_context_tokens:g}"
        )


def _scale_scores(model: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # both halves of a query come from it, and rotating is linear
            if "self_attn.q_proj." in name or "self_attn.q_b_proj." in name:
                weight.mul_(factor)
