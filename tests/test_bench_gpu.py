"""What of the benchmarks needs a GPU: timing, ceilings, and peers that compute what the reference does."""

import math

import pytest
import torch

from bench.cases import op_bench
from bench.cases.common import Refused, check_outputs
from bench.cases.mla_decode import DecodeCase
from bench.peers import PEERS, prepare_peer
from bench.roofline import measure_roofline
from bench.run import main
from bench.timing import bench_stream, input_sets, l2_bytes, measure

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _stream():
    with torch.cuda.stream(bench_stream(CUDA)):
        yield


def test_a_copy_is_timed_from_a_graph():
    source = torch.randn(2**28, device=CUDA)
    target = torch.empty_like(source)
    timing = measure([lambda: target.copy_(source)], device=CUDA)
    assert timing.method == "cuda_graph"
    assert len(timing.samples_us) == 20
    assert max(timing.samples_us) < 2 * timing.median_us
    # no GPU moves bytes faster than this, and no supported one slower
    assert 100 < 2 * source.nbytes / timing.median_us / 1e3 < 20_000


def test_what_cannot_be_captured_is_timed_as_it_is():
    numbers = torch.randn(1000, device=CUDA)
    timing = measure([lambda: float(numbers.sum())], device=CUDA, samples=3)
    assert timing.method == "events"
    assert measure([numbers.sum], device=CUDA, samples=3).method == "cuda_graph"


def test_a_backward_pass_is_captured():
    x = torch.randn(1000, 100, device=CUDA, requires_grad=True)
    out = x.square()
    grad = torch.ones_like(out)
    timing = measure([lambda: torch.autograd.grad(out, x, grad, retain_graph=True)], device=CUDA, samples=3)
    assert timing.method == "cuda_graph"


def test_inputs_are_rotated_out_of_the_cache():
    assert input_sets(10 * l2_bytes(CUDA), CUDA) == 1
    assert input_sets(l2_bytes(CUDA), CUDA) == 4
    assert input_sets(1, CUDA) == 64


def test_ceilings():
    roofline = measure_roofline(CUDA, samples=5)
    assert 0.7 < roofline.read_gb_per_s / roofline.copy_gb_per_s < 1.5
    assert all(math.isfinite(n) and n > 0 for n in (roofline.read_gb_per_s, roofline.bf16_tflops))


@pytest.mark.parametrize("peer", PEERS["mla_decode"])
@pytest.mark.parametrize("row_dim", [576, 320])
def test_decode_peers_agree_with_the_reference(peer, row_dim):
    case = DecodeCase(row_dim=row_dim, heads=16, batch=3, context_tokens=1000)
    problem = op_bench("mla_decode").build(case, CUDA)
    try:
        prepared = prepare_peer("mla_decode", peer, problem)
    except Refused as reason:
        assert str(reason)
    else:
        check_outputs(problem, prepared, problem.expected())


def test_a_run(tmp_path):
    arguments = ["rms_norm", "--cases", "1", "--peers", "none", "--processes", "1"]
    assert main([*arguments, "--results", str(tmp_path)]) == 0
