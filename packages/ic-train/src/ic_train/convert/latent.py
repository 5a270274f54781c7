"""One layer's attention as Multi-Head Latent Attention, by a plan of what stays rotary and a rank.

Letters: D hidden_size, N query heads, G key-value heads, d head dimension, C kv_lora_rank, R qk_rope_head_dim,
P = V = d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ic_train.convert.algebra import (
    LatentAttention,
    Moments,
    SourceAttention,
    interleaved_rows,
    principal_axes,
    real_rows,
    roots,
)
from ic_train.convert.rotary import RotaryPlan, RotaryStatistics, mean_rotation


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitKeys:
    """Keys and queries, what stays rotary apart from the rest.

    Args:
        rotary_key: `[R / 2, D + 1]` complex.
        rotary_query: `[N, R / 2, D + 1]` complex.
        plain_key: `[G, d, D + 1]`, what is left of the keys: of rank G d - R.
        plain_query: `[N, d, D + 1]`, with the mean rotation.
    """

    rotary_key: torch.Tensor
    rotary_query: torch.Tensor
    plain_key: torch.Tensor
    plain_query: torch.Tensor


def split_keys(
    attention: SourceAttention,
    moments: Moments,
    plan: RotaryPlan,
    frequencies: torch.Tensor,
    statistics: RotaryStatistics | None = None,
) -> SplitKeys:
    """Take the plan's rotary components out of the keys.

    With components `y = A k` and `k = S y`, a score is `Re(conj(q) k) = Re(conj(S^H q) y)`, so the query of a
    component is `S^H q`. Exact where the plan keeps everything; else lossy.

    Args:
        attention: the source's layer.
        moments: of its input, damped.
        plan: which components stay rotary.
        frequencies: `[d / 2]` of the source.
        statistics: of the layer, where they are known already.
    """
    statistics = statistics or RotaryStatistics(attention, moments)
    keys, queries = attention.complex_keys(), attention.complex_queries()
    rest = keys.clone()
    rotary_keys, rotary_queries = [], []
    for fold, kept in zip(plan.folds, plan.kept, strict=True):
        if not kept:
            continue
        part = slice(fold.first, fold.last)
        basis = statistics.basis(fold)
        components = basis.analyse[:kept] @ keys[:, part].transpose(0, 1).flatten(0, 1)
        synthesise = basis.synthesise[:, :kept].unflatten(0, (-1, len(keys)))
        rest[:, part] -= torch.einsum("fgm,mx->gfx", synthesise, components)
        rotary_keys.append(components)
        rotary_queries.append(
            torch.einsum("fgm,ghfx->ghmx", synthesise.conj(), queries[:, :, part]).flatten(0, 1)
        )
    plain = mean_rotation(frequencies, plan.distance_tokens).conj()[:, None] * queries
    return SplitKeys(
        rotary_key=torch.cat(rotary_keys),
        rotary_query=torch.cat(rotary_queries, dim=1),
        plain_key=real_rows(rest, 1),
        plain_query=real_rows(plain, 2).flatten(0, 1),
    )


def convert_attention(
    attention: SourceAttention,
    moments: Moments,
    plan: RotaryPlan,
    frequencies: torch.Tensor,
    *,
    rank: int | None,
    statistics: RotaryStatistics | None = None,
    score_factor: float = 1.0,
    biased: bool = False,
) -> LatentAttention:
    """Convert one layer.

    The latent holds the principal components of the plain keys and the values together. They are weighted by what
    they do: keys by the queries that meet them and by the spread of the values that a changed score mixes, values
    by the output projection. To first order in the errors this minimises the error of the layer's output when
    errors of different tokens are independent. It is exact for `rank` 2 G d - R.

    Args:
        attention: the source's layer.
        moments: of its input.
        plan: which parts of the keys stay rotary.
        frequencies: `[d / 2]` of the source.
        rank: C, at most 2 G d - R; None leaves keys and values as they are, with a latent of 2 G d numbers.
        statistics: of the layer, where they are known already.
        score_factor: what the source multiplies its scores by beside `d ** -0.5`.
        biased: whether the converted model may have biases: components are then taken around the mean.
    """
    shape = attention.shape
    damped = moments.damped()
    split = split_keys(attention, damped, plan, frequencies, statistics)
    stacked = torch.cat((split.plain_key.flatten(0, 1), attention.value.flatten(0, 1)))
    if rank is None:
        latent, up, energy_kept = stacked, torch.eye(len(stacked), dtype=torch.float64), 1.0
    else:
        seen = damped.centred() if biased else damped
        root, inverse = roots(_weights(attention, damped, split))
        variances, axes = principal_axes(root @ stacked @ seen.second @ stacked.T @ root)
        # latents of mean square 1: a norm with its epsilon then changes them little
        scale = variances[:rank].mean().clamp_min(1e-300).sqrt()
        latent = axes[:, :rank].T @ root @ stacked / scale
        up = inverse @ axes[:, :rank] * scale
        energy_kept = float(variances[:rank].sum() / variances.sum())
    output_bias = attention.output_bias
    if biased:
        # what the latent misses of the keys' mean adds the same to every score of a query, which softmax does not
        # see; what it misses of the values' mean is added behind the output projection
        missing = ((stacked - up @ latent) @ moments.second[:, -1])[shape.key_width :]
        missing = missing.unflatten(0, (shape.kv_heads, -1)).repeat_interleave(
            shape.heads // shape.kv_heads, 0
        )
        mean = torch.einsum("dnv,nv->d", attention.output, missing)
        output_bias = mean if output_bias is None else output_bias + mean
    group = shape.heads // shape.kv_heads
    key_up, value_up = up.unflatten(0, (2, shape.kv_heads, -1)).repeat_interleave(group, dim=1)
    query = torch.cat((split.plain_query, interleaved_rows(split.rotary_query, 1)), dim=1)
    rope_dim = 2 * len(split.rotary_key)
    # the converted softmax scale is (d + R) ** -0.5
    query = query * (score_factor * math.sqrt((shape.head_dim + rope_dim) / shape.head_dim))
    return LatentAttention(
        query=query,
        down=torch.cat((latent, interleaved_rows(split.rotary_key, 0))),
        up=torch.cat((key_up, value_up), dim=1),
        output=attention.output,
        output_bias=output_bias,
        energy_kept=energy_kept,
    )


def _weights(attention: SourceAttention, moments: Moments, split: SplitKeys) -> torch.Tensor:
    """`[2 G d, 2 G d]`: what a squared error of plain keys and of values costs the layer's output."""
    shape = attention.shape
    width, dim, group = shape.key_width, shape.head_dim, shape.heads // shape.kv_heads
    covariance = moments.centred().second
    weights = torch.zeros(2 * width, 2 * width, dtype=torch.float64)
    for head in range(shape.heads):
        kv_head = head // group
        keys = slice(kv_head * dim, (kv_head + 1) * dim)
        values = slice(width + kv_head * dim, width + (kv_head + 1) * dim)
        output, value = attention.output[:, head], attention.value[kv_head]
        gram = output.T @ output
        spread = torch.trace(gram @ value @ covariance @ value.T)
        query = split.plain_query[head]
        weights[keys, keys] += query @ moments.second @ query.T * (spread / dim)
        weights[values, values] += gram
    # keys and values are on scales of their own: neither may set the other's floor
    for part in (slice(0, width), slice(width, None)):
        diagonal = weights[part, part].diagonal()
        diagonal += 1e-4 * diagonal.mean() + 1e-300
    return weights
