"""The comparison helpers catch what they are there for."""

from __future__ import annotations

import pytest
import torch

from ic_model.testing import TOLERANCES, assert_close, compare

NAN, INF = torch.nan, torch.inf


def test_measures() -> None:
    found = compare(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    assert found.relative_norm == pytest.approx(1 / 5)
    assert found.max_abs == 1.0 and found.peak == pytest.approx(1 / 4)
    assert found.worst_index == (1, 1)


def test_one_wrong_row_in_a_long_tensor_is_caught() -> None:
    expected = torch.randn(100_000, 8, generator=torch.Generator().manual_seed(0))
    actual = expected.clone()
    actual[77_777, 3] += 0.002
    assert compare(actual, expected).relative_norm < 1e-5
    with pytest.raises(AssertionError, match=r"worst at \[77777, 3\]"):
        assert_close(actual, expected, "fp32_reordered")


@pytest.mark.parametrize(
    ("actual", "expected", "mismatches"),
    [
        ([1.0, NAN], [1.0, NAN], 0),
        ([INF, -INF], [INF, -INF], 0),
        ([1.0, NAN], [1.0, 2.0], 1),
        ([1.0, 2.0], [NAN, 2.0], 1),
        ([INF, 1.0], [-INF, 1.0], 1),
        ([INF, NAN], [NAN, INF], 2),
    ],
)
def test_positions_of_nan_and_infinity(actual: list[float], expected: list[float], mismatches: int) -> None:
    found = compare(torch.tensor(actual), torch.tensor(expected))
    assert found.nonfinite_mismatches == mismatches
    if mismatches:
        with pytest.raises(AssertionError, match=f"{mismatches} elements not finite in one of them only"):
            assert_close(torch.tensor(actual), torch.tensor(expected), "bf16_model")


def test_zeros_and_empty_tensors() -> None:
    assert_close(torch.zeros(3), torch.zeros(3), "exact")
    assert_close(torch.zeros(0, 4), torch.zeros(0, 4), "exact")
    with pytest.raises(AssertionError):
        assert_close(torch.full((3,), 1e-3), torch.zeros(3), "fp32_peer")


def test_callers_mistakes() -> None:
    with pytest.raises(ValueError, match=r"actual has shape \[2\] and expected \[2, 1\]"):
        compare(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="tolerance is 'loose'; accepted: exact, fp32_peer"):
        assert_close(torch.zeros(2), torch.zeros(2), "loose")


def test_every_tolerance_has_a_reason() -> None:
    for name, row in TOLERANCES.items():
        assert row.reason and row.relative_norm <= 3e-2, name
