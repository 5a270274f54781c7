"""Exact attention over packed and dense sequences, forward and backward, against the formula in float32."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from ic_model.ops import dispatch as dispatching
from ic_model.ops import mla_prefill as mla_prefill_package
from ic_model.ops.aot import compile_variant
from ic_model.ops.launch import overriding
from ic_model.ops.mla_prefill import (
    AUTOMATIC_ORDER,
    launch,
    merge_attention,
    merge_attention_,
    mla_prefill,
    mla_prefill_dense,
)
from ic_model.ops.mla_prefill.problem import Problem
from ic_model.testing import assert_close

LENGTHS = (1, 17, 0, 63, 64, 65, 130)
# the interpreter takes a block at a time in Python
SMALL = {"cpu": (1, 17, 0, 33), "cuda": LENGTHS}
TOLERANCE = {
    torch.float32: "fp32_attention",
    torch.float16: "fp16_attention",
    torch.bfloat16: "bf16_attention",
}
DIMS = [(192, 128), (96, 64), (128, 64), (64, 64), (80, 48)]


@dataclass
class Case:
    """Packed inputs and what `mla_prefill` is called with."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    d_out: torch.Tensor
    arguments: dict


def starts(lengths, device):
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def make(device, dtype, *, lens_q, lens_k=None, dims=(192, 128), heads=(2, 2), causal=True, spare=0):
    """Random packed inputs; `spare` rows at the end belong to no sequence and are NaN."""
    lens_k = lens_q if lens_k is None else lens_k
    sizes = ((lens_q, heads[0], dims[0]), (lens_k, heads[1], dims[0]), (lens_k, heads[1], dims[1]))
    tensors = [torch.randn(sum(lens) + spare, number, dim) for lens, number, dim in sizes]
    tensors.append(torch.randn(sum(lens_q) + spare, heads[0], dims[1]))
    for tensor, lens in zip(tensors, (lens_q, lens_k, lens_k, lens_q), strict=True):
        tensor[sum(lens) :] = torch.nan
    q, k, v, d_out = (tensor.to(device, dtype) for tensor in tensors)
    arguments = {
        "cu_seqlens_q": starts(lens_q, device), "cu_seqlens_k": starts(lens_k, device),
        "max_seqlen_q": max(lens_q), "max_seqlen_k": max(lens_k),
        "softmax_scale": dims[0] ** -0.5, "causal": causal,
    }  # fmt: skip
    return Case(q, k, v, d_out, arguments)


def run(case, implementation, dtype=None):
    """Out, lse and the gradients of q, k and v; `dtype` is what it is computed in."""
    inputs = [part.to(dtype or part.dtype).detach().requires_grad_() for part in (case.q, case.k, case.v)]
    out, lse = mla_prefill(*inputs, **case.arguments, return_lse=True, implementation=implementation)
    used = int(case.arguments["cu_seqlens_q"][-1])
    d_out = case.d_out.to(out.dtype)
    if implementation == "reference":
        d_out = torch.cat((d_out[:used], torch.zeros_like(d_out[used:])))
    return [out, lse, *torch.autograd.grad(out, inputs, d_out)]


def check(case, implementation="triton"):
    expected = run(case, "reference", torch.float32)
    found = run(case, implementation)
    for name, actual, wanted, part in zip(
        ("out", "lse", "dq", "dk", "dv"), found, expected, (case.q, None, case.q, case.k, case.v), strict=True
    ):
        assert actual.dtype == (torch.float32 if part is None else part.dtype)
        assert_close(
            actual, wanted, TOLERANCE[case.q.dtype] if name != "lse" else "fp32_attention", what=name
        )


@pytest.fixture
def blocks(device):
    """Under the interpreter, blocks smaller than the sequences, so that there is more than one."""
    if device == "cuda":
        yield
        return
    with overriding("mla_prefill", {"block_queries": 32, "block_keys": 16}):
        yield


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dims", DIMS, ids=lambda dims: f"{dims[0]}-{dims[1]}")
def test_packed_sequences(device, dtype, blocks, dims, causal):
    heads = (2, 2) if dims == DIMS[0] else (1, 1)
    check(make(device, dtype, lens_q=SMALL[device], dims=dims, heads=heads, causal=causal))


@pytest.mark.parametrize(("queries", "keys"), [(16, 32), (32, 16), (32, 32), (64, 16)])
def test_blocks_of_other_sizes(device, queries, keys):
    with overriding("mla_prefill", {"block_queries": queries, "block_keys": keys, "tma": 0}):
        check(make(device, torch.float16, lens_q=(70,), lens_k=(83,), dims=(64, 64), heads=(1, 1)))


def test_lengths_around_the_blocks_that_are_launched(device, dtype):
    lengths = (63, 65, 130) if device == "cpu" and dtype == torch.float32 else LENGTHS
    check(make(device, dtype, lens_q=lengths, dims=(96, 64), heads=(1, 1)))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_other_keys_than_queries(device, dtype, blocks, causal):
    """More keys, fewer (the first queries see nothing), none, and keys that nobody asks for."""
    lens = {"lens_q": (5, 20, 17, 9, 0, 16), "lens_k": (40, 7, 0, 9, 11, 33)}
    check(make(device, dtype, **lens, dims=(96, 64), heads=(2, 2), causal=causal))


def test_lengths_of_64_bits(device, blocks):
    case = make(device, torch.float16, lens_q=(5, 0, 17), dims=(16, 16), heads=(1, 1))
    expected = run(case, "triton")
    case.arguments |= {name: case.arguments[name].long() for name in ("cu_seqlens_q", "cu_seqlens_k")}
    for found, wanted in zip(run(case, "triton"), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.aot
@pytest.mark.parametrize("kernel", ["forward", "backward_keys", "backward_queries"])
def test_lengths_of_64_bits_compile(kernel):
    """On Hopper they become places for the copy engine, which takes 32 bits."""
    from ic_model.ops.mla_prefill.aot import backward_variant, forward_variant

    made = forward_variant(90, 64, 64) if kernel == "forward" else backward_variant(90, kernel, 64, 64)
    wide = {name: "*i64" for name in made.signature if name.startswith("cu_")}
    assert wide and compile_variant(replace(made, signature={**made.signature, **wide}), 90).tma


@pytest.mark.parametrize("heads", [(4, 2), (3, 1)])
def test_grouped_heads(device, dtype, blocks, heads):
    check(make(device, dtype, lens_q=(20, 1), dims=(48, 32), heads=heads))


@pytest.mark.parametrize("spare", [3, 70])
@pytest.mark.parametrize("lens", [(20, 33), (16, 0)])
def test_rows_of_no_sequence_are_not_read_and_get_zeros(device, blocks, lens, spare):
    case = make(device, torch.float32, lens_q=lens, dims=(64, 64), heads=(1, 1), spare=spare)
    found = run(case, "triton")
    short = Case(*(part[: sum(lens)] for part in (case.q, case.k, case.v, case.d_out)), case.arguments)
    for index, (actual, wanted) in enumerate(zip(found, run(short, "triton"), strict=True)):
        parts = actual.split((sum(lens), spare), dim=1 if index == 1 else 0)
        assert_close(parts[0], wanted, "exact")
        assert (parts[1] == (-torch.inf if index == 1 else 0)).all()


def test_garbage_beside_the_inputs_is_not_read(device, blocks):
    """Inputs are parts of wider tensors full of NaN, and the token stride is not the heads' width."""
    lens = (33, 18)
    plain = make(device, torch.float16, lens_q=lens, dims=(48, 32))
    wide = []
    for part in (plain.q, plain.k, plain.v, plain.d_out):
        holder = torch.full((part.shape[0], 4, 176), torch.nan, dtype=part.dtype, device=part.device)
        inner = holder[:, 1:3, 16 : 16 + part.shape[2]]
        inner.copy_(part)
        wide.append(inner)
    for actual, wanted in zip(run(Case(*wide, plain.arguments), "triton"), run(plain, "triton"), strict=True):
        assert_close(actual, wanted, "exact")


@pytest.mark.parametrize(("layout", "causal"), [("btnd", True), ("bntd", True), ("bntd", False)])
def test_dense_is_packed(device, dtype, blocks, layout, causal):
    case = make(device, dtype, lens_q=(20, 20), lens_k=(37, 37), dims=(48, 32), heads=(2, 1), causal=causal)
    packed = run(case, "triton")
    parts = [part.unflatten(0, (2, -1)).transpose(1, 2) for part in (case.q, case.k, case.v, case.d_out)]
    if layout == "bntd":
        parts = [part.contiguous() for part in parts]
    inputs = [part.detach().requires_grad_() for part in parts[:3]]
    arguments = {name: case.arguments[name] for name in ("softmax_scale", "causal")}
    out, lse = mla_prefill_dense(*inputs, **arguments, return_lse=True, implementation="triton")
    found = [out, *torch.autograd.grad(out, inputs, parts[3])]
    for actual, wanted in zip(found, (packed[0], *packed[2:]), strict=True):
        assert_close(actual.transpose(1, 2).flatten(0, 1), wanted, "exact")
    assert_close(lse.transpose(0, 1).flatten(1), packed[1], "exact")
    out_only = mla_prefill_dense(*parts[:3], **arguments, implementation="reference")
    assert_close(out, out_only, TOLERANCE[dtype])


def test_chunks_merge_into_the_whole(device, dtype, blocks):
    """A prefill of the last queries: their own chunk is causal, the context before is not."""
    lens_q, context = (17, 5, 20), (30, 0, 7)
    case = make(device, dtype, lens_q=lens_q, dims=(96, 64))
    before = make(device, dtype, lens_q=lens_q, lens_k=context, dims=(96, 64), causal=False)
    before.q = case.q
    parts = [
        mla_prefill(part.q, part.k, part.v, **part.arguments, return_lse=True, implementation="triton")
        for part in (before, case)
    ]
    assert parts[0][1][:, 17:22].isneginf().all() and not parts[0][0][17:22].any()
    out, lse = merge_attention(*parts[0], *parts[1])
    both = [
        torch.cat(
            [piece for pair in zip(old.split(context), new.split(lens_q), strict=True) for piece in pair]
        )
        for old, new in ((before.k, case.k), (before.v, case.v))
    ]
    lens_k = [old + new for old, new in zip(context, lens_q, strict=True)]
    arguments = case.arguments | {"cu_seqlens_k": starts(lens_k, device), "max_seqlen_k": max(lens_k)}
    whole = mla_prefill(
        *(part.float() for part in (case.q, *both)), **arguments, return_lse=True, implementation="reference"
    )
    assert_close(out, whole[0], TOLERANCE[dtype])
    assert_close(lse, whole[1], "fp32_attention")


def test_merging_in_place_is_merging():
    out_a, out_b = torch.randn(2, 40, 3, 8)
    # up to where one side is all there is
    lse_a, lse_b = torch.randn(2, 3, 40) * 40
    expected = merge_attention(out_a, lse_a, out_b.bfloat16(), lse_b)
    # as ring attention has them: some of more tokens
    out, lse = torch.full((50, 3, 8), 7.0), torch.full((3, 50), 7.0)
    out[5:45], lse[:, 5:45] = out_a, lse_a
    merge_attention_(out[5:45], lse[:, 5:45], out_b.bfloat16(), lse_b)
    assert_close(out[5:45], expected[0], "fp32_peer")
    assert_close(lse[:, 5:45], expected[1], "fp32_peer")
    assert (out[:5] == 7).all() and (out[45:] == 7).all() and (lse[:, 45:] == 7).all()


def test_merging_with_what_saw_nothing():
    out_a, out_b = torch.randn(2, 4, 1, 8)
    lse_a = torch.tensor([[0.5, -torch.inf, 1.0, -torch.inf]])
    lse_b = torch.tensor([[1.5, 2.0, -torch.inf, -torch.inf]])
    out_a[1::2], out_b[2:] = torch.nan, torch.nan
    out, lse = merge_attention(out_a, lse_a, out_b, lse_b)
    weight = torch.sigmoid(torch.tensor(1.0))
    expected = torch.stack(
        [out_a[0] * (1 - weight) + out_b[0] * weight, out_b[1], out_a[2], torch.zeros(1, 8)]
    )
    assert_close(out, expected, "fp32_peer")
    assert_close(lse, torch.logaddexp(lse_a, lse_b), "fp32_peer")
    assert merge_attention(out_a.half(), lse_a, out_b.half(), lse_b)[0].dtype == torch.float16
    with pytest.raises(ValueError, match=r"lse_a \[4, 1\]"):
        merge_attention(out_a, lse_a.T, out_b, lse_b)


def test_long_scores_do_not_overflow(device, blocks):
    case = make(device, torch.float16, lens_q=(40,), dims=(64, 64), heads=(1, 1))
    case.q *= 50
    case.k *= 50
    found = run(case, "triton")
    assert_close(found[0], run(case, "reference", torch.float32)[0], "fp16_attention")
    assert all(part.isfinite().all() for part in found)


def test_runs_are_equal_bit_by_bit(device, dtype, blocks):
    case = make(device, dtype, lens_q=SMALL[device], dims=(48, 32), heads=(1, 1))
    for first, second in zip(run(case, "triton"), run(case, "triton"), strict=True):
        assert_close(first, second, "exact")


def test_without_tokens(device):
    case = make(device, torch.float16, lens_q=(0,), dims=(64, 64))
    case.arguments |= {"max_seqlen_q": 0, "max_seqlen_k": 0}
    for part in run(case, "triton"):
        assert part.numel() == 0
    keyless = make(device, torch.float16, lens_q=(3,), lens_k=(0,), dims=(64, 64))
    found = run(keyless, "triton")
    assert not found[0].any() and found[1].isneginf().all() and not found[2].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (8, 2, 32)}, "q and k in it"),
        ({"q": (8, 3, 64)}, "heads of q must be a multiple"),
        ({"v": (8, 2, 40)}, "v has last dimension 40"),
        ({"q": (8, 64)}, "3 dimensions each"),
        ({"cu_seqlens_q": torch.tensor([0.0, 8.0])}, "cu_seqlens_q is torch.float32"),
        ({"cu_seqlens_k": torch.tensor([0, 4, 8])}, "cu_seqlens_q has 2 numbers and cu_seqlens_k 3"),
        ({"max_seqlen_q": 0}, "max_seqlen_q is 0 with 8 tokens"),
        ({"softmax_scale": 0.0}, "softmax_scale is 0.0"),
        ({"implementation": "flash"}, "accepts 'cudnn', 'triton', 'gluon', 'torch', 'reference'"),
    ],
)
def test_callers_mistakes(change, message):
    shapes = {"q": (8, 2, 64), "k": (8, 2, 64), "v": (8, 2, 64)}
    tensors = {name: torch.zeros(change.get(name, shape)) for name, shape in shapes.items()}
    arguments = {
        "cu_seqlens_q": torch.tensor([0, 8]), "max_seqlen_q": 8, "max_seqlen_k": 8, "softmax_scale": 1.0,
    } | {name: value for name, value in change.items() if name not in shapes}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        mla_prefill(*tensors.values(), **arguments)


def test_more_tokens_than_kernels_can_count():
    q = torch.zeros(1, 1, 16).expand(2**31, 1, 16)
    lengths = {"cu_seqlens_q": torch.tensor([0, 2**31]), "max_seqlen_q": 2**31, "max_seqlen_k": 2**31}
    with pytest.raises(ValueError, match="q has 2147483648 tokens; accepted: up to 2147483647"):
        mla_prefill(q, q, q, **lengths, softmax_scale=1.0)


CANNOT_RUN = OutOfResources(240000, 232448, "shared memory")


@pytest.mark.parametrize(
    ("by_name", "error"), [(False, CANNOT_RUN), (True, CANNOT_RUN), (False, ValueError("a mistake"))], ids=str
)
def test_a_backward_pass_that_does_not_run_falls_back(monkeypatch, caplog, by_name, error):
    """With one warning, and compiled once; not where the kernel was asked for, nor after other errors."""
    calls = []

    def broken(*_):
        calls.append("gluon")
        raise error

    monkeypatch.setattr(dispatching, "_failed", set())
    monkeypatch.setattr(dispatching, "_warned", set())
    # the tests' conftest asks for determinism, which that kernel has not
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    monkeypatch.setattr(launch, "backward_gluon", broken)
    monkeypatch.setattr(launch, "backward", lambda *_: calls.append("triton"))
    problem = Problem(cu_q=None, cu_k=None, softmax_scale=1.0, causal=True, gluon=True, by_name=by_name)
    tensors = [torch.zeros(1, 4, 1, 16)] * 5 + [torch.zeros(1, 1, 4)]
    if by_name or error is not CANNOT_RUN:
        with pytest.raises(type(error)):
            launch.gradients(*tensors, problem)
        return
    for _ in range(2):
        launch.gradients(*tensors, problem)
    assert calls == ["gluon", "triton", "triton"]
    (record,) = caplog.records
    assert record.getMessage().startswith("mla_prefill_backward: gluon does not run here, taking the next")


def test_a_kernel_asked_for_by_name_is_so_in_the_backward_pass(monkeypatch):
    seen = []
    monkeypatch.setattr(mla_prefill_package, "_gluon_refuses", lambda *_, **__: None)
    monkeypatch.setattr(launch, "attention", lambda q, k, v, problem: seen.append(problem) or (q, q))
    case = make("cpu", torch.float32, lens_q=(9,), dims=(32, 16))
    mla_prefill(case.q, case.k, case.v, **case.arguments, implementation="gluon")
    assert seen[0].gluon and seen[0].by_name


def test_only_cuda_has_kernels_of_pytorch():
    assert all(order[-1] == "reference" for order in AUTOMATIC_ORDER.values())
    case = make("cpu", torch.float32, lens_q=(9,), dims=(32, 16))
    for name in ("cudnn", "torch", "gluon"):
        with pytest.raises(ValueError, match=f"implementation is '{name}', which cannot compute"):
            mla_prefill(case.q, case.k, case.v, **case.arguments, implementation=name)


def test_reference_is_attention_of_pytorch():
    case = make("cpu", torch.float32, lens_q=(9, 9), dims=(32, 16))
    heads_first = [part.unflatten(0, (2, 9)).transpose(1, 2) for part in (case.q, case.k, case.v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, scale=32**-0.5)
    out = mla_prefill(case.q, case.k, case.v, **case.arguments, implementation="reference")
    assert_close(out, expected.transpose(1, 2).flatten(0, 1), "fp32_peer")
