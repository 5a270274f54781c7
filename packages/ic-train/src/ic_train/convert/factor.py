"""Queries of low rank, norms on latents, and the other small steps around a converted layer.

Letters: D hidden_size, C kv_lora_rank, Q q_lora_rank, M rows of the query projection, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from ic_train.convert.algebra import Moments, principal_axes


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryFactors:
    """A query projection as two, float64.

    Args:
        down: `[Q, D]`.
        up: `[M, Q]`.
        bias: `[M]`, behind both.
        norm: `[Q]`, weight of the norm between them, or None.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor
    norm: torch.Tensor | None = None

    def product(self) -> torch.Tensor:
        """Both as one matrix on `[x; 1]`, `[M, D + 1]`; without the norm."""
        return torch.cat((self.up @ self.down, self.bias[:, None]), dim=1)

    def normed(self, x: torch.Tensor, eps: float) -> QueryFactors:
        """With a norm between them, fitted to inputs `[..., D]`."""
        augmented = F.pad(self.down, (0, 1))
        return replace(self, norm=latent_norm_weight(augmented, x, eps))

    def function(self, device: torch.device, eps: float) -> Callable[[torch.Tensor], torch.Tensor]:
        """The projection as it runs, in float32, the norm included."""
        down, up, bias = (
            part.to(device=device, dtype=torch.float32) for part in (self.down, self.up, self.bias)
        )
        norm = None if self.norm is None else self.norm.to(down)

        def project(x: torch.Tensor) -> torch.Tensor:
            latent = F.linear(x, down)
            if norm is not None:
                latent = F.rms_norm(latent, latent.shape[-1:], norm, eps)
            return F.linear(latent, up, bias)

        return project

    def tensors(self, biased: bool) -> dict[str, torch.Tensor]:
        """By the names of a checkpoint's layer."""
        found = {"self_attn.q_a_proj.weight": self.down, "self_attn.q_b_proj.weight": self.up}
        if self.norm is not None:
            found["self_attn.q_a_layernorm.weight"] = self.norm
        if biased:
            found["self_attn.q_b_proj.bias"] = self.bias
        return found


def factor_query(query: torch.Tensor, moments: Moments, rank: int, biased: bool) -> QueryFactors:
    """The best projection of rank Q by the variance of queries: exact for Q = min(M, D).

    Args:
        query: `[N, P + R, D + 1]`.
        moments: of its input, damped.
        rank: Q.
        biased: whether the query's mean may go into the bias.
    """
    matrix = query.flatten(0, 1)
    weight, bias = matrix[:, :-1], matrix[:, -1]
    second = (moments.centred() if biased else moments).second[:-1, :-1]
    _, axes = principal_axes(weight @ second @ weight.T)
    up = axes[:, :rank]
    down = up.T @ weight
    if biased:
        mean = moments.second[:-1, -1]
        bias = bias + (weight - up @ down) @ mean
    # latents of mean square 1, so that a norm changes them little
    scale = (down @ moments.second[:-1, :-1] @ down.T).diagonal().mean().clamp_min(1e-300).sqrt()
    return QueryFactors(down=down / scale, up=up * scale, bias=bias)


def latent_norm_weight(down: torch.Tensor, x: torch.Tensor, eps: float) -> torch.Tensor:
    """The weight with which a norm changes latents least.

    With `n = z / rms(z)`, `w = E[z n] / E[n n]` minimises `E |w n - z|^2` for every dimension on its own.

    Args:
        down: `[C, D + 1]`, the projection to the latent.
        x: `[..., D]` inputs of the projection.
        eps: of the norm.

    Returns:
        `[C]` float64.
    """
    flat = x.flatten(0, -2).double()
    latent = flat @ down[:, :-1].T + down[:, -1]
    normed = latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + eps)
    return (latent * normed).mean(0) / normed.square().mean(0).clamp_min(1e-300)


def residual_scale(eps: float, wanted_eps: float) -> float:
    """The factor on the residual stream that makes norms of one epsilon equal to norms of another.

    `s x / sqrt(mean((s x)^2) + s^2 eps) = x / sqrt(mean(x^2) + eps)`: exact, with what is written into the stream
    multiplied by `s`.
    """
    return math.sqrt(wanted_eps / eps)
