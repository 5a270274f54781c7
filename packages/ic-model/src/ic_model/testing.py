"""Comparisons for tests and benchmarks, and the tolerances they may use, each with its reason.

A comparison looks at three things: the relative norm of the difference (all of the tensor at once), its
largest element beside the largest expected one (a single wrong row in a long tensor), and the positions of
NaN and infinity, which must be the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """How far two tensors may be apart, and why that far.

    Args:
        relative_norm: bound on `|actual - expected| / |expected|`, Frobenius norms.
        peak: bound on `max |actual - expected| / max |expected|`.
        reason: what the difference comes from.
    """

    relative_norm: float
    peak: float
    reason: str


TOLERANCES = {
    "exact": Tolerance(
        relative_norm=0.0, peak=0.0, reason="the same operations on the same numbers in the same order"
    ),
    "fp32_peer": Tolerance(
        relative_norm=1e-5,
        peak=1e-5,
        reason="another implementation of the same formulas in float32 (2**-24 per rounding); sums are "
        "associated differently and a few layers amplify that",
    ),
    "fp32_reordered": Tolerance(
        relative_norm=1e-5,
        peak=2e-5,
        reason="our own two paths in float32: absorbing multiplies the same three matrices in another order",
    ),
    "fp32_gradient": Tolerance(
        relative_norm=1e-4,
        peak=1e-4,
        reason="gradients pass every reordered product twice, and sums over tokens cancel",
    ),
    "fp32_attention": Tolerance(
        relative_norm=2e-6,
        peak=1e-5,
        reason="attention in float32 by blocks: sums over keys are associated differently, 2**-24 per rounding; "
        "gradients cancel in dO V^T - delta",
    ),
    "fp16_attention": Tolerance(
        relative_norm=2e-3,
        peak=4e-3,
        reason="softmax weights and score gradients are rounded to float16 (2**-11 per rounding) before they are "
        "multiplied, results once more",
    ),
    "bf16_attention": Tolerance(
        relative_norm=1e-2, peak=2e-2, reason="as fp16_attention, with bfloat16's 2**-8 per rounding"
    ),
    "fp16_rounded": Tolerance(
        relative_norm=1e-3,
        peak=1.5e-3,
        reason="computed in float32 and rounded to float16 at most twice (2**-11 each)",
    ),
    "bf16_rounded": Tolerance(
        relative_norm=5e-3,
        peak=1e-2,
        reason="computed in float32 and rounded to bfloat16 at most twice (2**-8 each)",
    ),
    "fp8_rounded": Tolerance(
        relative_norm=3e-2,
        peak=7e-2,
        reason="stored in float8 e4m3: 3 bits of mantissa, at most 2**-4 per rounding, after one or two to the "
        "model's dtype",
    ),
    "bf16_model": Tolerance(
        relative_norm=3e-2,
        peak=5e-2,
        reason="bfloat16 keeps 8 bits (2**-8 per rounding), and every layer rounds several times",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What `compare` measured; `worst_index` is where the difference is largest."""

    relative_norm: float
    max_abs: float
    peak: float
    worst_index: tuple[int, ...]
    nonfinite_mismatches: int


def compare(actual: torch.Tensor, expected: torch.Tensor) -> Difference:
    """Measure how far two tensors of one shape are apart, in float64.

    Elements that are NaN, or the same infinity, in both count as equal and are left out of the norms;
    elements that are not finite in only one, or differently, are counted in `nonfinite_mismatches`. Where all
    that is expected is 0, the relative numbers are the absolute ones.

    Args:
        actual: any shape, any float dtype, any device.
        expected: the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"actual has shape {list(actual.shape)} and expected {list(expected.shape)}")
    left, right = (tensor.detach().to("cpu", torch.float64) for tensor in (actual, expected))
    finite = left.isfinite() & right.isfinite()
    alike = finite | (left.isnan() & right.isnan()) | (left == right)
    mismatches = int((~alike).sum())
    zero = torch.zeros((), dtype=torch.float64)
    error = torch.where(finite, left - right, zero).abs()
    reference = torch.where(finite, right, zero)
    # a mismatch is the worst place whatever the finite errors are
    ranked = torch.where(alike, error, torch.inf)
    worst = torch.unravel_index(ranked.argmax(), ranked.shape) if ranked.numel() else ()
    norm, largest = float(reference.norm()), float(reference.abs().max()) if reference.numel() else 0.0
    max_abs = float(error.max()) if error.numel() else 0.0
    return Difference(
        relative_norm=float(error.norm()) / (norm or 1.0),
        max_abs=max_abs,
        peak=max_abs / (largest or 1.0),
        worst_index=tuple(int(index) for index in worst),
        nonfinite_mismatches=mismatches,
    )


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, tolerance: str, *, what: str = ""
) -> Difference:
    """Fail unless two tensors agree within a row of `TOLERANCES`.

    Args:
        actual: any shape, any float dtype, any device.
        expected: the same shape.
        tolerance: a key of `TOLERANCES`.
        what: name of what is compared, for the message.

    Returns:
        what was measured.

    Raises:
        ValueError: the shapes differ, or the tolerance is unknown.
        AssertionError: the tensors are further apart than that; the message has the norms, the worst index
            and both values there.
    """
    if tolerance not in TOLERANCES:
        raise ValueError(f"tolerance is {tolerance!r}; accepted: {', '.join(TOLERANCES)}")
    bound = TOLERANCES[tolerance]
    found = compare(actual, expected)
    if found.nonfinite_mismatches or found.relative_norm > bound.relative_norm or found.peak > bound.peak:
        index = found.worst_index
        raise AssertionError(
            f"{what or 'tensors'} of shape {list(actual.shape)} differ by more than {tolerance!r}: relative "
            f"norm {found.relative_norm:.2e} (bound {bound.relative_norm:.0e}), peak {found.peak:.2e} (bound "
            f"{bound.peak:.0e}), max abs {found.max_abs:.2e}, {found.nonfinite_mismatches} elements not "
            f"finite in one of them only; worst at {list(index)}: {float(actual[index]):.6g} instead of "
            f"{float(expected[index]):.6g}. The bound allows for: {bound.reason}"
        )
    return found
