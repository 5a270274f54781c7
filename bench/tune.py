"""Find launch parameters on this GPU: `python -m bench.tune mla_decode --rows 576 --heads 16`.

Every combination of the op's grid (`bench/cases/<op>.json`) is compiled in parallel processes, checked against
the float32 reference and timed on the chosen cases. Cases that are alike in the fields by which `ops/tuning` tells
launches apart get one entry: the parameters with the smallest geometric mean of their time over each case's best.
The entries go before those for every GPU, with how they were found.
"""

from __future__ import annotations

import argparse
import datetime
import math
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ic_model.ops import launch
from ic_train.results import commit, versions

from bench.cases import OPS, op_bench
from bench.cases.common import WrongOutput, check_outputs
from bench.grids import Grid, Parameters, When, best, read_grids, write_entries
from bench.precompile import Override, Task, device_works, first_line, launched_with, precompile
from bench.run import select_cases
from bench.timing import bench_stream, measure

GRIDS = Path(__file__).parent / "cases"

# a first look at every candidate, then the best ones and the present one again, properly
LOOK_SAMPLES, LOOK_US = 7, 500.0
FINALISTS = 3
# what a new entry must gain over what is launched today: less is noise
MIN_GAIN = 0.01


@contextmanager
def recorded_shapes(op: str) -> Iterator[list[dict[str, Any]]]:
    """Inside the block, the shapes by which an op asks for launch parameters are collected."""
    shapes: list[dict[str, Any]] = []
    find = launch._find

    def recording(path: Path, capability: int, gpu: str | None, items: When) -> Any:
        if path.stem == op:
            shapes.append(dict(items))
        return find(path, capability, gpu, items)

    with mock.patch.object(launch, "_find", recording):
        yield shapes


@dataclass(kw_only=True)
class Group:
    """Cases that share an entry, its condition, and the shape by which the first of them is launched."""

    when: When
    shape: dict[str, Any]
    cases: list[Any] = field(default_factory=list)


@dataclass(kw_only=True)
class Tuner:
    """Tunes the kernels of an op one after the other; what was chosen for one holds while the next is tuned."""

    op: str
    device: torch.device
    implementation: str
    seed: int
    samples: int
    processes: int
    deadline: float
    command: str
    chosen: dict[Any, list[Override]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def groups(self, grid: Grid, cases: Sequence[Any]) -> list[Group]:
        """Cases by the condition of the entry that they would share; those that launch no such kernel in none."""
        groups: dict[When, Group] = {}
        for case in cases:
            problem = op_bench(self.op).build(case, self.device, seed=self.seed, small=True)
            prepared = problem.ours(self.implementation)
            with recorded_shapes(self.op) as shapes:
                prepared.launches[0]()
            for shape in shapes:
                if grid.kernel is None or shape.get("kernel") == grid.kernel:
                    when = grid.when(shape)
                    groups.setdefault(when, Group(when=when, shape=shape)).cases.append(case)
                    break
        return list(groups.values())

    def tune(self, grid: Grid, cases: Sequence[Any]) -> list[dict[str, Any]]:
        """Entries for one kernel, for those groups of cases where something is gained."""
        on_gpu = self.device.type == "cuda"
        processes = self.processes if on_gpu else 0
        precompile([self._task(grid, case, ()) for case in cases], processes, timeout_s=self._left_s() / 4)
        groups = self.groups(grid, cases)
        # what is launched today is the empty change
        candidates: list[Parameters] = [(), *grid.candidates()]
        tasks = [
            self._task(grid, case, candidate)
            for candidate in candidates[1:]
            for group in groups
            for case in group.cases
        ]
        errors = precompile(tasks, processes, timeout_s=self._left_s() / 2)
        entries = []
        for group in groups:
            if time.monotonic() > self.deadline:
                self.lines.append(f"{dict(group.when)}: not reached in time")
                continue
            entry = self._tune_group(grid, group, candidates, errors)
            entries += [entry] if entry else []
        return entries

    def _left_s(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def _task(self, grid: Grid, case: Any, candidate: Parameters) -> Task:
        overrides = [*self.chosen.get(case, []), *([(grid.kernel, candidate)] if candidate else [])]
        return Task(
            op=self.op,
            case=case,
            implementation=self.implementation,
            peer=False,
            overrides=tuple(overrides),
        )

    def _tune_group(
        self,
        grid: Grid,
        group: Group,
        candidates: Sequence[Parameters],
        errors: Mapping[Task, str],
    ) -> dict[str, Any] | None:
        times: dict[Parameters, dict[Any, float]] = {}
        final: dict[Parameters, dict[Any, float]] = {}
        for case in group.cases:
            alive = [c for c in candidates if self._task(grid, case, c) not in errors]
            self._measure(grid, case, alive, times, LOOK_SAMPLES, LOOK_US)
        ranked = best(times)
        finalists = [candidate for _, candidate in ranked[:FINALISTS]]
        for case in group.cases:
            self._measure(grid, case, [*{(): 0, **dict.fromkeys(finalists, 0)}], final, self.samples, 2000.0)
        if not ranked or not best(final):
            self.lines.append(f"{dict(group.when)}: no candidate computes it right")
            return None
        scores = {candidate: score for score, candidate in best(final)}
        winner = min(scores, key=scores.__getitem__)
        gain = scores.get((), math.inf) / scores[winner] - 1
        text = ", ".join(f"{name}={value}" for name, value in winner) or "as it is"
        self.lines.append(
            f"{dict(group.when)}: {text}; {gain:.1%} over today's; {len(times)} of {len(candidates)} ran"
        )
        for score, candidate in ranked[:8]:
            self.lines.append(f"    {score:.3f} {dict(candidate) or 'as it is'}")
        if not winner or gain < MIN_GAIN:
            return None
        for case in group.cases:
            self.chosen.setdefault(case, []).append((grid.kernel, winner))
        return self._entry(group, winner, final[winner])

    def _measure(
        self,
        grid: Grid,
        case: Any,
        candidates: Sequence[Parameters],
        times: dict[Parameters, dict[Any, float]],
        samples: int,
        sample_us: float,
    ) -> None:
        problem = op_bench(self.op).build(case, self.device, seed=self.seed)
        expected = problem.expected()
        for candidate in candidates:
            task = self._task(grid, case, candidate)
            if time.monotonic() > self.deadline:
                return
            try:
                with launched_with(self.op, task.overrides):
                    prepared = problem.ours(self.implementation)
                    check_outputs(problem, prepared, expected)
                    timing = measure(
                        prepared.launches, device=self.device, samples=samples, sample_us=sample_us
                    )
            except WrongOutput as error:
                self.lines.append(f"WRONG {dict(candidate)} on {case.label}: {error}")
            except Exception as error:
                if not device_works(self.device):
                    raise
                self.lines.append(f"failed {dict(candidate)} on {case.label}: {first_line(error)}")
            else:
                times.setdefault(candidate, {})[case] = timing.median_us

    def _entry(self, group: Group, winner: Parameters, measured: Mapping[Any, float]) -> dict[str, Any]:
        on_gpu = self.device.type == "cuda"
        capability = torch.cuda.get_device_capability(self.device) if on_gpu else (8, 0)
        gpu = torch.cuda.get_device_name(self.device) if on_gpu else "cpu"
        path = launch.TUNING / f"{self.op}.json"
        number = capability[0] * 10 + capability[1]
        present = launch._find(path, number, gpu, tuple(sorted(group.shape.items()))).parameters
        mean = math.exp(sum(math.log(us) for us in measured.values()) / len(measured))
        return {
            "capability": number,
            "gpu": gpu,
            "when": {name: list(value) if isinstance(value, tuple) else value for name, value in group.when},
            "parameters": {**present, **dict(winner)},
            "provenance": {
                "gpu": gpu,
                "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
                "triton": versions().get("triton", "none"),
                "commit": commit()[0],
                "command": self.command,
                "median_us": round(mean, 2),
                "cases": {case.label: round(us, 2) for case, us in measured.items()},
            },
        }


def _grids(options: argparse.Namespace) -> list[Grid]:
    grids = read_grids(options.grid or GRIDS / f"{options.op}.json")
    kernels = sorted({grid.kernel or "" for grid in grids})
    unknown = set(options.kernels) - set(kernels)
    if unknown:
        raise ValueError(f"kernels has {', '.join(sorted(unknown))}; the grid has {', '.join(kernels)}")
    return [grid for grid in grids if not options.kernels or grid.kernel in options.kernels]


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune an op; 0, or 2 for a wrong argument."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        bench = op_bench(options.op)
        cases = select_cases(bench, options.cases, rows=options.rows, heads=options.heads)
        grids = _grids(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tuner = Tuner(
        op=options.op,
        device=device,
        implementation=options.implementation,
        seed=options.seed,
        samples=options.samples,
        processes=options.processes,
        deadline=time.monotonic() + options.limit_s,
        command=shlex.join(["python", "-m", "bench.tune", *arguments]),
    )
    path = launch.TUNING / f"{options.op}.json"
    output = options.output or path
    entries: list[dict[str, Any]] = []
    with torch.cuda.stream(bench_stream(device)) if device.type == "cuda" else nullcontext():
        for grid in grids:
            entries += tuner.tune(grid, cases)
            if entries and not options.dry_run:
                write_entries(path, output, entries)
    print("\n".join(tuner.lines))
    if options.dry_run or not entries:
        print(f"{len(entries)} entries found, nothing written")
    else:
        print(f"{len(entries)} entries written to {output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    def numbers(text: str) -> list[int]:
        return [int(number) for number in names(text)]

    parser = argparse.ArgumentParser(prog="python -m bench.tune", description="Find launch parameters.")
    add = parser.add_argument
    add("op", choices=OPS)
    add("--cases", default="quick", help="quick, full, toy, or numbers from `bench.run OP --list`")
    add("--rows", type=numbers, default=[], help="only these row dimensions, such as 576,320")
    add("--heads", type=numbers, default=[], help="only these numbers of heads, such as 16,32")
    add("--kernels", type=names, default=[], help="only these kernels of the op")
    add("--grid", type=Path, help="JSON list of grids; bench/cases/OP.json if not given")
    add("--output", type=Path, help="file to write; the op's tuning file if not given")
    add("--dry-run", action="store_true", help="write nothing")
    add("--implementation", default="triton", help="of ic-model")
    add("--samples", type=int, default=20, help="per number of the last round")
    add("--seed", type=int, default=0, help="of the inputs")
    add("--limit-s", type=float, default=540.0, help="stop after so many seconds")
    add("--processes", type=int, default=14, help="that compile before the timing")
    add("--device", choices=("cuda", "cpu"), help="cuda if there is one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
