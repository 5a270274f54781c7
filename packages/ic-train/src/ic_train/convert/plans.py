"""Candidates for what stays rotary, made from the energies of all layers; the converter tries them on text.

Letters: G key-value heads, F frequencies of the source, R rotary dimensions that are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ic_train.convert.rotary import Fold, RotaryPlan, RotaryStatistics, full_plan, mean_rotation, misfit

# the widest fold of an adaptive plan, in frequencies of the source
MAX_FOLD = 8
# distances that adaptive plans are made for; which of them fits the model shows on text
ADAPTIVE_DISTANCE_TOKENS = (256, 1024)
EVEN_FOLDS = (1, 2, 4, 8)
EVEN_DISTANCE_TOKENS = 1024


@dataclass(kw_only=True, slots=True)
class _Energy:
    """Of one fold, summed over layers: per component, and per component and frequency."""

    component: torch.Tensor
    by_frequency: torch.Tensor


class RotaryPlanner:
    """Adds up the layers' energies, then makes plans.

    Args:
        frequencies: `[F]` of the source, float32, radians per token.
        kv_heads: G.
    """

    def __init__(self, frequencies: torch.Tensor, kv_heads: int) -> None:
        self.frequencies = frequencies
        self.kv_heads = kv_heads
        self._energies: dict[Fold, _Energy] = {}

    def add_layer(self, statistics: RotaryStatistics) -> None:
        """Count one more layer; every layer's scores weigh the same."""
        count = len(self.frequencies)
        bases = {
            Fold(first=first, last=last): statistics.basis(Fold(first=first, last=last))
            for first in range(count)
            for last in range(first + 1, min(count, first + MAX_FOLD) + 1)
        }
        total = sum(float(basis.energy.sum()) for fold, basis in bases.items() if fold.last - fold.first == 1)
        for fold, basis in bases.items():
            component = basis.energy / total
            by_frequency = basis.frequency_share * component[:, None]
            if fold in self._energies:
                self._energies[fold].component += component
                self._energies[fold].by_frequency += by_frequency
            else:
                self._energies[fold] = _Energy(component=component, by_frequency=by_frequency)

    def candidates(self, rope_dim: int, *, standard: bool) -> list[RotaryPlan]:
        """Plans worth trying for R.

        Args:
            rope_dim: R.
            standard: only plans whose angles are a geometric series from 1, as DeepSeek-V3 has them.
        """
        pairs, count = rope_dim // 2, len(self.frequencies)
        if standard:
            stride = count // pairs
            widths = [stride * factor for factor in EVEN_FOLDS if count % (stride * factor) == 0]
            return [self._standard(width, stride) for width in widths if width <= MAX_FOLD or width == stride]
        if pairs == count * self.kv_heads:
            return [full_plan(self.frequencies, self.kv_heads)]
        even = [self._even(width, pairs) for width in EVEN_FOLDS if count % width == 0]
        return [self._adaptive(tokens, pairs) for tokens in ADAPTIVE_DISTANCE_TOKENS] + even

    def _standard(self, width: int, stride: int) -> RotaryPlan:
        """Folds of equal width that keep every stride-th frequency."""
        count = len(self.frequencies)
        folds = tuple(Fold(first=first, last=first + width) for first in range(0, count, width))
        return RotaryPlan(
            name=f"standard, folds of {width}",
            folds=folds,
            kept=(width // stride,) * len(folds),
            frequencies=tuple(float(one) for one in self.frequencies[::stride]),
            distance_tokens=EVEN_DISTANCE_TOKENS,
        )

    def _even(self, width: int, pairs: int) -> RotaryPlan:
        """Folds of equal width; the components that lose most without RoPE stay, wherever they are."""
        count = len(self.frequencies)
        folds = tuple(Fold(first=first, last=first + width) for first in range(0, count, width))
        lost = 1 - mean_rotation(self.frequencies, EVEN_DISTANCE_TOKENS).abs() ** 2
        ranked = sorted(
            (
                (float(energy * lost[fold.first : fold.last].mean()), place)
                for place, fold in enumerate(folds)
                for energy in self._energies[fold].component
            ),
            key=lambda entry: (-entry[0], entry[1]),
        )
        kept = [0] * len(folds)
        for _, place in ranked[:pairs]:
            kept[place] += 1
        return self._plan(f"even, folds of {width}", folds, tuple(kept), EVEN_DISTANCE_TOKENS)

    def _adaptive(self, tokens: int, pairs: int) -> RotaryPlan:
        """Folds and components of the least expected squared error of the scores, by dynamic programming.

        A component that stays rotary turns by its fold's mean frequency instead of its own ones; one that does not
        gets the mean rotation.
        """
        count = len(self.frequencies)
        costs = {fold: self._costs(fold, tokens) for fold in self._energies}
        best = [[math.inf] * (pairs + 1) for _ in range(count + 1)]
        choice: dict[tuple[int, int], tuple[Fold, int]] = {}
        best[0][0] = 0.0
        # by end: all folds that a prefix is made of come before it
        for fold, cost in sorted(costs.items(), key=lambda item: (item[0].last, item[0].first)):
            for kept, one in enumerate(cost):
                for total in range(kept, pairs + 1):
                    value = best[fold.first][total - kept] + one
                    if value < best[fold.last][total]:
                        best[fold.last][total] = value
                        choice[fold.last, total] = (fold, kept)
        folds: list[Fold] = []
        kept_by_fold: list[int] = []
        end, left = count, pairs
        while end:
            fold, kept = choice[end, left]
            folds.insert(0, fold)
            kept_by_fold.insert(0, kept)
            end, left = fold.first, left - kept
        return self._plan(f"adaptive, {tokens} tokens", tuple(folds), tuple(kept_by_fold), tokens)

    def _costs(self, fold: Fold, tokens: int) -> list[float]:
        """Expected error of a fold by the number of components kept."""
        frequencies = self.frequencies[fold.first : fold.last]
        energy = self._energies[fold].by_frequency
        dropped = energy @ (1 - mean_rotation(frequencies, tokens).abs() ** 2)
        turned = (energy * misfit(self._centres(fold), frequencies, tokens)).sum(1)
        zero = torch.zeros(1, dtype=torch.float64)
        kept = torch.cat((zero, turned.cumsum(0)))
        rest = dropped.sum() - torch.cat((zero, dropped.cumsum(0)))
        return (kept + rest).tolist()

    def _centres(self, fold: Fold) -> torch.Tensor:
        """Mean frequency of each component, geometric, weighted by energy."""
        energy = self._energies[fold].by_frequency
        logs = self.frequencies[fold.first : fold.last].double().log()
        return ((energy @ logs) / energy.sum(1).clamp_min(1e-300)).exp()

    def _plan(self, name: str, folds: tuple[Fold, ...], kept: tuple[int, ...], tokens: int) -> RotaryPlan:
        frequencies: list[float] = []
        for fold, number in zip(folds, kept, strict=True):
            alone = fold.last - fold.first == 1
            centres = (
                self.frequencies[fold.first : fold.last].expand(number) if alone else self._centres(fold)
            )
            # float32, as the angles are computed: what config.json says is then what runs
            frequencies += [float(one) for one in centres[:number].float()]
        return RotaryPlan(
            name=name, folds=folds, kept=kept, frequencies=tuple(frequencies), distance_tokens=tokens
        )
