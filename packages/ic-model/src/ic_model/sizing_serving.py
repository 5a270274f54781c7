"""Memory of a server on one GPU, buffer by buffer, before anything is loaded: pure arithmetic.

What vLLM allocates beside weights and cache is computed for two attention backends: the plugin's, whose workspace
follows from the memory of the card, and vLLM's own for MLA ("stock"), whose does not.

Letters: N heads of one GPU, C kv_lora_rank, R qk_rope_head_dim, P qk_nope_head_dim, V v_head_dim, D hidden_size.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ic_model.sizing import (
    DTYPE_BYTES,
    GIB,
    MAX_WORKSPACE_TOKENS,
    RUNTIME_GIB,
    kv_numbers_per_token,
    parameter_count,
)

if TYPE_CHECKING:
    from ic_model.configuration import ICConfig

MIB = 1024**2
# the plugin expands cached context into this share of the memory that vLLM may use, within bounds: a larger one
# saves little, since what is done once per pass is small beside attending to so many rows
PREFILL_SHARE = 32
MIN_PREFILL_BYTES, MAX_PREFILL_BYTES = 64 * MIB, 2 * GIB
MIN_PREFILL_TOKENS = 256
# tokens per page that the plugin's backend asks vLLM for
PAGE_TOKENS = 64
# of captured CUDA graphs; an allowance, not a measurement
GRAPH_BYTES_PER_LAYER = 4 * MIB
# vLLM's TRITON_MLA: at most so many splits per multiprocessor, and tokens per split (triton_mla.py in vLLM 0.26)
STOCK_SPLITS_PER_PROCESSOR, STOCK_TOKENS_PER_SPLIT = 2, 512


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """What a layer's attention looks like on one GPU.

    Args:
        heads: N, those of this GPU.
        kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim, v_head_dim: C, R, P, V.
    """

    heads: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int

    @property
    def expanded_numbers(self) -> int:
        """Of one token: what `kv_b_proj` returns, `N (P + V)`, and the keys with the shared part, `N (P + R)`."""
        return self.heads * (2 * self.qk_nope_head_dim + self.v_head_dim + self.qk_rope_head_dim)


def attention_shape(config: ICConfig, gpus: int = 1) -> AttentionShape:
    """The attention of one of `gpus` GPUs.

    Raises:
        ValueError: gpus does not divide the heads.
    """
    if gpus < 1 or config.num_attention_heads % gpus:
        raise ValueError(
            f"tensor_parallel_size is {gpus}; it must divide num_attention_heads ({config.num_attention_heads})"
        )
    return AttentionShape(
        heads=config.num_attention_heads // gpus,
        kv_lora_rank=config.kv_lora_rank,
        qk_rope_head_dim=config.qk_rope_head_dim,
        qk_nope_head_dim=config.qk_nope_head_dim,
        v_head_dim=config.v_head_dim,
    )


def prefill_budget_bytes(memory_bytes: float) -> int:
    """Bytes into which cached context is expanded at a time, on a card of which vLLM may use memory_bytes."""
    return int(min(max(memory_bytes / PREFILL_SHARE, MIN_PREFILL_BYTES), MAX_PREFILL_BYTES))


def prefill_workspace_tokens(shape: AttentionShape, budget_bytes: int, *, element_bytes: int = 2) -> int:
    """Rows of context per pass of the plugin's prefill: the power of two that fits, at least 256.

    Args:
        shape: of the attention.
        budget_bytes: of `prefill_budget_bytes`.
        element_bytes: of a number in the model's dtype.
    """
    fitting = budget_bytes // _context_bytes_per_token(shape, element_bytes)
    return max(MIN_PREFILL_TOKENS, 1 << max(0, fitting.bit_length() - 1))


def prefill_peak_bytes(
    shape: AttentionShape, *, step_tokens: int, workspace_tokens: int, element_bytes: int = 2
) -> int:
    """Bytes that the plugin's prefill holds at most beside its arguments.

    Either new tokens, expanded, with their output (twice, as some kernels mask it) and log-sum-exp; or one pass of
    context, expanded, with its output (twice) and float32 sums `[T, N, V]`.

    Args:
        shape: of the attention.
        step_tokens: T, most new tokens of a step (`--max-num-batched-tokens`).
        workspace_tokens: of `prefill_workspace_tokens`.
        element_bytes: of a number in the model's dtype.
    """
    output = step_tokens * shape.heads * shape.v_head_dim
    lse = 4 * step_tokens * shape.heads
    new = step_tokens * shape.expanded_numbers * element_bytes + 2 * output * element_bytes + lse
    context = workspace_tokens * _context_bytes_per_token(shape, element_bytes)
    return max(new, context + output * (4 + 2 * element_bytes) + 6 * lse)


def _context_bytes_per_token(shape: AttentionShape, element_bytes: int) -> int:
    # the row, once more in float32 where it is dequantised, and its place in the cache as an int64
    row = shape.kv_lora_rank + shape.qk_rope_head_dim
    return row * (element_bytes + 4) + shape.expanded_numbers * element_bytes + 8


def stock_workspace_bytes(
    shape: AttentionShape,
    *,
    context_tokens: int,
    sequences: int,
    page_tokens: int = 16,
    multiprocessors: int,
    element_bytes: int = 2,
) -> dict[str, int]:
    """What vLLM's own MLA backends take beside weights and cache, by buffer.

    `min(max(8 S, 4 sequences page_tokens), 65536)` rows of latents and, in the profile run, their expansion by
    `kv_b_proj` (MLACommonMetadataBuilder and MLAAttention in vLLM 0.26), and TRITON_MLA's float32 partial results,
    `sequences N splits (C + 1)` (research: triton_mla.py).

    Args:
        shape: of the attention.
        context_tokens: S, `--max-model-len`.
        sequences: `--max-num-seqs`.
        page_tokens: `--block-size`.
        multiprocessors: of the GPU.
        element_bytes: of a number in the model's dtype.
    """
    rows = min(max(8 * context_tokens, 4 * sequences * page_tokens), MAX_WORKSPACE_TOKENS)
    wanted = 1 << math.ceil(math.log2(max(1, context_tokens // STOCK_TOKENS_PER_SPLIT)))
    splits = min(wanted, STOCK_SPLITS_PER_PROCESSOR * multiprocessors)
    return {
        "latent rows": rows * (shape.kv_lora_rank + shape.qk_rope_head_dim) * element_bytes,
        "expanded rows": rows * shape.heads * (shape.qk_nope_head_dim + shape.v_head_dim) * element_bytes,
        "decode splits": 4 * sequences * shape.heads * splits * (shape.kv_lora_rank + 1),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerMemory:
    """Bytes of one GPU that serves, by what takes them.

    Args:
        weights: as they are stored.
        absorbed: `kv_b_proj` once more, in the form that decoding multiplies with.
        kv_cache: of the context asked for, in whole pages, and the page that vLLM keeps.
        prefill: `prefill_peak_bytes`.
        activations: of a step, outside attention.
        logits: float32, and the sampler's copy, of one token of every sequence.
        graphs: CUDA graphs; 0 without.
        runtime: CUDA context, libraries, the allocator's slack.
    """

    weights: int
    absorbed: int
    kv_cache: int
    prefill: int
    activations: int
    logits: int
    graphs: int
    runtime: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(asdict(self).values())


def server_memory(
    config: ICConfig,
    *,
    usable_bytes: float,
    context_tokens: int,
    step_tokens: int,
    sequences: int,
    kv_dtype: str = "bf16",
    weight_bytes: int | None = None,
    gpus: int = 1,
    graphs: bool = True,
) -> ServerMemory:
    """Bytes of each of `gpus` GPUs that serve one sequence of the context asked for.

    Args:
        config: shapes.
        usable_bytes: what vLLM may use of the card: its memory times `--gpu-memory-utilization`.
        context_tokens: `--max-model-len`.
        step_tokens: `--max-num-batched-tokens`.
        sequences: `--max-num-seqs`.
        kv_dtype: of the cache; a key of `DTYPE_BYTES`.
        weight_bytes: of the checkpoint as it is stored; None: 2 per number.
        gpus: `--tensor-parallel-size`.
        graphs: whether CUDA graphs are captured (not with `--enforce-eager`).

    Raises:
        ValueError: a number is below 1, the context is beyond the model's, or gpus does not divide the heads.
    """
    for name, value in (
        ("max_model_len", context_tokens),
        ("max_num_batched_tokens", step_tokens),
        ("max_num_seqs", sequences),
    ):
        if value < 1:
            raise ValueError(f"{name} is {value}; accepted: numbers from 1 on")
    if context_tokens > config.max_position_embeddings:
        raise ValueError(
            f"max_model_len is {context_tokens}; accepted: up to the model's max_position_embeddings, "
            f"{config.max_position_embeddings}"
        )
    if kv_dtype not in DTYPE_BYTES:
        raise ValueError(f"kv_dtype is {kv_dtype!r}; accepted: {', '.join(DTYPE_BYTES)}")
    shape, layers = attention_shape(config, gpus), config.num_hidden_layers
    rows = prefill_workspace_tokens(shape, prefill_budget_bytes(usable_bytes))
    pages = math.ceil(context_tokens / PAGE_TOKENS) + 1
    widest = max(
        2 * config.intermediate_size // gpus + config.intermediate_size // gpus, _query_width(config, shape)
    )
    stored = 2 * parameter_count(config) if weight_bytes is None else weight_bytes
    return ServerMemory(
        weights=math.ceil(stored / gpus),
        absorbed=2 * layers * shape.heads * shape.kv_lora_rank * (shape.qk_nope_head_dim + shape.v_head_dim),
        # the latent is the same for all heads: every GPU keeps all of it
        kv_cache=pages * PAGE_TOKENS * kv_numbers_per_token(config) * DTYPE_BYTES[kv_dtype],
        prefill=prefill_peak_bytes(shape, step_tokens=step_tokens, workspace_tokens=rows),
        # hidden state, residual, normed input, and the widest layer's input and output
        activations=2 * step_tokens * (3 * config.hidden_size + widest),
        logits=2 * 4 * sequences * config.vocab_size,
        graphs=GRAPH_BYTES_PER_LAYER * layers if graphs else 0,
        runtime=round(RUNTIME_GIB * GIB),
    )


def _query_width(config: ICConfig, shape: AttentionShape) -> int:
    """Numbers per token around attention: the query, rotated once more, and the attention's output."""
    query = shape.heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim)
    return 2 * query + shape.heads * shape.v_head_dim + (config.q_lora_rank or 0)


def longest_context(config: ICConfig, *, usable_bytes: float, kv_dtype: str, **server: Any) -> int:
    """The longest `--max-model-len` that fits, in tokens; 0 where none does.

    Args:
        config: shapes.
        usable_bytes: see `server_memory`, as what follows.
        kv_dtype: see there.
        server: step_tokens, sequences, weight_bytes, gpus, graphs.
    """
    one = server_memory(config, usable_bytes=usable_bytes, context_tokens=1, kv_dtype=kv_dtype, **server)
    page_bytes = one.kv_cache // 2
    pages = int((usable_bytes - (one.total - one.kv_cache)) // page_bytes) - 1
    return max(0, min(pages * PAGE_TOKENS, config.max_position_embeddings))
