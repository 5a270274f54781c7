"""Blocks as functions, for running a model one layer at a time: the source's, and converted ones.

Letters: B sequences, T tokens, D hidden_size, N query heads, G key-value heads, d head dimension, C kv_lora_rank,
R qk_rope_head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from ic_model.rope import apply_interleaved_rope
from torch.nn import functional as F

from ic_train.convert.algebra import LatentAttention, SourceAttention
from ic_train.convert.source import Source, SourceLayer

# maps the normed input [B, T, D] to the attention's output
Attend = Callable[[torch.Tensor], torch.Tensor]
# logits of a large vocabulary are the largest tensor of all: this many tokens at a time
_LOGIT_TOKENS = 512


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, in x's dtype."""
    return F.rms_norm(x, (x.shape[-1],), weight.to(x), eps)


class Block:
    """A layer's norms and feed-forward block on a device, around attentions that are given.

    Args:
        layer: the source's.
        eps: of the norms.
        device: to compute on.
    """

    def __init__(self, layer: SourceLayer, eps: float, device: torch.device) -> None:
        self.eps = eps
        self.weights = {
            name: weight.to(device=device, dtype=torch.float32) for name, weight in layer.weights.items()
        }

    def attention_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]` normed."""
        return rms_norm(hidden, self.weights["input_layernorm"], self.eps)

    def __call__(self, hidden: torch.Tensor, attend: Attend) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        hidden = hidden + attend(self.attention_input(hidden))
        normed = rms_norm(hidden, self.weights["post_attention_layernorm"], self.eps)
        gate = F.silu(F.linear(normed, self.weights["mlp.gate_proj"]))
        inner = gate * F.linear(normed, self.weights["mlp.up_proj"])
        return hidden + F.linear(inner, self.weights["mlp.down_proj"])


def source_attention(
    attention: SourceAttention, frequencies: torch.Tensor, score_factor: float, device: torch.device
) -> Attend:
    """The source's attention in float32."""
    shape = attention.shape
    query, key, value = (
        _parts(matrix.flatten(0, 1), device) for matrix in (attention.query, attention.key, attention.value)
    )
    output = attention.output.flatten(1).to(device=device, dtype=torch.float32)
    bias = None if attention.output_bias is None else attention.output_bias.to(output)

    def attend(x: torch.Tensor) -> torch.Tensor:
        cos, sin = _tables(frequencies, x.shape[1], device)
        q, k, v = (
            F.linear(x, *part).unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)
            for part in (query, key, value)
        )
        q, k = _rotate_halves(q, cos, sin), _rotate_halves(k, cos, sin)
        scale = score_factor * shape.head_dim**-0.5
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return F.linear(attended.transpose(1, 2).flatten(2), output, bias)

    return attend


def latent_attention(
    attention: LatentAttention,
    frequencies: torch.Tensor,
    device: torch.device,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    query: Attend | None = None,
) -> Attend:
    """A converted layer's attention in float32, expanded.

    Args:
        attention: the layer.
        frequencies: `[R / 2]` of the converted model.
        device: to compute on.
        norm: `[C]` weight of the latent's norm, or None where there is none.
        eps: of that norm.
        query: projects to queries instead of the layer's matrix.
    """
    heads, query_dim = attention.query.shape[:2]
    rope_dim, rank = 2 * len(frequencies), attention.up.shape[-1]
    plain_dim = query_dim - rope_dim
    own_query, down = _parts(attention.query.flatten(0, 1), device), _parts(attention.down, device)
    up = attention.up.flatten(0, 1).to(device=device, dtype=torch.float32)
    output = attention.output.flatten(1).to(device=device, dtype=torch.float32)
    bias = None if attention.output_bias is None else attention.output_bias.to(output)

    def attend(x: torch.Tensor) -> torch.Tensor:
        cos, sin = _tables(frequencies, x.shape[1], device)
        latent, rotary = F.linear(x, *down).split([rank, rope_dim], -1)
        if norm is not None:
            latent = rms_norm(latent, norm, eps)
        rotary = apply_interleaved_rope(rotary, cos, sin)
        queries = F.linear(x, *own_query) if query is None else query(x)
        q_plain, q_rotary = queries.unflatten(-1, (heads, -1)).split([plain_dim, rope_dim], dim=-1)
        q = torch.cat((q_plain, apply_interleaved_rope(q_rotary, cos[:, None], sin[:, None])), -1)
        k, v = F.linear(latent, up).unflatten(-1, (heads, -1)).split(plain_dim, dim=-1)
        k = torch.cat((k, rotary[:, :, None].expand(-1, -1, heads, -1)), -1)
        # values as wide as keys: PyTorch's flash attention on the CPU wants that
        v = F.pad(v, (0, rope_dim))
        attended = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        return F.linear(attended.transpose(1, 2)[..., :plain_dim].flatten(2), output, bias)

    return attend


def mean_loss(source: Source, hidden: torch.Tensor, token_ids: torch.Tensor) -> float:
    """Mean cross entropy of the next token in nats, from the last layer's output.

    Args:
        source: for its final norm and output projection.
        hidden: `[B, T, D]`.
        token_ids: `[B, T]`.
    """
    output = source.output().to(hidden)
    normed = rms_norm(hidden, source.final_norm().to(hidden), source.norm_eps)[:, :-1].flatten(0, 1)
    labels = token_ids[:, 1:].flatten().to(hidden.device)
    total = 0.0
    for rows, wanted in zip(normed.split(_LOGIT_TOKENS), labels.split(_LOGIT_TOKENS), strict=True):
        total += float(F.cross_entropy(F.linear(rows, output), wanted, reduction="sum"))
    return total / len(labels)


def _parts(augmented: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a matrix on `[x; 1]`, float32."""
    matrix = augmented.to(device=device, dtype=torch.float32)
    return matrix[:, :-1].contiguous(), matrix[:, -1].contiguous()


def _tables(
    frequencies: torch.Tensor, tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(tokens, dtype=torch.float32, device=device)[:, None] * frequencies.to(device)
    return angles.cos(), angles.sin()


def _rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    real, imaginary = x.chunk(2, dim=-1)
    return torch.cat((real * cos - imaginary * sin, imaginary * cos + real * sin), dim=-1)
