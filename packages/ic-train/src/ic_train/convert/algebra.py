"""Matrices and moments of the conversion, one layer at a time, in float64.

Every projection is a matrix on the augmented input `[x; 1]`, so that biases need no rules of their own.

Letters: D hidden_size, N query heads, G key-value heads, d head dimension, F = d / 2 frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# variance added in every direction, as a share of the mean one: what calibration did not show is kept, too
DAMPING = 1e-2
# eigenvalues are raised to this share of the mean one before a root is inverted
ROOT_FLOOR = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """Sizes of the source's attention: D, N, G, d."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def key_width(self) -> int:
        """Numbers of all keys of a token, G d; as many of all values."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Second moment of the augmented attention input over tokens.

    Args:
        second: `[D + 1, D + 1]` float64, the mean of `[x; 1] [x; 1]^T`.
    """

    second: torch.Tensor

    def damped(self) -> Moments:
        """With DAMPING times the mean variance added in every direction of x."""
        size = len(self.second) - 1
        second = self.second.clone()
        second.diagonal()[:size] += DAMPING * self.second.diagonal()[:size].mean()
        return Moments(second=second)

    def centred(self) -> Moments:
        """The covariance: the constant has none."""
        mean = self.second[:, -1]
        return Moments(second=self.second - torch.outer(mean, mean))


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceAttention:
    """Projections of one layer of the source, float64.

    Args:
        shape: sizes.
        query: `[N, d, D + 1]`.
        key: `[G, d, D + 1]`.
        value: `[G, d, D + 1]`.
        output: `[D, N, d]`.
        output_bias: `[D]`, or None.
    """

    shape: AttentionShape
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    output_bias: torch.Tensor | None

    def complex_keys(self) -> torch.Tensor:
        """`[G, F, D + 1]` complex: RoPE turns the pair `(i, i + d / 2)`, here one number, by one angle."""
        return torch.complex(*self.key.chunk(2, dim=1))

    def complex_queries(self) -> torch.Tensor:
        """`[G, N / G, F, D + 1]` complex, the queries of each key head together."""
        return torch.complex(*self.query.unflatten(0, (self.shape.kv_heads, -1)).chunk(2, dim=2))


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """Projections of one converted layer, float64; C latent, R rotary, P = V = d.

    Args:
        query: `[N, P + R, D + 1]`.
        down: `[C + R, D + 1]`, latents and then the rotary key with its pairs side by side.
        up: `[N, P + V, C]`.
        output: `[D, N, V]`.
        output_bias: `[D]`, or None where the model has no biases.
        energy_kept: share of the weighted variance of keys and values that the latent holds.
    """

    query: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor
    output: torch.Tensor
    output_bias: torch.Tensor | None
    energy_kept: float


def roots(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The square root of a Hermitian positive semidefinite matrix, and its inverse.

    Eigenvalues are raised to ROOT_FLOOR times their mean: a direction that no query ever meets costs nothing in
    theory, and must not be blown up when the root is inverted.
    """
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(ROOT_FLOOR * values.mean().clamp_min(1e-300)).sqrt()
    return (vectors * values) @ vectors.mH, (vectors / values) @ vectors.mH


def principal_axes(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and eigenvectors (columns) of a Hermitian matrix, largest first, with a definite sign.

    The largest entry of every vector is made real and positive, so that the same matrix gives the same vectors
    whatever the library.
    """
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values, vectors * (largest.conj() / largest.abs())


def real_rows(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    """A complex matrix as a real one, real parts before imaginary ones along `dim`: the order of the source."""
    return torch.cat((matrix.real, matrix.imag), dim=dim)


def interleaved_rows(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    """The same with each real part beside its imaginary one: the order of ic_model's RoPE; dim is not negative."""
    return torch.stack((matrix.real, matrix.imag), dim=dim + 1).flatten(dim, dim + 1)
