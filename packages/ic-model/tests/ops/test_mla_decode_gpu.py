"""Paged decoding on a GPU: the chip's own kernel at the model's sizes, graphs, and more than 2**31 numbers."""

from __future__ import annotations

import pytest
import torch
from test_mla_decode import FP8, check, problem

from ic_model.ops.launch import overriding
from ic_model.ops.mla_decode import mla_decode
from ic_model.ops.mla_decode.launch import MAX_SEQUENCES
from ic_model.testing import assert_close

pytestmark = pytest.mark.gpu

LENS = [300, 64, 1, 1000, 0, 4097]


@pytest.fixture(params=["hopper", "triton"])
def implementation(request: pytest.FixtureRequest) -> str:
    if request.param == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel for Hopper needs one")
    return request.param


def model_problem(lens, **changes):
    return problem(
        lens, **({"device": "cuda", "dtype": torch.bfloat16, "page_tokens": 64, "rope_dim": 64} | changes)
    )


@pytest.mark.parametrize("kv_dtype", [None, FP8], ids=["16 bits", "fp8"])
@pytest.mark.parametrize("heads", [4, 16, 32, 128])
@pytest.mark.parametrize("rank", [256, 512])
def test_the_models_sizes(implementation, rank, heads, kv_dtype):
    made = model_problem(LENS, rank=rank, heads=heads, kv_dtype=kv_dtype)
    check(made, implementation)


@pytest.mark.parametrize("query_tokens", [2, 4, 8])
@pytest.mark.parametrize("heads", [5, 32])
@pytest.mark.parametrize("kv_dtype", [None, FP8], ids=["16 bits", "fp8"])
def test_query_tokens(implementation, query_tokens, heads, kv_dtype):
    lens = [max(length, query_tokens) if length else 0 for length in LENS]
    made = model_problem(lens, rank=256, heads=heads, query_tokens=query_tokens, kv_dtype=kv_dtype)
    check(made, implementation)


@pytest.mark.parametrize("rank", [256, 512])
@pytest.mark.parametrize("heads", [16, 32, 128])
@pytest.mark.parametrize("kv_dtype", [None, FP8], ids=["16 bits", "fp8"])
def test_many_tiles_per_program(implementation, rank, heads, kv_dtype):
    """Rings go round many times: what is overwritten too early shows."""
    lens = torch.randint(3000, 9000, (64,)).tolist()
    made = model_problem(lens, rank=rank, heads=heads, kv_dtype=kv_dtype)
    for _ in range(3):
        check(made, implementation)


@pytest.mark.parametrize("kv_dtype", [None, FP8], ids=["16 bits", "fp8"])
@pytest.mark.parametrize("heads", [32, 128])
@pytest.mark.parametrize("rank", [256, 512])
def test_a_query_in_two_tensors(implementation, rank, heads, kv_dtype):
    made = model_problem(LENS, rank=rank, heads=heads, kv_dtype=kv_dtype)
    for left, right in zip(made.apart(64).run(implementation), made.run(implementation), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(("rank", "slots"), [(256, 2), (256, 3), (128, 3)])
@pytest.mark.parametrize(("heads", "query_tokens"), [(128, 1), (32, 4), (48, 3)])
def test_weights_gathered_by_their_makers(heads, query_tokens, rank, slots):
    """The form for many rows, also where others are faster; rings go round many times."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel for Hopper needs one")
    parameters = {"gathers": 1, "block_rows": 128, "slots": slots}
    for lens in (LENS, torch.randint(3000, 9000, (64,)).tolist()):
        lens = [max(length, query_tokens) if length else 0 for length in lens]
        made = model_problem(lens, rank=rank, heads=heads, query_tokens=query_tokens)
        with overriding("mla_decode", parameters, kernel="hopper"):
            for _ in range(3):
                check(made, "hopper")
            first, again = made.run("hopper"), made.run("hopper")
        assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))


@pytest.mark.parametrize("page_tokens", [64, 256])
def test_float16_and_pages(implementation, page_tokens):
    check(model_problem(LENS, rank=512, dtype=torch.float16, page_tokens=page_tokens), implementation)


@pytest.mark.parametrize("sequences", [300, MAX_SEQUENCES])
def test_a_large_batch(implementation, sequences):
    lens = torch.randint(0, 700, (sequences,)).tolist()
    check(model_problem(lens, rank=256), implementation)


@pytest.mark.parametrize("kv_dtype", [None, FP8], ids=["16 bits", "fp8"])
@pytest.mark.parametrize("query_tokens", [1, 4])
@pytest.mark.parametrize(("rank", "heads"), [(512, 32), (256, 128)])
def test_equal_bits_every_time(implementation, rank, heads, query_tokens, kv_dtype):
    lens = [max(length, query_tokens) if length else 0 for length in LENS]
    made = model_problem(lens, rank=rank, heads=heads, query_tokens=query_tokens, kv_dtype=kv_dtype)
    first = made.run(implementation)
    for _ in range(5):
        for left, right in zip(first, made.run(implementation), strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("kv_dtype", [None, FP8], ids=["16 bits", "fp8"])
@pytest.mark.parametrize("query_tokens", [1, 2])
def test_a_graph_follows_changed_lengths(implementation, query_tokens, kv_dtype):
    made = model_problem([900, 700, 800], rank=256, heads=32, query_tokens=query_tokens, kv_dtype=kv_dtype)
    made.run(implementation)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = made.run(implementation)
    for lens in ([900, 700, 800], [1, 0, 799], [65, 64, 63], [0, 0, 0], [128, 700, 2]):
        lens = [max(length, query_tokens) if length else 0 for length in lens]
        made.seq_lens.copy_(torch.tensor(lens, dtype=torch.int32))
        graph.replay()
        expected, expected_lse = made.expected()
        assert_close(out, expected, "bf16_attention", what=f"out for {lens}")
        assert_close(lse, expected_lse, "bf16_attention", what=f"lse for {lens}")


def test_pages_beyond_two_to_the_31(implementation):
    """A cache of 2.3e9 numbers; the sequence lies in its last pages, and its neighbours are NaN."""
    pages = 2**31 // (64 * 576) + 4000
    kv_cache = torch.empty(pages, 64, 576, dtype=torch.bfloat16, device="cuda")
    assert kv_cache.numel() > 2**31
    used = torch.arange(pages - 8, pages, dtype=torch.int32, device="cuda")
    kv_cache[used.long()] = torch.randn(8, 64, 576, dtype=torch.bfloat16, device="cuda")
    made = model_problem([512], rank=512)
    made.kv_cache, made.block_table = kv_cache, used[None]
    check(made, implementation)


def test_the_chips_own_kernel_is_chosen():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("chooses the kernel for Hopper on Hopper")
    made = model_problem(LENS, rank=256)
    out, _ = mla_decode(made.q, made.kv_cache, **made.arguments())
    assert torch.equal(out, made.run("hopper")[0])
    # a page of 16 tokens is not for it
    small = problem(LENS, device="cuda", dtype=torch.bfloat16, rank=256, rope_dim=64, page_tokens=16)
    out, _ = mla_decode(small.q, small.kv_cache, **small.arguments())
    assert torch.equal(out, small.run("triton")[0])
