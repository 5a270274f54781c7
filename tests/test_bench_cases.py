"""What the benchmarks count: bytes, FLOP, and the check before a number."""

import pickle

import pytest
import torch

from bench.cases import OPS, op_bench
from bench.cases.common import PEAK_FACTOR, Prepared, Work, WrongOutput, check_outputs, relative_error
from bench.cases.latent_cache import LatentCase
from bench.cases.latent_cache import build as build_latent
from bench.cases.mla_decode import DecodeCase
from bench.cases.mla_decode import build as build_decode
from bench.cases.mla_prefill import PrefillCase
from bench.cases.rms_norm import NormCase
from bench.cases.rope import RopeCase
from bench.peers import PEERS, load_peer, peer_names
from bench.roofline import Roofline

CPU = torch.device("cpu")
CEILINGS = Roofline(read_gb_per_s=4000.0, copy_gb_per_s=3000.0, bf16_tflops=700.0, read_kernel="x")


@pytest.mark.parametrize("op", OPS)
def test_cases_are_distinct_and_travel_to_other_processes(op):
    bench = op_bench(op)
    assert len(set(bench.cases)) == len(bench.cases) == len({case.label for case in bench.cases})
    assert set(bench.quick) <= set(bench.cases)
    for case in [*bench.cases, *bench.toy]:
        assert pickle.loads(pickle.dumps(case)) == case
        assert {"heads", "batch", "context_tokens", "query_tokens"} <= set(case.row())
        assert case.work().bytes > 0
        assert case.work().flop > 0


def test_the_issues_decode_table_is_covered():
    cases = {
        (c.row_dim, c.heads, c.batch, c.context_tokens, c.query_tokens, c.kv_dtype)
        for c in op_bench("mla_decode").cases
    }
    shapes = ((1, 8192), (1, 131_072), (1, 1_048_576), (32, 8192), (128, 8192), (4, 32_768), (8, 500_000))
    for row in (576, 320):
        for heads in (16, 32):
            assert {(row, heads, *shape, 1, "bfloat16") for shape in shapes} <= cases
            for shape in ((1, 131_072), (1, 1_048_576), (128, 8192), (8, 500_000)):
                assert (row, heads, *shape, 1, "fp8_e4m3") in cases
        assert {(row, 128, batch, 8192, 1, "bfloat16") for batch in (32, 128)} <= cases
        assert any(case[0] == row and case[4] == 4 for case in cases)
    with pytest.raises(ValueError, match=r"op is 'gemm'; it must be one of mla_decode, mla_prefill"):
        op_bench("gemm")


def test_decode_work():
    # 1,000 rows of 576 numbers, once; a product over 576 and one over 512 numbers per head and row
    work = DecodeCase(row_dim=576, heads=16, batch=1, context_tokens=1000).work()
    assert work.flop == 2 * 16 * 1000 * (576 + 512)
    side = 16 * (2 * (576 + 512) + 4) + 4 * (16 + 1)
    assert work.bytes == 1000 * 576 * 2 + side
    fp8 = DecodeCase(row_dim=576, heads=16, batch=1, context_tokens=1000, kv_dtype="fp8_e4m3").work()
    assert fp8.bytes == 1000 * 576 + side
    # of 3 queries the first sees 2 rows less than the last, the second 1
    three = DecodeCase(row_dim=320, heads=1, batch=2, context_tokens=10, query_tokens=3).work()
    assert three.flop == 2 * 2 * (8 + 9 + 10) * (320 + 256)


def test_prefill_work():
    forward = PrefillCase(heads=2, batch=3, context_tokens=4).work()
    assert forward.flop == 2 * 3 * 2 * (1 + 2 + 3 + 4) * (192 + 128)
    assert forward.bytes == 12 * 2 * (2 * (192 + 192 + 128 + 128) + 4)
    backward = PrefillCase(heads=2, batch=3, context_tokens=4, direction="backward").work()
    assert backward.flop == forward.flop * (3 * 192 + 2 * 128) // (192 + 128)


def test_work_of_the_small_ops():
    assert NormCase(row_dim=512, tokens=3).work().bytes == 2 * 512 * (2 * 3 + 1)
    assert NormCase(row_dim=512, tokens=3, residual=True).work().bytes == 2 * 512 * (4 * 3 + 1)
    assert NormCase(row_dim=512, tokens=3, direction="backward").work().bytes == 2 * 512 * (3 * 3 + 2)
    assert RopeCase(heads=4, tokens=3).work().bytes == 3 * (4 * 64 * 2 * 2 + 2 * 32 * 4)
    per_token = 320 * 2 + 320 + 2 * 32 * 4 + 8
    assert LatentCase(row_dim=320, tokens=3, kv_dtype="fp8_e4m3").work().bytes == 3 * per_token + 2 * 256


def test_roofline_is_the_slower_of_bytes_and_flop():
    assert CEILINGS.bound_us(Work(bytes=4_000_000, flop=1, traffic="read")) == pytest.approx(1.0)
    # the faster one: a copy by PyTorch is slower than kernels that copy
    assert CEILINGS.bound_us(Work(bytes=4_000_000, flop=1, traffic="copy")) == pytest.approx(1.0)
    assert CEILINGS.bound_us(Work(bytes=1, flop=1_400_000_000, traffic="read")) == pytest.approx(2.0)


def test_pages_of_a_decode_problem_are_its_own():
    case = DecodeCase(row_dim=320, heads=2, batch=3, context_tokens=300, lengths=(1, 65, 300))
    problem = build_decode(case, CPU, seed=3)
    (table,) = problem.block_tables
    used = [table[index, : -(-tokens // 64)].tolist() for index, tokens in enumerate((1, 65, 300))]
    pages = [page for part in used for page in part]
    assert [len(part) for part in used] == [1, 2, 5]
    assert len(set(pages)) == len(pages), "a page of two sequences"
    assert pages != sorted(pages), "pages in order"
    assert max(pages) < problem.kv_cache.shape[0]
    again = build_decode(case, CPU, seed=3)
    assert torch.equal(again.q[0], problem.q[0])
    assert torch.equal(again.block_tables[0], table)


def test_small_decode_problem_has_the_same_shapes():
    case = DecodeCase(row_dim=320, heads=2, batch=4, context_tokens=64 * 40)
    whole, small = (build_decode(case, CPU, small=small) for small in (False, True))
    assert small.block_tables[0].shape == whole.block_tables[0].shape == (4, 40)
    assert int(small.block_tables[0].max()) < 64


@pytest.mark.parametrize("tokens", [5, 700])
def test_slots_of_a_latent_problem_are_distinct(tokens):
    problem = build_latent(LatentCase(row_dim=320, tokens=tokens), CPU)
    (slots,) = problem.slots
    assert len(slots.unique()) == tokens
    assert int(slots.max()) < problem.pages * 64
    assert problem.empty_cache().isnan().all()


class _Problem:
    def checked_part(self, name, output):
        return output[:2]


def _prepared(output, bound="bfloat16"):
    return Prepared(launches=[lambda: output], outputs=lambda returned: {"out": returned}, bound=bound)


def test_check_of_outputs():
    expected = {"out": torch.tensor([1.0, -torch.inf])}
    right = torch.tensor([1.005, -torch.inf, torch.nan])
    errors = check_outputs(_Problem(), _prepared(right), expected)
    assert errors == {"out": pytest.approx(0.005, rel=1e-2)}
    with pytest.raises(WrongOutput, match=r"out differs by 5\.0e-03"):
        check_outputs(_Problem(), _prepared(right, "float32"), expected)
    with pytest.raises(WrongOutput, match="1 elements are not finite"):
        check_outputs(_Problem(), _prepared(torch.tensor([torch.nan, -torch.inf])), expected)
    with pytest.raises(WrongOutput, match="1 elements are not finite"):
        check_outputs(_Problem(), _prepared(torch.tensor([1.0, torch.inf])), expected)
    with pytest.raises(WrongOutput, match=r"shape \[1\] instead of \[2\]"):
        relative_error(torch.ones(1), torch.ones(2))


def test_one_wrong_row_of_many_is_seen():
    expected = torch.ones(100_000)
    actual = expected.clone()
    actual[7] += 2 * PEAK_FACTOR * 1e-2
    relative, _ = relative_error(actual, expected)
    assert relative < 1e-2
    with pytest.raises(WrongOutput, match="peak"):
        check_outputs(
            type("P", (), {"checked_part": lambda self, name, output: output})(),
            _prepared(actual),
            {"out": expected},
        )


def test_peers():
    for op in OPS:
        for name in PEERS[op]:
            assert callable(load_peer(op, name))
    assert peer_names("rope", None) == ["torch_compile", "eager"]
    assert peer_names("rope", "none") == []
    assert peer_names("mla_decode", "eager,fa3") == ["eager", "fa3"]
    with pytest.raises(
        ValueError, match=r"peers has fast, faster; rope accepts torch_compile, eager or none"
    ):
        peer_names("rope", "fast,eager,faster")
