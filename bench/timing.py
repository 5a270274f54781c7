"""Time launches so that neither Python nor a cache flatters them: median of many samples.

On a GPU the launches are captured in one CUDA graph, which is what a serving engine replays, and graph replays
are timed with events. Where an op cannot be captured, its launches are timed with events as they are, Python
included, and the result says so. Inputs that are smaller than a few times the L2 cache are rotated among several
sets, so that each launch finds its inputs in memory as the layers of a model do.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

Launch = Callable[[], Any]

SAMPLES = 20
# a sample this long makes the few microseconds between two replays vanish
SAMPLE_US = 2000.0
MAX_LAUNCHES_PER_SAMPLE = 256

# so many times the L2 cache must pass between two uses of one input
L2_ROTATION = 4
# beyond that the inputs of one launch are a few KiB, and its time is that of a launch wherever they are
MAX_INPUT_SETS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What `measure` found.

    Args:
        median_us: median time of one launch.
        samples_us: time per launch of each sample.
        launches_per_sample: launches that one sample is the mean of.
        method: "cuda_graph", "events" (launched from Python) or "host" (CPU clock).
    """

    median_us: float
    samples_us: list[float]
    launches_per_sample: int
    method: str


def input_sets(num_bytes: int, device: torch.device) -> int:
    """Number of input sets to rotate among, so that no launch finds its inputs in the L2 cache.

    Args:
        num_bytes: read by one launch.
        device: a CPU gets one set.
    """
    if device.type != "cuda":
        return 1
    return max(1, min(MAX_INPUT_SETS, math.ceil(L2_ROTATION * l2_bytes(device) / max(num_bytes, 1))))


def l2_bytes(device: torch.device) -> int:
    """Size of the device's L2 cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


@lru_cache(maxsize=8)
def bench_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that everything of a benchmark runs on.

    A backward pass launches on the stream of its forward pass; a graph captures what is launched on one stream.
    Hence both, and the capture, happen on this one.
    """
    return torch.cuda.Stream(device)


def measure(
    launches: Sequence[Launch],
    *,
    device: torch.device,
    samples: int = SAMPLES,
    sample_us: float = SAMPLE_US,
) -> Timing:
    """Median time of one launch.

    Args:
        launches: the same op on different input sets, at least one; they are run in turn.
        device: where they run.
        samples: number of samples.
        sample_us: length that a sample should have.

    Raises:
        ValueError: there is no launch or no sample.
    """
    if not launches or samples < 1:
        raise ValueError(
            f"launches has {len(launches)} entries and samples is {samples}; both must be at least 1"
        )
    if device.type != "cuda":
        return _measure_host(launches, samples)
    with torch.cuda.stream(bench_stream(device)):
        return _measure_cuda(launches, samples, sample_us)


def _measure_host(launches: Sequence[Launch], samples: int) -> Timing:
    launches[0]()
    times = []
    for index in range(samples):
        start = time.perf_counter()
        launches[index % len(launches)]()
        times.append((time.perf_counter() - start) * 1e6)
    return Timing(median_us=statistics.median(times), samples_us=times, launches_per_sample=1, method="host")


def _measure_cuda(launches: Sequence[Launch], samples: int, sample_us: float) -> Timing:
    def once() -> None:
        for launch in launches:
            launch()

    # compiles, and lets libraries allocate what a capture must not
    once()
    (estimate_us,) = _event_times(once, 1)
    rounds = math.ceil(sample_us / max(estimate_us, 1e-3))
    rounds = max(1, min(rounds, MAX_LAUNCHES_PER_SAMPLE // len(launches)))

    def many() -> None:
        for _ in range(rounds):
            once()

    graph = _capture(many)
    replay, method = (many, "events") if graph is None else (graph.replay, "cuda_graph")
    # clocks and caches settle
    replay()
    count = rounds * len(launches)
    times = [elapsed / count for elapsed in _event_times(replay, samples)]
    return Timing(
        median_us=statistics.median(times), samples_us=times, launches_per_sample=count, method=method
    )


def _event_times(run: Launch, samples: int) -> list[float]:
    """Microseconds of each run; all are queued before the first is waited for, so that the GPU is never idle."""
    pairs = []
    torch.cuda.synchronize()
    for _ in range(samples):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in pairs]


def _capture(run: Launch) -> torch.cuda.CUDAGraph | None:
    """The launches of a run as a graph; None where they wait for the device or copy from the host."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # not `with torch.cuda.graph`: that empties the allocator's cache, which takes longer than the timing
    graph.capture_begin()
    try:
        run()
    except RuntimeError:
        with suppress(RuntimeError):
            graph.capture_end()
        # if the device is lost, this raises again
        torch.cuda.synchronize()
        return None
    graph.capture_end()
    return graph
