"""Cross entropy and KL divergence straight from normed states, without the logits of all tokens at once.

Gradients are made in the forward pass, as in Liger's fused linear losses: the logits of student and teacher exist
for some tokens at a time, and no product with the output projection is computed twice.

Letters: D hidden_size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

# tokens whose logits exist at once
CHUNK_TOKENS = 2048
IGNORED = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationWeights:
    """Weights of the losses, and the temperature of the KL.

    Args:
        text: of the cross entropy of the next token.
        logits: of `temperature^2 KL(teacher, student)` (Hinton et al., arXiv 1503.02531).
        hidden: of the relative squared distance of hidden states, a mean over layers.
        temperature: of both distributions.
    """

    text: float = 1.0
    logits: float = 0.0
    hidden: float = 0.0
    temperature: float = 1.0


def token_losses(
    student: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    teacher: torch.Tensor | None,
    teacher_head: torch.Tensor | None,
    weights: DistillationWeights,
    *,
    dtype: torch.dtype | None = None,
    compiled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`weights.text` times cross entropy plus `weights.logits` times KL, and both alone; means over tokens.

    Args:
        student: `[tokens, D]`, normed.
        head: `[vocabulary, D]`, the student's output projection.
        labels: `[tokens]`, the token that follows each; IGNORED where neither loss counts.
        teacher: `[tokens, D]`, normed, or None.
        teacher_head: `[vocabulary, D]`.
        weights: of the losses.
        dtype: of the matrix products; None: the states'.
        compiled: fuse what is not a matrix product with torch.compile.

    Returns:
        the weighted sum, which has gradients, cross entropy and KL, which have none; float32.
    """
    if teacher is not None and weights.logits:
        assert teacher_head is not None, "a teacher has a head"
        taught = (teacher, teacher_head)
    else:
        taught = None
    chunk = _compiled(_chunk) if compiled else _chunk
    return _TokenLosses.apply(student, head, labels, taught, weights, dtype or student.dtype, chunk)


class _TokenLosses(torch.autograd.Function):
    """The sum, with gradients for the states and, where wanted, for the output projection."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        head: torch.Tensor,
        labels: torch.Tensor,
        taught: tuple[torch.Tensor, torch.Tensor] | None,
        weights: DistillationWeights,
        dtype: torch.dtype,
        chunk: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        count = (labels != IGNORED).sum().clamp_min(1).float()
        text = kl = student.new_zeros((), dtype=torch.float32)
        states_gradient = torch.empty_like(student)
        head_gradient = torch.zeros_like(head, dtype=torch.float32) if head.requires_grad else None
        with torch.autocast(student.device.type, enabled=False):
            own = head.to(dtype)
            for start in range(0, len(labels), CHUNK_TOKENS):
                part = slice(start, start + CHUNK_TOKENS)
                states = student[part].to(dtype)
                other = None
                if taught is not None:
                    other = F.linear(taught[0][part], taught[1].to(taught[0].dtype))
                one, two, gradient = chunk(
                    F.linear(states, own),
                    other,
                    labels[part],
                    weights.text,
                    weights.logits,
                    weights.temperature,
                )
                text, kl = text + one, kl + two
                states_gradient[part] = gradient @ own
                if head_gradient is not None:
                    head_gradient += gradient.T @ states
        ctx.save_for_backward(states_gradient, head_gradient, count)
        text, kl = text / count, kl / count
        ctx.mark_non_differentiable(text, kl)
        ctx.head_dtype = head.dtype
        return weights.text * text + weights.logits * kl, text, kl

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, head, count = ctx.saved_tensors
        factor = gradients[0] / count
        own = None if head is None else (head * factor).to(ctx.head_dtype)
        return states * factor.to(states.dtype), own, None, None, None, None, None


def _chunk(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor,
    text_weight: float,
    logits_weight: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of both losses over some tokens, and the weighted sum's gradient at the student's logits.

    With p the teacher's and q the student's distribution at temperature t, the gradient of `t^2 KL(p, q)` at the
    student's logits is `t (q - p)`; that of the cross entropy is its distribution less the label's.

    Args:
        student: logits `[tokens, vocabulary]`.
        teacher: likewise, or None.
        labels: `[tokens]`.
        text_weight: of the cross entropy.
        logits_weight: of the KL.
        temperature: t.
    """
    counted = (labels != IGNORED).float()
    logits = student.float()
    log_probabilities = logits.log_softmax(-1)
    places = labels.clamp_min(0)[:, None]
    text = -(log_probabilities.gather(-1, places)[:, 0] * counted).sum()
    is_label = torch.arange(student.shape[-1], device=student.device)[None] == places
    gradient = text_weight * (log_probabilities.exp() - is_label.float())
    kl = text.new_zeros(())
    if teacher is not None:
        wanted = (teacher.float() / temperature).log_softmax(-1)
        found = log_probabilities if temperature == 1 else (logits / temperature).log_softmax(-1)
        probabilities = wanted.exp()
        kl = temperature**2 * ((probabilities * (wanted - found)).sum(-1) * counted).sum()
        gradient = gradient + logits_weight * temperature * (found.exp() - probabilities)
    return text, kl, (gradient * counted[:, None]).to(student.dtype)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # made once: another torch.compile of it would compile anew
    return torch.compile(function, dynamic=False)


def hidden_distance(
    student: list[torch.Tensor], teacher: list[torch.Tensor], *, compiled: bool = False
) -> torch.Tensor:
    """Mean over layers of `|s - t|^2 / |t|^2`, each `[B, T, D]`."""
    ratio = _compiled(_distance) if compiled else _distance
    return torch.stack([ratio(own, other) for own, other in zip(student, teacher, strict=True)]).mean()


def _distance(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    wanted = other.float()
    return (own.float() - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12)
