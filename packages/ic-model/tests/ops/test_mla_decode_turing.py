"""The kernel for Turing: in NumPy on the CPU, and as it is compiled, on any GPU of capability 7.5 or later.

Newer chips know Turing's matrix instruction, so that its arithmetic is tested without a Turing.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch

from ic_model.ops.aot import SHARED_LIMIT_BYTES, compile_variant
from ic_model.ops.launch import launch_parameters
from ic_model.ops.mla_decode import turing
from ic_model.ops.mla_decode.reference import mla_decode
from ic_model.testing import assert_close

ROPE_DIM = 64
# what an unused entry of a table may hold: far outside of any cache
NO_PAGE = 2147480000
SCALE = 0.07
LENS = (300, 64, 1, 1000, 0, 4097)
GPU = [pytest.param("cuda", marks=pytest.mark.gpu)]


@dataclass
class Problem:
    """A batch of paged sequences; unused rows are NaN and unused table entries no pages."""

    q: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    kv_lora_rank: int

    def arguments(self) -> dict:
        names = ("block_table", "seq_lens", "kv_lora_rank")
        return {name: getattr(self, name) for name in names} | {"softmax_scale": SCALE}

    def run(self, **options) -> tuple[torch.Tensor, torch.Tensor]:
        return turing.mla_decode_turing(self.q, self.kv_cache, **self.arguments(), **options)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        return mla_decode(self.q.float(), self.kv_cache, **self.arguments())


def problem(lens, *, device, heads=16, query_tokens=1, rank=256, page_tokens=16) -> Problem:
    needed = [-(-length // page_tokens) for length in lens]
    kv_cache = torch.full((sum(needed) + 3, page_tokens, rank + ROPE_DIM), float("nan"), dtype=torch.float16)
    block_table = torch.full((len(lens), max(needed) + 2), NO_PAGE, dtype=torch.int32)
    order = torch.randperm(len(kv_cache)).tolist()
    for seq, length in enumerate(lens):
        for place in range(needed[seq]):
            page = block_table[seq, place] = order.pop()
            rows = min(page_tokens, length - place * page_tokens)
            kv_cache[page, :rows] = torch.randn(rows, rank + ROPE_DIM).half()
    return Problem(
        q=torch.randn(len(lens), query_tokens, heads, rank + ROPE_DIM).half().to(device),
        kv_cache=kv_cache.to(device),
        block_table=block_table.to(device),
        seq_lens=torch.tensor(lens, dtype=torch.int32, device=device),
        kv_lora_rank=rank,
    )


def check(made: Problem, **options) -> None:
    found, expected = made.run(**options), made.expected()
    assert found[0].dtype == torch.float16
    # NaN and infinity must be where they are expected, too
    assert_close(found[0], expected[0], "fp16_attention", what="out")
    assert_close(found[1], expected[1], "fp32_reordered", what="lse")


@pytest.fixture(autouse=True)
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, launches go to NumPy; the kernel that combines runs in Triton's interpreter."""
    if "device" not in request.fixturenames or request.getfixturevalue("device") != "cpu":
        return
    # needs NumPy, which a machine with a GPU may lack
    from gluon_emulation import Emulated, as_halves, mma, tensor

    layouts = ("_copy_layout", "_buffer_layout", "_parts_buffer_layout", "_parts_layout")
    replaced = dict.fromkeys(layouts, lambda *_: None)
    replaced |= {"_mma": mma, "_as_halves": as_halves, "_zero": lambda: tensor(0, "int32")}
    emulation = Emulated(turing.decode_turing_kernel, replaced)
    monkeypatch.setattr(turing, "decode_turing_kernel", emulation)


def test_a_query_in_two_tensors(device):
    made = problem([70, 0, 5], device=device, heads=3, query_tokens=2)
    parts = {"q": made.q[..., : made.kv_lora_rank], "q_rope": made.q[..., made.kv_lora_rank :]}
    found = turing.mla_decode_turing(parts.pop("q"), made.kv_cache, **made.arguments(), **parts)
    for left, right in zip(found, made.run(), strict=True):
        assert torch.equal(left, right)


def test_launches_on_the_device_of_the_tensors(device, monkeypatch):
    seen = []
    monkeypatch.setattr(turing, "on_device", lambda *values: seen.extend(values) or nullcontext())
    made = problem([5], device=device)
    made.run()
    assert len(seen) == 1 and seen[0] is made.q


@pytest.mark.parametrize("sm_count", [1, 3, 9])
@pytest.mark.parametrize(
    "lens", [(5,), (37, 1, 0, 100), (0, 0), (40, 0, 0, 3, 90), (16, 32, 0)], ids=lambda lens: f"{lens}"
)
def test_lengths_and_shares(device, lens, sm_count):
    check(problem(lens, device=device, heads=4, rank=64), sm_count=sm_count)


@pytest.mark.parametrize(
    ("heads", "query_tokens"), [(1, 1), (5, 1), (33, 1), (4, 2), (3, 5), (16, 2), (4, 8)]
)
def test_heads_and_query_tokens(device, heads, query_tokens):
    made = problem([70, 3, 0, 33], device=device, heads=heads, query_tokens=query_tokens, rank=128)
    check(made, sm_count=2)


@pytest.mark.parametrize(
    ("rank", "heads", "page_tokens"),
    [(192, 3, 48), (320, 16, 16), (512, 16, 64), (512, 32, 32), (512, 17, 16), (256, 32, 128)],
)
def test_dimensions_and_pages(device, rank, heads, page_tokens):
    made = problem([90, 21], device=device, heads=heads, rank=rank, page_tokens=page_tokens)
    check(made, sm_count=2)


def test_views(device):
    """Queries of a wider tensor, pages of a cache that other layers share, a part of a table."""
    made = problem([90, 20], device=device, rank=64)
    expected = made.expected()
    wide_q = torch.full((2, 1, 16, 136), float("nan"), dtype=torch.float16, device=device)
    wide_q[..., :128] = made.q
    shared = torch.full((len(made.kv_cache), 3, 16, 136), float("nan"), dtype=torch.float16, device=device)
    shared[:, 1, :, :128] = made.kv_cache
    wide_table = torch.full((2, 30), NO_PAGE, dtype=torch.int32, device=device)
    wide_table[:, : made.block_table.shape[1]] = made.block_table
    made.q, made.kv_cache, made.block_table = wide_q[..., :128], shared[:, 1, :, :128], wide_table
    out, lse = made.run()
    assert_close(out, expected[0], "fp16_attention", what="out")
    assert_close(lse, expected[1], "fp32_reordered", what="lse")


def test_scaled_rows(device):
    """kv_scale is as if the cache held that multiple."""
    made = problem([50, 7], device=device, rank=64)
    out, lse = made.run(kv_scale=0.5)
    made.kv_cache = made.kv_cache * 0.5
    expected, expected_lse = made.expected()
    assert_close(out, expected, "fp16_attention")
    assert_close(lse, expected_lse, "fp32_reordered")


def test_no_sequences(device):
    made = problem([4], device=device, rank=64)
    made.q, made.block_table, made.seq_lens = made.q[:0], made.block_table[:0], made.seq_lens[:0]
    out, lse = made.run()
    assert out.shape == (0, 1, 16, 64) and lse.shape == (0, 1, 16)


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("query_tokens", [1, 2, 4, 8])
@pytest.mark.parametrize("heads", [4, 16, 32])
@pytest.mark.parametrize("rank", [256, 512])
def test_the_models_sizes(device, rank, heads, query_tokens):
    lens = [max(length, query_tokens) if length else 0 for length in LENS]
    check(problem(lens, device=device, heads=heads, query_tokens=query_tokens, rank=rank, page_tokens=64))


@pytest.mark.parametrize("device", GPU)
def test_a_large_batch(device):
    check(problem(torch.randint(0, 700, (300,)).tolist(), device=device))


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("rank", [256, 512])
def test_a_long_sequence_among_short_ones(device, rank):
    check(problem([17, 70001, 3], device=device, rank=rank), sm_count=40)


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize(("rank", "heads"), [(256, 32), (512, 16)])
def test_equal_bits_every_time(device, rank, heads):
    """Also shows a race in shared memory, were there one."""
    made = problem(LENS * 4, device=device, rank=rank, heads=heads)
    first = made.run()
    for _ in range(20):
        for left, right in zip(first, made.run(), strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("device", GPU)
def test_a_graph_follows_changed_lengths(device):
    made = problem([900, 700, 800], device=device, heads=32)
    made.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = made.run()
    for lens in ([900, 700, 800], [1, 0, 799], [65, 64, 63], [0, 0, 0], [128, 700, 2]):
        made.seq_lens.copy_(torch.tensor(lens, dtype=torch.int32))
        graph.replay()
        expected, expected_lse = made.expected()
        assert_close(out, expected, "fp16_attention", what=f"out for {lens}")
        assert_close(lse, expected_lse, "fp32_reordered", what=f"lse for {lens}")


@pytest.mark.parametrize("device", GPU)
def test_pages_beyond_two_to_the_31(device):
    """A cache of over 2**31 numbers; the sequence lies in its last pages, and its neighbours are NaN."""
    pages = 2**31 // (64 * 320) + 100
    kv_cache = torch.full((pages, 64, 320), float("nan"), dtype=torch.float16, device=device)
    used = torch.arange(pages - 8, pages, dtype=torch.int32, device=device)
    kv_cache[used.long()] = torch.randn(8, 64, 320, dtype=torch.float16, device=device)
    made = problem([509], device=device, page_tokens=64)
    made.kv_cache, made.block_table = kv_cache, used[None]
    check(made)


@pytest.mark.aot
@pytest.mark.parametrize("index", range(4))
def test_as_many_programs_as_are_launched_fit_on_a_processor(index):
    """65,536 registers and 64 KiB of shared memory, for all programs of a multiprocessor."""
    variant = turing.aot_variants(75)[index]
    row_dim, rows = (int(word) for word in variant.name.replace(",", "").split() if word.isdigit())
    parameters = launch_parameters("mla_decode", 75, kernel="turing", row_dim=row_dim, rows=rows)
    report = compile_variant(variant, 75)
    programs = parameters["programs_per_processor"]
    # registers are handed out to warps by 256
    registers = -(-report.registers * 32 // 256) * 256 * report.num_warps
    assert programs * registers <= 65536
    assert programs * report.shared_bytes <= SHARED_LIMIT_BYTES[75]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"q": torch.zeros(1, 1, 16, 320)}, "q is torch.float32 and kv_cache is torch.float16"),
        ({"kv_lora_rank": 200}, "kv_lora_rank is 200 and qk_rope_head_dim 120; accepted: multiples of 64"),
        ({"q": torch.zeros(4097, 1, 16, 320).half()}, "q has 4097 sequences; accepted: up to 4096"),
        ({"q": torch.zeros(1, 9, 16, 320).half()}, "q has 9 query tokens; accepted: 1 to 8"),
        ({"kv_cache": torch.zeros(4, 8, 320).half()}, "page_tokens is 8; accepted: multiples of 16"),
        (
            {"kv_cache": torch.zeros(4, 16, 324).half()[..., :320]},
            "accepted: 1 for the last dimension, and multi",
        ),
        ({"kv_cache": torch.zeros(20481).half()[1:].view(4, 16, 320)}, "kv_cache begins at address 0x"),
        ({"seq_lens": torch.zeros(1, dtype=torch.int64)}, "seq_lens is torch.int64; accepted: torch.int32"),
    ],
)
def test_bad_arguments_are_named(change, said):
    made = problem([4], device="cpu")
    arguments = made.arguments() | {"q": made.q, "kv_cache": made.kv_cache} | change
    with pytest.raises(ValueError, match=said):
        turing.mla_decode_turing(arguments.pop("q"), arguments.pop("kv_cache"), **arguments)
