"""The kernels of prefill for Hopper on the CPU; what that checks, and what not, says hopper_emulation.py."""

from __future__ import annotations

import pytest
import torch
from hopper_emulation import REPLACED, EmulatedHopper, advance, barriers, copy_tile, patch_language

from ic_model.ops.launch import overriding
from ic_model.ops.mla_prefill import hopper, hopper_backward, hopper_launch, launch, reference
from ic_model.ops.mla_prefill.problem import Problem
from ic_model.testing import assert_close

KEYS, QUERIES, SLOTS = 16, 32, 2


@pytest.fixture
def emulated(monkeypatch):
    """The kernels' stand-ins; the forward one with small blocks."""
    patch_language(monkeypatch)
    replaced = {
        **REPLACED,
        "_advance": advance,
        "_barriers": barriers,
        "_copy_tile": copy_tile,
        "_opaque": lambda number: number,
    }
    for module, name in ((hopper, "forward_hopper_kernel"), (hopper_backward, "backward_hopper_kernel")):
        monkeypatch.setattr(module, name, EmulatedHopper(getattr(module, name), replaced))
    with overriding(
        "mla_prefill", {"block_queries": QUERIES, "block_keys": KEYS, "slots": SLOTS}, kernel="gluon"
    ):
        yield


@pytest.mark.parametrize(("consumers", "turns"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_packed_sequences(emulated, causal, consumers, turns):
    """Lengths about blocks; more keys than queries, fewer, none; rows of no sequence are NaN and get zeros."""
    lens_q, lens_k, spare = (1, 50, 17, 9, 0, 16), (40, 50, 7, 0, 11, 33), 37
    sizes = ((lens_q, 4, 192), (lens_k, 2, 192), (lens_k, 2, 128))
    q, k, v = (torch.randn(sum(lens) + spare, heads, dim).half() for lens, heads, dim in sizes)
    for part, lens in ((q, lens_q), (k, lens_k), (v, lens_k)):
        part[sum(lens) :] = torch.nan
    starts = [torch.tensor([0, *lens]).cumsum(0).int() for lens in (lens_q, lens_k)]
    options = {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1], "max_seqlen_q": 50, "max_seqlen_k": 50}
    options |= {"softmax_scale": 192**-0.5, "causal": causal, "return_lse": True}
    with overriding("mla_prefill", {"consumers": consumers, "turns": turns}, kernel="gluon"):
        out, lse = launch.mla_prefill(q, k, v, **options, gluon=True)
    expected = reference.mla_prefill(*(part.float() for part in (q, k, v)), **options)
    assert_close(out, expected[0], "fp16_attention")
    assert_close(lse, expected[1], "fp32_attention")


@pytest.mark.parametrize("queries", [37, 20])
def test_dense(emulated, queries):
    q, k, v = (
        torch.randn(2, tokens, 2, dim).half() for tokens, dim in ((queries, 192), (37, 192), (37, 128))
    )
    options = {"softmax_scale": 192**-0.5, "causal": True, "return_lse": True}
    out, lse = launch.mla_prefill_dense(q, k, v, **options, gluon=True)
    expected = reference.mla_prefill_dense(*(part.float() for part in (q, k, v)), **options)
    assert_close(out, expected[0], "fp16_attention")
    assert_close(lse, expected[1], "fp32_attention")


def gradients(q, k, v, d_out, **options):
    """Out, and the gradients of q, k and v."""
    leaves = [part.detach().requires_grad_() for part in (q, k, v)]
    function = launch.mla_prefill if "gluon" in options else reference.mla_prefill
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


@pytest.mark.interpreter
@pytest.mark.parametrize("heads", [(2, 1), (2, 2)], ids=["grouped", "plain"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_backward_of_packed_sequences(emulated, causal, heads):
    """Lengths about 64 queries and 128 keys; more keys than queries, fewer, none; NaN in rows of nobody."""
    lens_q, lens_k, spare = (1, 260, 70, 9, 0, 64, 128), (40, 260, 30, 0, 11, 193, 128), 150
    sizes = (
        (lens_q, heads[0], 192),
        (lens_k, heads[1], 192),
        (lens_k, heads[1], 128),
        (lens_q, heads[0], 128),
    )
    parts = [torch.randn(sum(lens) + spare, count, dim).half() for lens, count, dim in sizes]
    for part, (lens, _, _) in zip(parts, sizes, strict=True):
        part[sum(lens) :] = torch.nan
    starts = [torch.tensor([0, *lens]).cumsum(0).int() for lens in (lens_q, lens_k)]
    options = {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1], "max_seqlen_q": 260, "max_seqlen_k": 260}
    options |= {"softmax_scale": 192**-0.5, "causal": causal}
    found = gradients(*parts, **options, gluon=True)
    used = [part[: sum(lens)].float() for part, (lens, _, _) in zip(parts, sizes, strict=True)]
    expected = gradients(*used, **options)
    for name, actual, wanted in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert_close(actual[: len(wanted)], wanted, "fp16_attention", what=name)
        assert (actual[len(wanted) :] == 0).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("queries", [137, 120])
def test_backward_of_a_dense_batch(emulated, queries):
    parts = [
        torch.randn(2, tokens, 2, dim).half()
        for tokens, dim in ((queries, 192), (137, 192), (137, 128), (queries, 128))
    ]
    options = {"softmax_scale": 192**-0.5, "causal": True}
    problem = Problem(cu_q=None, cu_k=None, gluon=True, **options)
    out, lse = hopper_launch.forward_gluon(*parts[:3], problem)
    found = hopper_launch.backward_gluon(parts[3], *parts[:3], out, lse, problem)
    leaves = [part.float().requires_grad_() for part in parts[:3]]
    expected = torch.autograd.grad(reference.mla_prefill_dense(*leaves, **options), leaves, parts[3].float())
    for name, actual, wanted in zip(("dq", "dk", "dv"), found, expected, strict=True):
        assert_close(actual, wanted, "fp16_attention", what=name)
