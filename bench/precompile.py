"""Compile kernels in parallel processes before the timing: the one process that times would take minutes for it.

Each process runs an implementation once, on inputs of the case's shape and little memory, and leaves the binary in
the caches of Triton and PyTorch. Nothing is measured here, and an error here is no error: it comes again, with its
reason, where it is reported.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bench.cases import op_bench
from bench.cases.common import Prepared, Problem
from bench.peers import load_peer, preload_modules
from bench.timing import bench_stream

# compiled by ptxas or nvcc long ago, or by nobody
NOT_COMPILED = frozenset(
    {
        "eager",
        "reference",
        "fa3",
        "fa3_splits32",
        "flashmla",
        "sdpa_cudnn",
        "sdpa_efficient",
        "vllm_ops",
    }
)


# a kernel of the op, or None where it has but one, and the parameters that change
Override = tuple[str | None, tuple[tuple[str, int], ...]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One implementation of one case.

    Args:
        op: the op.
        case: of the op's benchmark.
        implementation: its name.
        peer: whether it is somebody else's.
        overrides: launch parameters other than those of `ops/tuning`, for some of the op's kernels.
    """

    op: str
    case: Any
    implementation: str
    peer: bool
    overrides: tuple[Override, ...] = ()


@contextmanager
def launched_with(op: str, overrides: Iterable[Override]) -> Iterator[None]:
    """Inside the block, an op's kernels are launched with these parameters."""
    with ExitStack() as stack:
        for kernel, parameters in overrides:
            from ic_model.ops.launch import overriding

            named = {} if kernel is None else {"kernel": kernel}
            stack.enter_context(overriding(op, dict(parameters), **named))
        yield


def prepare(task: Task, problem: Problem) -> Prepared:
    """An implementation, ready to be launched.

    Raises:
        Refused: it cannot take the problem.
    """
    if task.peer:
        return load_peer(task.op, task.implementation)(problem)
    return problem.ours(task.implementation)


def precompile(tasks: Sequence[Task], processes: int, timeout_s: float) -> dict[Task, str]:
    """Run each task once, in several processes.

    Args:
        tasks: what to compile.
        processes: at most so many at a time; 0 compiles nothing.
        timeout_s: after that the rest is left to the timing process.

    Returns:
        the error of each task that failed.
    """
    tasks = [task for task in tasks if task.implementation not in NOT_COMPILED]
    if not tasks or processes < 1:
        return {}
    # one server imports everything once, without touching the GPU, and its forks do the work
    context = multiprocessing.get_context("forkserver")
    peers = [task.implementation for task in tasks if task.peer]
    context.set_forkserver_preload(
        ["torch", "triton", "ic_model", "bench.run", "bench.tune", *preload_modules(peers)]
    )
    # a fork of a process that has counted its GPUs through CUDA cannot use them
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    # PyTorch's compiler would start processes of its own in each of ours
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    pool = ProcessPoolExecutor(min(processes, len(tasks)), mp_context=context)
    errors: dict[Task, str] = {}
    workers: list[Any] = []
    try:
        waiting = {pool.submit(_run, task): task for task in tasks}
        workers = list(pool._processes.values())
        for future in as_completed(waiting, timeout=timeout_s):
            error = future.exception()
            message = f"{type(error).__name__}: {error}" if error else future.result()
            if message:
                errors[waiting[future]] = message
    except (TimeoutError, BrokenProcessPool, OSError, EOFError) as error:
        print(f"compiling in parallel stopped: {type(error).__name__} {error}", file=sys.stderr)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        # what still runs would share the GPU with the timing
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(timeout=10)
    return errors


def _run(task: Task) -> str:
    """Launch once; returns the error, or nothing."""
    if _lost:
        return ""
    try:
        device = torch.device("cuda")
        with torch.cuda.stream(bench_stream(device)), launched_with(task.op, task.overrides):
            problem = op_bench(task.op).build(task.case, device, small=True)
            prepare(task, problem).launches[0]()
            torch.cuda.synchronize()
    except Exception as error:
        if not device_works(torch.device("cuda")):
            _lost.append(task)
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


# a task after which this process can use its GPU no more: those that follow are left to the timing process
_lost: list[Task] = []


def device_works(device: torch.device) -> bool:
    """Whether a device still computes after an error; out of memory is no reason why it should not."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).item()
    except RuntimeError as error:
        return "out of memory" in str(error)
    return True


def first_line(error: Exception) -> str:
    """The first line of an error's text: compilers append pages."""
    return (str(error).strip().splitlines() or [""])[0]
