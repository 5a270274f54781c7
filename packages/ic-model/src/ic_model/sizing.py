"""Parameters, bytes and operations of a model at a context length, and the cards it fits: pure arithmetic.

    python -m ic_model.sizing ic-1b --context 1048576 --kv-dtype bf16

Letters: D hidden_size, L num_hidden_layers, N num_attention_heads, C kv_lora_rank, R qk_rope_head_dim,
P qk_nope_head_dim, V v_head_dim, S context in tokens. A FLOP is one addition or one multiplication.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ic_model.weights import EMBEDDING, tensor_shapes

if TYPE_CHECKING:
    from ic_model.configuration import ICConfig

GIB = 1024**3
# bytes per number. fp8 is vLLM's cache with one scale per layer: no bytes for scales in the rows.
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1}

# A serving process's own use of the card, beside weights and cache. The first three are vLLM's defaults.
BATCHED_TOKENS = 8192
SEQUENCES = 256
PAGE_TOKENS = 16
# rows of the latent cache that vLLM expands at a time during prefill (its chunked-prefill workspace)
MAX_WORKSPACE_TOKENS = 65536
# CUDA context, libraries and the allocator's slack
RUNTIME_GIB = 0.75


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A GPU: what its driver reports as memory, and the vendor's memory bandwidth."""

    name: str
    memory_gib: float
    bandwidth_gb_per_s: float | None


# memory from nvidia-smi (MiB / 1024), bandwidth from the vendor's data sheets (1 GB = 1e9 bytes)
CARDS = (
    Card(name="RTX 2070 Super", memory_gib=8.0, bandwidth_gb_per_s=448),
    Card(name="RTX 3090", memory_gib=24.0, bandwidth_gb_per_s=936),
    Card(name="RTX 4090", memory_gib=24.0, bandwidth_gb_per_s=1008),
    Card(name="A100 80GB", memory_gib=80.0, bandwidth_gb_per_s=2039),
    Card(name="H100 80GB", memory_gib=79.6, bandwidth_gb_per_s=3350),
    Card(name="H200 141GB", memory_gib=140.4, bandwidth_gb_per_s=4800),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """What a model takes at one context length; units are in the names."""

    model: str
    context_tokens: int
    max_context_tokens: int
    kv_dtype: str
    weight_dtype: str
    parameters: int
    embedding_parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    mha_kv_bytes: int
    kv_saved_vs_mha: float
    linear_flop_per_token: int
    decode_attention_flop_per_token: int
    prefill_attention_flop_per_token: int
    decode_read_bytes: int
    workspace_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """One model on one card.

    `cache_tokens` is what the memory holds, in one sequence or in many; `longest_context_tokens` is that or
    the model's own limit. The time is None where the card's bandwidth is unknown.
    """

    card: str
    memory_gib: float
    fits: bool
    needed_gib: float
    cache_tokens: int
    longest_context_tokens: int
    min_decode_ms_per_token: float | None


def parameter_count(config: ICConfig) -> int:
    """Numbers in all weights: the sum over `ic_model.weights.tensor_shapes`; tied embeddings count once."""
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())


def embedding_parameters(config: ICConfig) -> int:
    """Numbers in the embedding table: `vocab_size * D`. The output projection is not in it."""
    return math.prod(tensor_shapes(config)[EMBEDDING])


def kv_numbers_per_token(config: ICConfig) -> int:
    """Numbers cached per token: `L (C + R)` (DeepSeek-V2, arXiv 2405.04434, section 2.1.4, table 1)."""
    return config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)


def mha_kv_numbers_per_token(config: ICConfig) -> int:
    """The same for multi-head attention with as many heads of P: `2 L N P` (same table, row MHA)."""
    return 2 * config.num_hidden_layers * config.num_attention_heads * config.qk_nope_head_dim


def linear_flop_per_token(config: ICConfig) -> int:
    """FLOP of all products with weight matrices, forward, per token: 2 per weight.

    (Kaplan et al., arXiv 2001.08361, section 2.1.) Without norms and without the embedding, which is a
    look-up; a tied output projection counts as the product that it is. The same when decoding absorbed:
    `kv_b_proj` then acts on the query and on the output, with `2 N C P + 2 N C V` FLOP as before.
    """
    shapes = tensor_shapes(config)
    weights = sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and name != EMBEDDING)
    output = embedding_parameters(config) if config.tie_word_embeddings else 0
    return 2 * (weights + output)


def decode_attention_flop_per_token(config: ICConfig, context_tokens: int) -> int:
    """FLOP of absorbed attention for one new token that sees S: `2 L N S (2 C + R)`.

    Scores take `2 (C + R)` and the weighted sum of latents `2 C` per head and seen token (DeepSeek-V2,
    arXiv 2405.04434, section 2.1.2 for the absorption).
    """
    per_pair = 2 * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
    return config.num_hidden_layers * config.num_attention_heads * context_tokens * per_pair


def prefill_attention_flop_per_token(config: ICConfig, context_tokens: int) -> int:
    """FLOP of expanded causal attention per token, averaged over a prompt of S: `L N (P + R + V) (S + 1)`.

    Scores take `2 (P + R)` and the weighted sum of values `2 V` per head and seen token; the token at
    position s sees s + 1, so a token sees (S + 1) / 2 on average. The expansion itself is in the linear part.
    """
    per_pair = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return config.num_hidden_layers * config.num_attention_heads * per_pair * (context_tokens + 1)


def workspace_bytes(config: ICConfig, context_tokens: int) -> int:
    """What a serving process is expected to take beside weights and cache; an allowance, not a measurement.

    The sum of: the runtime (`RUNTIME_GIB`); vLLM's MLA prefill workspace, `min(max(8 S, 4 SEQUENCES
    PAGE_TOKENS), MAX_WORKSPACE_TOKENS)` rows, once as latent rows and once expanded to keys and values of all
    heads, 2 bytes each (`MLACommonMetadataBuilder` and `MLAAttention` in vLLM 0.26); the two halves of the
    feed-forward block and the residual for `BATCHED_TOKENS`, 2 bytes each; fp32 logits for `SEQUENCES`.
    """
    rows = min(max(8 * context_tokens, 4 * SEQUENCES * PAGE_TOKENS), MAX_WORKSPACE_TOKENS)
    expanded = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
    prefill = 2 * rows * (config.kv_lora_rank + config.qk_rope_head_dim + expanded)
    activations = 2 * BATCHED_TOKENS * (2 * config.intermediate_size + 2 * config.hidden_size)
    return round(RUNTIME_GIB * GIB) + prefill + activations + 4 * SEQUENCES * config.vocab_size


def size(
    config: ICConfig,
    *,
    context_tokens: int,
    kv_dtype: str = "bf16",
    weight_dtype: str = "bf16",
    model: str = "",
    workspace_gib: float | None = None,
) -> Size:
    """Size a model.

    Args:
        config: shapes.
        context_tokens: tokens in the cache, S.
        kv_dtype: of the cache; a key of `DTYPE_BYTES`.
        weight_dtype: of the weights; a key of `DTYPE_BYTES`.
        model: name to show.
        workspace_gib: memory beside weights and cache; default: `workspace_bytes`.

    Raises:
        ValueError: context_tokens is below 1 or above max_position_embeddings, a dtype is unknown, or
            workspace_gib is negative.
    """
    longest = config.max_position_embeddings
    if not 1 <= context_tokens <= longest:
        raise ValueError(
            f"context is {context_tokens}; accepted: 1 to {longest} tokens, the model's "
            "max_position_embeddings"
        )
    for field, value in (("kv_dtype", kv_dtype), ("weight_dtype", weight_dtype)):
        if value not in DTYPE_BYTES:
            raise ValueError(f"{field} is {value!r}; accepted: {', '.join(DTYPE_BYTES)}")
    if workspace_gib is not None and not 0 <= workspace_gib < math.inf:
        raise ValueError(f"workspace_gib is {workspace_gib}; accepted: a number of at least 0")
    parameters, embedding = parameter_count(config), embedding_parameters(config)
    kv_per_token = kv_numbers_per_token(config) * DTYPE_BYTES[kv_dtype]
    mha_numbers = mha_kv_numbers_per_token(config)
    # decoding reads one row of an embedding table, but all of it where it is the output projection as well
    read_parameters = parameters if config.tie_word_embeddings else parameters - embedding
    return Size(
        model=model,
        context_tokens=context_tokens,
        max_context_tokens=longest,
        kv_dtype=kv_dtype,
        weight_dtype=weight_dtype,
        parameters=parameters,
        embedding_parameters=embedding,
        weight_bytes=parameters * DTYPE_BYTES[weight_dtype],
        kv_bytes_per_token=kv_per_token,
        kv_bytes=kv_per_token * context_tokens,
        mha_kv_bytes=mha_numbers * DTYPE_BYTES[kv_dtype] * context_tokens,
        kv_saved_vs_mha=1 - kv_numbers_per_token(config) / mha_numbers,
        linear_flop_per_token=linear_flop_per_token(config),
        decode_attention_flop_per_token=decode_attention_flop_per_token(config, context_tokens),
        prefill_attention_flop_per_token=prefill_attention_flop_per_token(config, context_tokens),
        decode_read_bytes=read_parameters * DTYPE_BYTES[weight_dtype] + kv_per_token * context_tokens,
        workspace_bytes=(
            workspace_bytes(config, context_tokens) if workspace_gib is None else round(workspace_gib * GIB)
        ),
    )


def fit(model_size: Size, card: Card) -> Fit:
    """Whether weights, cache and workspace fit a card, and the longest context that would.

    The decoding time is a lower bound: the bytes that one step must read (all weights but an untied
    embedding, and the cached rows) over the card's bandwidth (the memory roof of Williams et al., "Roofline",
    CACM 52(4), 2009). The longest context keeps the workspace of the context asked for.
    """
    fixed_bytes = model_size.weight_bytes + model_size.workspace_bytes
    free_bytes = card.memory_gib * GIB - fixed_bytes
    cache_tokens = max(0, int(free_bytes // model_size.kv_bytes_per_token))
    bandwidth = card.bandwidth_gb_per_s
    return Fit(
        card=card.name,
        memory_gib=card.memory_gib,
        fits=model_size.kv_bytes <= free_bytes,
        needed_gib=(fixed_bytes + model_size.kv_bytes) / GIB,
        cache_tokens=cache_tokens,
        longest_context_tokens=min(cache_tokens, model_size.max_context_tokens),
        min_decode_ms_per_token=None if bandwidth is None else model_size.decode_read_bytes / bandwidth / 1e6,
    )


def load_config(model: str) -> ICConfig:
    """The configuration of a preset, or of a checkpoint folder.

    Raises:
        ValueError: model is neither, or the folder's config.json is not one of ours.
    """
    from ic_model.configuration import ICConfig
    from ic_model.presets import preset, preset_names

    if model in preset_names():
        return preset(model)
    path = Path(model) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model is {model!r}; accepted: a preset ({', '.join(preset_names())}) or a folder with "
            "config.json"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict) or fields.get("model_type") != ICConfig.model_type:
        raise ValueError(f"{path} does not have model_type {ICConfig.model_type!r}")
    return ICConfig.from_dict(fields)


if __name__ == "__main__":
    from ic_model.sizing_cli import main

    main()
