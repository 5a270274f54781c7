"""What a model is converted to, and what of it the source does not have.

Letters: C kv_lora_rank, R qk_rope_head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ic_train.convert.source import Source

FREQUENCIES = ("explicit", "standard")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionOptions:
    """What to convert to.

    Args:
        kv_lora_rank: C.
        qk_rope_head_dim: R.
        q_lora_rank: rank of the queries, or None to leave them whole.
        latent_norm: norm the latents, as DeepSeek-V3 does, with weights fitted to calibration text. Lossy: heal
            it.
        frequencies: "explicit" chooses the angles freely; "standard" keeps the source's or every n-th of them,
            as DeepSeek-V3 can express them.
    """

    kv_lora_rank: int
    qk_rope_head_dim: int
    q_lora_rank: int | None = None
    latent_norm: bool = False
    frequencies: str = "explicit"


def check_options(options: ConversionOptions, source: Source) -> None:
    """Refuse ranks and angles that the source does not have.

    Raises:
        ValueError: names the option, its value and what is accepted.
    """
    width, dim = source.shape.key_width, source.shape.head_dim
    rope, rank = options.qk_rope_head_dim, options.kv_lora_rank
    if not (2 <= rope <= width and rope % 2 == 0):
        raise ValueError(
            f"qk_rope_head_dim is {rope}; it must be even and from 2 to {width}, the numbers of "
            "all keys of a token"
        )
    if not 1 <= rank <= 2 * width - rope:
        raise ValueError(
            f"kv_lora_rank is {rank}; with qk_rope_head_dim {rope} it must be from 1 to "
            f"{2 * width - rope}: keys and "
            "values have no more dimensions"
        )
    queries = source.shape.heads * (dim + rope)
    if options.q_lora_rank is not None and not 1 <= options.q_lora_rank <= min(source.shape.hidden, queries):
        raise ValueError(
            f"q_lora_rank is {options.q_lora_rank}; it must be from 1 to {min(source.shape.hidden, queries)}"
        )
    if options.frequencies not in FREQUENCIES:
        raise ValueError(f"frequencies is {options.frequencies!r}; accepted: {', '.join(FREQUENCIES)}")
    if options.frequencies == "standard":
        default = (source.config.rope_parameters or {}).get("rope_type", "default") == "default"
        if not default or dim % rope:
            raise ValueError(
                f"frequencies is 'standard' with qk_rope_head_dim {rope}; the source must have plain RoPE, and "
                f"qk_rope_head_dim must divide its head_dim ({dim}); accepted otherwise: 'explicit'"
            )


def perplexity(loss: float) -> float:
    """`exp(loss)`, and infinity where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf
