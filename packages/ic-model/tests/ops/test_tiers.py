"""What the tests of the ops rely on: memory that is not written shows, and each tier has its variants."""

from __future__ import annotations

import pytest
import torch
import triton

from ic_model.ops.dispatch import interpreting


def test_new_memory_is_poisoned(device, dtype):
    like = torch.zeros(2, 3, device=device, dtype=dtype)
    for fresh in (torch.empty(5, device=device, dtype=dtype), torch.empty_like(like), like.new_empty(4)):
        assert fresh.dtype == dtype and fresh.isnan().all()
    for integer in (torch.uint8, torch.int32, torch.int64):
        assert (torch.empty(3, device=device, dtype=integer) == torch.iinfo(integer).max).all()
    assert torch.empty(3, device=device, dtype=torch.float8_e4m3fn).float().isnan().all()


def test_tier_of_the_variant(device, dtype, dtypes, request):
    assert dtype in dtypes and (dtype == torch.bfloat16) <= (device == "cuda")
    marks = {mark.name for mark in request.node.iter_markers()}
    assert marks & {"gpu", "interpreter"} == {"gpu" if device == "cuda" else "interpreter"}
    assert device == "cuda" or interpreting()


@pytest.mark.interpreter
def test_interpreter_is_on():
    assert triton.knobs.runtime.interpret


@pytest.mark.parametrize("repeat", [1, 2])
def test_numbers_are_the_same_in_every_test(repeat):
    assert torch.rand(()).item() == pytest.approx(0.4962566, abs=1e-6)
