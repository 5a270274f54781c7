"""Paged decoding: every kernel against the reference, with garbage in all memory that may not be read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from ic_model.ops.aot import AotError, compile_variant
from ic_model.ops.launch import overriding
from ic_model.ops.mla_decode import mla_decode
from ic_model.ops.mla_decode.kernel import tiles_per_program
from ic_model.ops.mla_decode.launch import MAX_SEQUENCES, Split
from ic_model.ops.mla_decode.reference import mla_decode as reference
from ic_model.testing import assert_close

BOUNDS = {torch.float32: "fp32_attention", torch.float16: "fp16_attention", torch.bfloat16: "bf16_attention"}
FP8 = torch.float8_e4m3fn
# what an unused entry of a table may hold: far outside of any cache
NO_PAGE = 2147480000
SCALE = 0.07


@dataclass
class Problem:
    """A batch of paged sequences; unused rows are NaN and unused table entries no pages."""

    q: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    kv_lora_rank: int
    kv_scale: float = 1.0
    q_rope: torch.Tensor | None = None

    def arguments(self) -> dict:
        names = ("block_table", "seq_lens", "kv_lora_rank", "kv_scale", "q_rope")
        return {name: getattr(self, name) for name in names} | {"softmax_scale": SCALE}

    def apart(self, spare: int = 16) -> Problem:
        """With the query in two tensors, as a model has them: heads first, and the end of wider rows of NaN."""
        latent, rope = self.q[..., : self.kv_lora_rank], self.q[..., self.kv_lora_rank :]
        q = latent.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
        wide = torch.nn.functional.pad(rope, (spare, 0), value=float("nan"))
        return replace(self, q=q, q_rope=wide[..., spare:])

    def run(self, implementation: str) -> tuple[torch.Tensor, torch.Tensor]:
        return mla_decode(self.q, self.kv_cache, **self.arguments(), implementation=implementation)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        parts = {"q": self.q, "q_rope": self.q_rope}
        wide = {name: part.float() for name, part in parts.items() if part is not None}
        return reference(kv_cache=self.kv_cache, **self.arguments() | wide)


def problem(
    lens, *, device, dtype, heads=16, query_tokens=1, rank=64, rope_dim=16, page_tokens=16, kv_dtype=None
) -> Problem:
    needed = [-(-length // page_tokens) for length in lens]
    kv_cache = torch.full((sum(needed) + 3, page_tokens, rank + rope_dim), float("nan"))
    block_table = torch.full((len(lens), max(needed) + 2), NO_PAGE, dtype=torch.int32)
    order = torch.randperm(len(kv_cache)).tolist()
    for seq, length in enumerate(lens):
        for place in range(needed[seq]):
            page = block_table[seq, place] = order.pop()
            rows = min(page_tokens, length - place * page_tokens)
            kv_cache[page, :rows] = torch.randn(rows, rank + rope_dim)
    return Problem(
        q=torch.randn(len(lens), query_tokens, heads, rank + rope_dim).to(device, dtype),
        kv_cache=kv_cache.to(device).to(kv_dtype or dtype),
        block_table=block_table.to(device),
        seq_lens=torch.tensor(lens, dtype=torch.int32, device=device),
        kv_lora_rank=rank,
        kv_scale=0.5 if kv_dtype else 1.0,
    )


def check(made: Problem, implementation: str) -> None:
    out, lse = made.run(implementation)
    expected, expected_lse = made.expected()
    assert out.dtype == made.q.dtype
    bound = BOUNDS[made.q.dtype]
    assert_close(out, expected, bound, what="out")
    # NaN and infinity must be where they are expected, too; a logarithm is as exact as its scores
    assert_close(lse, expected_lse, bound, what="lse")


@pytest.mark.parametrize("query_tokens", [1, 2, 5])
@pytest.mark.parametrize("heads", [1, 5, 16, 33])
def test_heads_and_query_tokens(device, dtype, heads, query_tokens):
    made = problem([70, 5, 0, 33], device=device, dtype=dtype, heads=heads, query_tokens=query_tokens)
    check(made, "triton")


@pytest.mark.parametrize("lens", [[1], [16, 16], [17, 0, 0, 1], [0, 0], [129], [3] * 40], ids=str)
def test_lengths(device, dtype, lens):
    check(problem(lens, device=device, dtype=dtype), "triton")


@pytest.mark.parametrize(
    ("rank", "rope_dim", "page_tokens"), [(64, 16, 8), (64, 16, 48), (192, 64, 64), (128, 32, 128)]
)
def test_dimensions_and_pages(device, rank, rope_dim, page_tokens):
    made = problem(
        [150, 61],
        device=device,
        dtype=torch.float16,
        rank=rank,
        rope_dim=rope_dim,
        page_tokens=page_tokens,
    )
    check(made, "triton")


@pytest.mark.parametrize("tokens_first", [0, 1])
@pytest.mark.parametrize("block_rows", [16, 32])
def test_launches(device, tokens_first, block_rows):
    """Both forms of the products, whichever this chip would take."""
    parameters = {"tokens_first": tokens_first, "block_rows": block_rows, "block_tokens": 64, "num_stages": 2}
    with overriding("mla_decode", parameters, kernel="triton"):
        check(problem([200, 0, 3], device=device, dtype=torch.float16, heads=20), "triton")


@pytest.mark.parametrize("max_splits", [2, 256])
def test_many_splits_are_combined(device, max_splits):
    with overriding("mla_decode", {"max_splits": max_splits, "elements": 256}, kernel="combine"):
        check(problem([2000], device=device, dtype=torch.float32, heads=3), "triton")


def test_fp8_rows(device):
    check(problem([100, 7, 0], device=device, dtype=torch.float16, kv_dtype=FP8), "triton")


def test_every_fp8_number(device):
    """One token per number: a query that sees one row gets that row."""
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8)
    numbers = numbers[numbers.float().isfinite()]
    cache = numbers.view(torch.uint8).view(-1, 1, 1).expand(-1, 1, 80).contiguous().view(FP8)
    count = len(numbers)
    out, _ = mla_decode(
        torch.zeros(count, 1, 1, 80, dtype=torch.float16, device=device),
        cache.to(device),
        block_table=torch.arange(count, dtype=torch.int32, device=device)[:, None],
        seq_lens=torch.ones(count, dtype=torch.int32, device=device),
        kv_lora_rank=64,
        softmax_scale=SCALE,
        kv_scale=0.5,
        implementation="triton",
    )
    expected = (numbers.float() * 0.5).half().to(device)
    assert torch.equal(out[:, 0, 0], expected[:, None].expand(-1, 64))


def test_views(device):
    """Queries of a wider tensor, pages of a cache that other layers share, a table of which a part is used."""
    made = problem([90, 20], device=device, dtype=torch.float32)
    wide_q = torch.full((2, 1, 16, 112), float("nan"), device=device)
    wide_q[..., :80] = made.q
    shared = torch.full((len(made.kv_cache), 2, 16, 80), float("nan"), device=device)
    shared[:, 1] = made.kv_cache
    wide_table = torch.full((2, 30), NO_PAGE, dtype=torch.int32, device=device)
    wide_table[:, : made.block_table.shape[1]] = made.block_table
    expected = made.expected()
    made.q, made.kv_cache, made.block_table = wide_q[..., :80], shared[:, 1], wide_table
    out, lse = made.run("triton")
    assert_close(out, expected[0], "fp32_attention")
    assert_close(lse, expected[1], "fp32_attention")


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("query_tokens", [1, 3])
def test_a_query_in_two_tensors(device, dtype, implementation, query_tokens):
    """The same bits, wherever the parts lie; where kernels could not read them, they are put together."""
    made = problem([90, 20, 0], device=device, dtype=dtype, query_tokens=query_tokens)
    expected = made.run(implementation)
    for spare in (16, 8):
        for left, right in zip(made.apart(spare).run(implementation), expected, strict=True):
            assert torch.equal(left, right)


def test_rows_that_are_not_aligned_are_left_to_the_reference(device):
    made = problem([50, 3], device=device, dtype=torch.float16, rope_dim=24)
    with pytest.raises(ValueError, match=r"strides .* accepted: multiples of 16"):
        made.run("triton")
    out, _ = mla_decode(made.q, made.kv_cache, **made.arguments())
    assert_close(out, made.expected()[0], "fp16_attention")


def test_a_query_that_does_not_begin_aligned_is_left_to_the_reference(device):
    made = problem([50, 3], device=device, dtype=torch.float16)
    expected = made.expected()[0]
    made.q = torch.nn.functional.pad(made.q.flatten(), (1, 0))[1:].view(made.q.shape)
    with pytest.raises(ValueError, match=r"q begins at address 0x.* accepted: multiples of 16"):
        made.run("triton")
    out, _ = mla_decode(made.q, made.kv_cache, **made.arguments())
    assert_close(out, expected, "fp16_attention")


def test_more_sequences_than_a_program_looks_at_are_refused(device):
    made = problem([2], device=device, dtype=torch.float32, heads=1)
    names = ("q", "block_table", "seq_lens")
    many = {name: getattr(made, name).repeat_interleave(MAX_SEQUENCES + 1, 0) for name in names}
    with pytest.raises(ValueError, match="q has 4097 sequences; accepted: up to 4096"):
        replace(made, **many).run("triton")


def test_no_sequences(device):
    made = problem([4], device=device, dtype=torch.float32)
    made.q, made.block_table, made.seq_lens = made.q[:0], made.block_table[:0], made.seq_lens[:0]
    out, lse = made.run("triton")
    assert out.shape == (0, 1, 16, 64) and lse.shape == (0, 1, 16)


@pytest.mark.parametrize(
    "lens", [[5], [1, 0, 7], [100, 3, 2], [64] * 9, [0], [2048] * 128, [131072], [900, 5000] * 7]
)
@pytest.mark.parametrize("processors", [1, 4, 132])
def test_shares_cover_the_list(lens, processors):
    """The kernels' arithmetic, in plain numbers: at most a sixteenth over an equal share, and no tile is left."""
    split = Split(batch=len(lens), rows=16, block_rows=16, block_tokens=16, processors=processors)
    tiles = [-(-length // 16) for length in lens]
    share = tiles_per_program.fn(sum(tiles), max(tiles), split.programs)
    least = max(-(-sum(tiles) // split.programs), 1)
    assert least <= share <= least * 17 / 16
    assert share * split.programs >= sum(tiles)


@pytest.mark.parametrize(("number", "tiles"), [(128, 128), (1, 2112), (33, 16), (66, 8)])
def test_equal_lengths_give_equal_pieces(number, tiles):
    """Nothing is cut that need not be: each sequence in pieces of one length, or whole ones for each program."""
    share = tiles_per_program.fn(number * tiles, tiles, 132)
    assert tiles % share == 0 or share % tiles == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kv_lora_rank": 80}, "kv_lora_rank is 80; accepted: equal rows, longer than kv_lora_rank"),
        ({"seq_lens": torch.zeros(3, dtype=torch.int32)}, "block_table for 1 and seq_lens for 3"),
        ({"seq_lens": torch.zeros(1)}, "seq_lens is torch.float32; accepted: torch.int32"),
        ({"block_table": torch.zeros(4, dtype=torch.int32)}, r"block_table has shape \[4\]; accepted: 2 dim"),
        ({"q": torch.zeros(1, 1, 16, 80, dtype=torch.float64)}, "q is torch.float64; accepted: float32"),
        (
            {"kv_cache": torch.zeros(2, 16, 80).half()},
            "kv_cache is torch.float16; accepted: q's torch.float32",
        ),
        ({"q_rope": torch.zeros(1, 1, 16, 16)}, "q_rope is .* accepted: q with rows of kv_lora_rank, q_rope"),
        ({"softmax_scale": 0.0}, "softmax_scale is 0.0; accepted: positive numbers"),
        ({"softmax_scale": float("nan")}, "softmax_scale is nan; accepted: positive numbers"),
        ({"kv_scale": float("inf")}, "kv_scale is inf; accepted: positive numbers"),
        ({"kv_scale": -1.0}, "kv_scale is -1.0; accepted: positive numbers"),
        (
            {"seq_lens": torch.zeros(1, dtype=torch.int32, device="meta")},
            "kv_cache on cpu, block_table on cpu, seq_lens on meta; accepted: one device",
        ),
        ({"implementation": "fast"}, "'fast'; mla_decode accepts 'hopper', 'turing', 'triton'"),
        ({"implementation": "hopper"}, "hopper"),
    ],
)
def test_bad_arguments_are_named(change, said):
    made = problem([4], device="cpu", dtype=torch.float32)
    arguments = made.arguments() | {"q": made.q, "kv_cache": made.kv_cache} | change
    with pytest.raises(ValueError, match=said):
        mla_decode(arguments.pop("q"), arguments.pop("kv_cache"), **arguments)


def test_the_reference_serves_where_no_kernel_can():
    made = problem([20, 3], device="cpu", dtype=torch.float32)
    made.block_table = made.block_table.long()
    out, _ = mla_decode(made.q, made.kv_cache, **made.arguments())
    assert torch.equal(out, made.expected()[0])


@pytest.mark.aot
@pytest.mark.parametrize(
    ("rank", "changes", "said"),
    [
        # with one place for tiles a crew would wait for itself
        (256, {"slots": 1}, "the next tile has come"),
        (256, {"block_rows": 64}, "half of the rows"),
        (512, {"gathers": 1, "block_rows": 128, "slots": 2}, "do not fit a crew's registers"),
    ],
)
def test_what_two_crews_of_rows_cannot_be_launched_with(rank, changes, said):
    from ic_model.ops.mla_decode.aot import hopper_variant

    with pytest.raises(AotError, match=rf"(?s)does not compile: .*{said}"):
        compile_variant(hopper_variant(rank, 128, "bf16", "bf16", **changes), 90)
