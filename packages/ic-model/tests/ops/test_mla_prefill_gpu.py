"""Exact attention on a GPU: model shapes, PyTorch's kernels, CUDA graphs, more than 2**31 elements."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ic_model.ops.mla_prefill import mla_prefill, mla_prefill_dense, sdpa
from ic_model.testing import assert_close

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
GLUON = pytest.param("gluon", marks=pytest.mark.skipif(not HOPPER, reason="it is for compute capability 9.0"))
DIMS = (192, 128)
SCALE = 192**-0.5


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)


def inputs(tokens, heads, dims=DIMS, dtype=BF16):
    """Query, key, value and the gradient of the output."""
    widths = (dims[0], dims[0], dims[1], dims[1])
    return [torch.randn(tokens, heads, width, device="cuda").to(dtype) for width in widths]


def arguments(lengths, causal=True):
    cu = starts(lengths)
    return {
        "cu_seqlens_q": cu, "max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths), "softmax_scale": SCALE,
        "causal": causal,
    }  # fmt: skip


def run(tensors, implementation, dtype=None, **options):
    """Out, lse and the gradients of q, k and v; `dtype` is what it is computed in."""
    q, k, v = (part.to(dtype or part.dtype).detach().requires_grad_() for part in tensors[:3])
    out, lse = mla_prefill(q, k, v, **options, return_lse=True, implementation=implementation)
    return [out, lse, *torch.autograd.grad(out, (q, k, v), tensors[3].to(out.dtype))]


def check(found, expected):
    for name, actual, wanted in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        assert_close(actual, wanted, "fp32_attention" if name == "lse" else "bf16_attention", what=name)


@pytest.mark.parametrize("implementation", ["triton", "torch"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dims", [(192, 128), (128, 64), (64, 64)], ids=lambda dims: f"{dims[0]}-{dims[1]}")
def test_long_sequences(implementation, causal, dims):
    lengths = (1500, 3, 129, 2048, 1)
    tensors = inputs(sum(lengths), 4, dims)
    options = arguments(lengths, causal)
    check(run(tensors, implementation, **options), run(tensors, "reference", torch.float32, **options))


@pytest.mark.parametrize("implementation", ["triton", "torch", GLUON])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_other_keys_than_queries(implementation, causal):
    lens_q, lens_k = (300, 20, 0, 128, 40), (811, 20, 5, 1, 0)
    q, k, v, d_out = inputs(max(sum(lens_q), sum(lens_k)), 2)
    tensors = (q[: sum(lens_q)], k[: sum(lens_k)], v[: sum(lens_k)], d_out[: sum(lens_q)])
    options = arguments(lens_q, causal) | {"cu_seqlens_k": starts(lens_k), "max_seqlen_k": max(lens_k)}
    check(run(tensors, implementation, **options), run(tensors, "reference", torch.float32, **options))


@pytest.mark.parametrize(
    ("implementation", "queries"),
    [
        ("triton", 1024),
        ("triton", 700),
        ("torch", 1024),
        ("torch", 700),
        ("cudnn", 1024),
        (None, 1024),
        (None, 700),
    ]
    + [pytest.param("gluon", queries, marks=GLUON.marks) for queries in (1024, 700)],
)
def test_dense(implementation, queries):
    keys = 1024
    if implementation == "cudnn" and not HOPPER:
        pytest.skip("PyTorch lets cuDNN take these rows on Hopper only")
    q, k, v, d_out = (part.unflatten(0, (2, keys)).transpose(1, 2) for part in inputs(2 * keys, 4))
    tensors = [part.detach().requires_grad_() for part in (q[:, :, :queries], k, v)]
    found, expected = (
        [out := mla_prefill_dense(*parts, softmax_scale=SCALE, implementation=name)]
        + list(torch.autograd.grad(out, parts, d_out[:, :, :queries].to(out.dtype)))
        for name, parts in (
            (implementation, tensors),
            ("reference", [part.detach().float().requires_grad_() for part in tensors]),
        )
    )
    for name, actual, wanted in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert_close(actual, wanted, "bf16_attention", what=name)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.skipif(not HOPPER, reason="it is for compute capability 9.0")
def test_kernel_for_hopper(dtype, causal):
    """Lengths about its blocks, grouped heads, values inside of wider rows; rows of no sequence are NaN."""
    lengths = (1, 63, 64, 65, 127, 128, 129, 0, 255, 1000, 2049)
    used, spare = sum(lengths), 200
    q, d_out = inputs(used + spare, 4, dtype=dtype)[::3]
    key_value = torch.randn(used + spare, 2, 320, device="cuda").to(dtype)
    for part in (q, key_value, d_out):
        part[used:] = torch.nan
    tensors = (q, *key_value.split((192, 128), dim=2), d_out)
    options = arguments(lengths, causal)
    found = run(tensors, "gluon", **options)
    expected = run([part[:used] for part in tensors], "reference", torch.float32, **options)
    for index, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
        parts = actual.split((used, spare), dim=1 if index == 1 else 0)
        name = (
            "fp32_attention"
            if index == 1
            else {BF16: "bf16_attention", torch.float16: "fp16_attention"}[dtype]
        )
        assert_close(parts[0], wanted, name)
        assert (parts[1] == (-torch.inf if index == 1 else 0)).all()


@pytest.mark.skipif(not HOPPER, reason="PyTorch lets cuDNN take these rows on Hopper only")
def test_one_packed_sequence_is_dense_for_cudnn(monkeypatch):
    """Taken by itself where the caller says that the sequence fills the tensors, and nowhere else."""
    tokens, taken = 700, []
    # not the rows of the kernel for Hopper, which would come first
    tensors = inputs(tokens, 4, (128, 128))
    options = arguments((tokens,))
    original = sdpa.mla_prefill_cudnn
    monkeypatch.setattr(sdpa, "mla_prefill_cudnn", lambda *a, **b: taken.append(1) or original(*a, **b))
    q, k, v = (part.detach().requires_grad_() for part in tensors[:3])
    out = mla_prefill(q, k, v, **options)
    assert taken
    expected = run(tensors, "reference", torch.float32, **options)
    check([out, expected[1], *torch.autograd.grad(out, (q, k, v), tensors[3])], expected)
    taken.clear()
    for change in (
        {"return_lse": True},
        {"max_seqlen_q": tokens + 1},
        {"cu_seqlens_k": options["cu_seqlens_q"].clone()},
        {"cu_seqlens_q": starts((300, 400)), "max_seqlen_q": 400, "max_seqlen_k": 400},
    ):
        mla_prefill(q, k, v, **options | change)
        with pytest.raises(ValueError, match="implementation is 'cudnn', which cannot compute"):
            mla_prefill(q, k, v, **options | change, implementation="cudnn")
    assert not taken


LAUNCHES = 10_000
SHARING = f"""
import torch
from ic_model.ops.mla_prefill import mla_prefill_dense
torch.manual_seed(0)
q, k = (torch.randn(32, 1000, 4, 192, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
v = torch.randn(32, 1000, 4, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
first = mla_prefill_dense(q, k, v, softmax_scale=0.07)
for _ in range({LAUNCHES} // 100):
    for _ in range(100):
        out = mla_prefill_dense(q, k, v, softmax_scale=0.07)
    assert torch.equal(out, first)
"""


def test_processes_that_share_a_gpu_end():
    """Time slices end a program's turn anywhere: what is only nearly always in order shows."""
    processes = [
        subprocess.Popen([sys.executable, "-c", SHARING], stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    try:
        for process in processes:
            _, said = process.communicate(timeout=180)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("implementation", ["triton", GLUON])
def test_runs_are_equal_bit_by_bit(implementation, monkeypatch):
    # where nobody asks for that, the kernel for Hopper adds up dQ in any order
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    lengths = (3000, 17, 1000)
    tensors = inputs(sum(lengths), 8)
    first = run(tensors, implementation, **arguments(lengths))
    for _ in range(3):
        for again, before in zip(run(tensors, implementation, **arguments(lengths)), first, strict=True):
            assert_close(again, before, "exact")


@pytest.mark.parametrize("implementation", ["triton", GLUON])
def test_graph_replays_with_other_lengths(implementation):
    tensors = inputs(1024, 4)
    leaves = [part.detach().requires_grad_() for part in tensors[:3]]
    lengths = starts((1000, 24))
    options = {"max_seqlen_q": 1024, "max_seqlen_k": 1024, "softmax_scale": SCALE}
    options["implementation"] = implementation

    def step():
        out = mla_prefill(*leaves, cu_seqlens_q=lengths, **options)
        return out, *torch.autograd.grad(out, leaves, tensors[3])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    for new in ((1000, 24), (1, 1023), (512, 512), (100, 200)):
        lengths.copy_(starts(new))
        for part in recorded:
            part.fill_(torch.nan)
        graph.replay()
        for name, actual, wanted in zip(("out", "dq", "dk", "dv"), recorded, step(), strict=True):
            any_order = implementation == "gluon" and name == "dq"
            assert_close(actual, wanted, "bf16_attention" if any_order else "exact", what=name)


@pytest.mark.parametrize("implementation", ["triton", GLUON])
def test_more_than_two_to_the_31_elements(implementation):
    """Only the last sequences are looked at: they lie past 2**31 elements of q, k and dq, dk."""
    heads, lengths = 96, (1024,) * 126 + (1000, 1048)
    tokens = sum(lengths)
    assert (tokens - 2048) * heads * 192 > 2**31
    tensors = [torch.randn(tokens, heads, width, device="cuda", dtype=BF16) for width in (192, 192, 128, 128)]
    found = run(tensors, implementation, **arguments(lengths))
    last = slice(tokens - 1048, tokens)
    some = [part[last, 90:].clone() for part in tensors]
    expected = run(some, "reference", torch.float32, **arguments((1048,)))
    check(
        [found[0][last, 90:], found[1][90:, last], *(part[last, 90:] for part in found[2:])],
        expected,
    )


@pytest.mark.parametrize("implementation", ["triton", GLUON])
def test_one_long_sequence_by_some_rows(implementation):
    tokens, heads = 65536, 2
    q, k, v, _ = inputs(tokens, heads)
    options = arguments((tokens,))
    out = mla_prefill(q, k, v, **options, implementation=implementation)
    for first in (0, 30001, tokens - 64):
        rows = slice(first, first + 64)
        cu_k = starts((first + 64,))
        wanted = mla_prefill(
            q[rows].float(), k[: first + 64].float(), v[: first + 64].float(),
            cu_seqlens_q=starts((64,)), cu_seqlens_k=cu_k, max_seqlen_q=64, max_seqlen_k=tokens,
            softmax_scale=SCALE, implementation="reference",
        )  # fmt: skip
        assert_close(out[rows], wanted, "bf16_attention", what=f"rows from {first}")
