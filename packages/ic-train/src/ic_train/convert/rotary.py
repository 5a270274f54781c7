"""Which parts of the source's keys keep their position.

RoPE turns the pair `(i, i + d / 2)` of every key head by one angle. As a complex number, the key is multiplied by
`exp(1j * position * frequency[i])`, and a complex matrix that mixes the heads of one frequency commutes with that:
heads are mixed until few components carry nearly all of the score. (TransMLA, arXiv 2502.07864, section 4.2, mixes
real parts and imaginary parts by the same real matrix; a complex one contains that and concentrates no less.)
Within a fold, neighbouring frequencies count as equal. What is not kept under RoPE gets the mean of its
rotation over the distances that occur, which is the constant nearest to it.

Letters: D hidden_size, N query heads, G key-value heads, d head dimension, F = d / 2 frequencies, R rotary
dimensions that are kept, m components of a fold (its frequencies times G).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ic_train.convert.algebra import Moments, SourceAttention, principal_axes, roots


@dataclass(frozen=True, kw_only=True, slots=True)
class Fold:
    """Neighbouring frequencies that count as equal: `[first, last)` of the source's F."""

    first: int
    last: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RotaryPlan:
    """What stays rotary: the same for all layers, because they share one table of angles.

    Args:
        name: how it was made, for the record.
        folds: cover all frequencies of the source, in order.
        kept: components that stay rotary, per fold.
        frequencies: `[R / 2]` radians per token of the kept components, fold by fold.
        distance_tokens: distances up to this many tokens decide what stands in for a dropped rotation; each octave
            of them counts the same. 0: nothing does, the rotation becomes 1.
    """

    name: str
    folds: tuple[Fold, ...]
    kept: tuple[int, ...]
    frequencies: tuple[float, ...]
    distance_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldBasis:
    """Components of one fold in one layer, strongest first.

    Args:
        energy: `[m]` mean square of each component's part of the scores.
        analyse: `[m, m]` complex, the fold's keys (frequency by frequency, head by head) to components.
        synthesise: `[m, m]` complex, its inverse.
        frequency_share: `[m, frequencies]` how much of a component comes from which; rows sum to 1.
    """

    energy: torch.Tensor
    analyse: torch.Tensor
    synthesise: torch.Tensor
    frequency_share: torch.Tensor


class RotaryStatistics:
    """Second moments of one layer's keys and queries as complex numbers.

    Args:
        attention: the layer.
        moments: of its input, damped.
    """

    def __init__(self, attention: SourceAttention, moments: Moments) -> None:
        self.kv_heads = attention.shape.kv_heads
        # the moment is real: two real products instead of a complex one
        second = moments.second
        # [F, G, D + 1], so that a fold is a slice
        keys = attention.complex_keys().transpose(0, 1)
        flat = keys.flatten(0, 1)
        seen = torch.complex(flat.real @ second, flat.imag @ second)
        self.keys = (seen @ flat.mH).view(*keys.shape[:2], *keys.shape[:2])
        # by key head and frequency
        queries = attention.complex_queries().transpose(1, 2)
        met = torch.complex(queries.real @ second, queries.imag @ second)
        self.queries = torch.einsum("gfhx,gehx->gfe", met, queries.conj())

    def basis(self, fold: Fold) -> FoldBasis:
        """Principal components of a fold's keys, weighted by the queries that meet them."""
        part = slice(fold.first, fold.last)
        size = fold.last - fold.first
        covariance = self.keys[part, :, part].flatten(2).flatten(0, 1)
        weight = torch.zeros_like(covariance).view(size, self.kv_heads, size, self.kv_heads)
        for head in range(self.kv_heads):
            weight[:, head, :, head] = self.queries[head, part, part]
        root, inverse = roots(weight.flatten(2).flatten(0, 1))
        energy, axes = principal_axes(root @ covariance @ root)
        share = (axes.abs() ** 2).T.reshape(-1, size, self.kv_heads).sum(-1)
        return FoldBasis(
            energy=energy, analyse=axes.mH @ root, synthesise=inverse @ axes, frequency_share=share
        )


def distance_weights(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances `0 .. tokens - 1` and their weights, proportional to `1 / (1 + distance)`."""
    distance = torch.arange(tokens, dtype=torch.float64)
    weight = 1 / (1 + distance)
    return distance, weight / weight.sum()


def mean_rotation(frequencies: torch.Tensor, tokens: int) -> torch.Tensor:
    """The mean of `exp(-1j * frequency * distance)`, complex, one per frequency; 1 for `tokens` 0."""
    if not tokens:
        return torch.ones(len(frequencies), dtype=torch.complex128)
    return _rotations(frequencies, tokens) @ distance_weights(tokens)[1].to(torch.complex128)


@functools.lru_cache(maxsize=4)
def _distances(tokens: int) -> torch.Tensor:
    return distance_weights(tokens)[0]


def _rotations(frequencies: torch.Tensor, tokens: int) -> torch.Tensor:
    angles = frequencies.double()[:, None] * _distances(tokens)
    return torch.polar(torch.ones_like(angles), -angles)


def misfit(left: torch.Tensor, right: torch.Tensor, tokens: int) -> torch.Tensor:
    """Mean of `|exp(-1j a x) - exp(-1j b x)|^2` over distances x: `[len(left), len(right)]`."""
    weights = distance_weights(tokens)[1].to(torch.complex128)
    overlap = (_rotations(left, tokens) * weights) @ _rotations(right, tokens).mH
    return 2 - 2 * overlap.real


def full_plan(frequencies: torch.Tensor, kv_heads: int) -> RotaryPlan:
    """Everything stays rotary, R = G d: the conversion of keys is then exact."""
    folds = tuple(Fold(first=index, last=index + 1) for index in range(len(frequencies)))
    return RotaryPlan(
        name="full",
        folds=folds,
        kept=(kv_heads,) * len(folds),
        frequencies=tuple(float(one) for one in frequencies for _ in range(kv_heads)),
        distance_tokens=0,
    )
