"""Time an op of ic-model beside its peers: `python -m bench.run mla_decode --peers flashmla,fa3`.

Before anything is timed, its output is compared with the float32 reference; what fails has no number, and the
exit status is 1. The result is written every few seconds, so that a run that is cut short is not lost.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ic_train.results import new_result_folder, write_result

from bench.cases import OPS, op_bench
from bench.cases.common import OpBench, Problem, Refused, WrongOutput, check_outputs
from bench.peers import peer_names
from bench.plots import plot_result
from bench.precompile import Task, device_works, first_line, precompile, prepare
from bench.roofline import Roofline, measure_roofline
from bench.tables import print_table
from bench.timing import SAMPLES, bench_stream, measure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
SELECTIONS = ("quick", "full", "toy")
# writing asks git and the driver, which takes longer than a case
WRITE_EVERY_S = 10.0

Row = dict[str, Any]


class DeviceLost(Exception):
    """After this error nothing runs on the device any more."""


def select_cases(
    bench: OpBench, selection: str, *, rows: Sequence[int] = (), heads: Sequence[int] = ()
) -> list[Any]:
    """Cases to run.

    Args:
        bench: the op.
        selection: "quick", "full", "toy", or numbers from `--list` with commas between.
        rows: keep cases with these row dimensions; none keeps all.
        heads: keep cases with these numbers of heads; none keeps all.

    Raises:
        ValueError: the selection is none of those, or nothing is left.
    """
    named = {"quick": bench.quick, "full": bench.cases, "toy": bench.toy}
    if selection in named:
        cases = list(named[selection])
    else:
        numbers = selection.split(",")
        wrong = [n for n in numbers if not n.isdigit() or not 1 <= int(n) <= len(bench.cases)]
        if wrong:
            raise ValueError(
                f"cases has {', '.join(wrong)}; accepted: {', '.join(SELECTIONS)}, or numbers from 1 to "
                f"{len(bench.cases)} with commas between (see --list)"
            )
        cases = [bench.cases[int(n) - 1] for n in numbers]
    for name, wanted in (("row_dim", rows), ("heads", heads)):
        having = sorted({case.row()[name] for case in cases if name in case.row()})
        if wanted and not having:
            raise ValueError(f"the cases of {bench.op} have no {name}")
        if set(wanted) - set(having):
            raise ValueError(f"{name} is {list(wanted)}; the chosen cases have {having}")
        if wanted:
            cases = [case for case in cases if case.row()[name] in wanted]
    if not cases:
        raise ValueError("no case is left; choose fewer filters")
    return cases


@dataclass(kw_only=True)
class Run:
    """A run of one op: what it measures with, and what it has found."""

    op: str
    device: torch.device
    roofline: Roofline
    samples: int
    seed: int
    asked_by_name: bool = True
    rows: list[Row] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    failed: bool = False

    def add_case(self, case: Any, implementations: Sequence[str], peers: Sequence[str]) -> None:
        """Check and time all implementations of a case.

        Raises:
            DeviceLost: an implementation left the device in no state to go on.
        """
        tasks = [
            Task(op=self.op, case=case, implementation=name, peer=peer)
            for names, peer in ((implementations, False), (peers, True))
            for name in names
        ]
        try:
            problem = op_bench(self.op).build(case, self.device, seed=self.seed)
            expected = problem.expected()
        except RuntimeError as error:
            # without a reference no number counts
            self.failed = True
            for task in tasks:
                self._refuse(task, f"the reference failed: {first_line(error)}")
            self._raise_if_lost("the reference", case, error)
            return
        for task in tasks:
            self._add(task, problem, expected)
        if self.device.type == "cuda":
            # the next case has other sizes
            del problem, expected
            torch.cuda.empty_cache()

    def _add(self, task: Task, problem: Problem, expected: Any) -> None:
        try:
            prepared = prepare(task, problem)
            errors = check_outputs(problem, prepared, expected)
            timing = measure(prepared.launches, device=self.device, samples=self.samples)
        except Refused as reason:
            self._refuse(task, str(reason))
            # what was asked of ic-model by name must run
            self.failed |= not task.peer and self.asked_by_name
        except WrongOutput as reason:
            self._refuse(task, f"WRONG: {reason}")
            self.failed = True
        except Exception as error:
            self._refuse(task, f"{type(error).__name__}: {first_line(error)}")
            self.failed |= not task.peer
            self._raise_if_lost(task.implementation, task.case, error)
        else:
            work, us = problem.work, timing.median_us
            self.rows.append(
                {
                    "op": self.op,
                    "impl": task.implementation,
                    **task.case.row(),
                    "median_us": us,
                    "gb_per_s": work.bytes / us / 1e3,
                    "tflops": work.flop / us / 1e6,
                    "rel_err": max(errors.values()),
                    "rel_errs": errors,
                    "ours": not task.peer,
                    "bytes": work.bytes,
                    "flop": work.flop,
                    "roofline_us": self.roofline.bound_us(work),
                    "roofline_share": self.roofline.bound_us(work) / us,
                    "read_gb_per_s": self.roofline.read_gb_per_s,
                    "timing": timing.method,
                    "launches_per_sample": timing.launches_per_sample,
                    "input_sets": problem.sets,
                    "note": prepared.note,
                    "samples_us": [round(sample, 4) for sample in timing.samples_us],
                }
            )

    def _refuse(self, task: Task, reason: str) -> None:
        self.refused.append({"impl": task.implementation, "case": task.case.label, "reason": reason})

    def _raise_if_lost(self, who: str, case: Any, error: Exception) -> None:
        if not device_works(self.device):
            self.failed = True
            raise DeviceLost(f"{who} on {case.label}: {first_line(error)}") from error


@dataclass(kw_only=True)
class Record:
    """The result of a run, in a folder that is made with the first row."""

    run: Run
    results: Path
    topic: str
    command: str
    folder: Path | None = None
    written_s: float = 0.0

    def write(self, *, at_least_every_s: float = 0.0) -> None:
        """Write all rows so far, unless that was done less than so many seconds ago."""
        if not self.run.rows or time.monotonic() - self.written_s < at_least_every_s:
            return
        self.folder = self.folder or new_result_folder(self.results, self.topic)
        write_result(self.folder, self.topic, self.run.rows, seed=self.run.seed)
        path = self.folder / "result.json"
        result = json.loads(path.read_text())
        rows = result.pop("rows")
        result |= {
            "command": self.command,
            "roofline": self.run.roofline.fields(),
            "refused": self.run.refused,
        }
        path.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
        self.written_s = time.monotonic()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0, 1 where a check failed or an implementation of ic-model did not run, 2 for a wrong argument.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    bench = op_bench(options.op)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        peers = peer_names(options.op, options.peers)
        selection = options.cases or ("full" if device.type == "cuda" else "toy")
        cases = select_cases(bench, selection, rows=options.rows, heads=options.heads)
        if options.samples < 1:
            raise ValueError(f"samples is {options.samples}; it must be at least 1")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.list:
        for number, case in enumerate(bench.cases, 1):
            print(f"{number:3d} {case.label}{'' if case in cases else '  (not chosen)'}")
        return 0
    implementations = options.implementation or list(bench.implementations)
    command = shlex.join(["python", "-m", "bench.run", *arguments])
    stream = torch.cuda.stream(bench_stream(device)) if device.type == "cuda" else nullcontext()
    with stream:
        return _run_cases(options, device, cases, implementations, peers, command)


def _run_cases(
    options: argparse.Namespace,
    device: torch.device,
    cases: Sequence[Any],
    implementations: Sequence[str],
    peers: Sequence[str],
    command: str,
) -> int:
    start = time.monotonic()
    if device.type == "cuda":
        tasks = [
            Task(op=options.op, case=case, implementation=name, peer=name in peers)
            for case in cases
            for name in [*implementations, *peers]
        ]
        errors = precompile(tasks, options.processes, timeout_s=options.limit_s / 2)
        _say(f"compiled in parallel: {time.monotonic() - start:.0f} s, {len(errors)} errors")
        for task, error in list(errors.items())[:5]:
            _say(f"  {task.implementation} on {task.case.label}: {error}")
    run = Run(
        op=options.op,
        device=device,
        roofline=measure_roofline(device, samples=options.samples),
        samples=options.samples,
        seed=options.seed,
        asked_by_name=bool(options.implementation),
    )
    record = Record(run=run, results=options.results, topic=options.op.replace("_", "-"), command=command)
    done = 0
    try:
        for case in cases:
            if time.monotonic() - start > options.limit_s:
                break
            run.add_case(case, implementations, peers)
            done += 1
            record.write(at_least_every_s=WRITE_EVERY_S)
            _say(f"{done}/{len(cases)} {case.label}: {time.monotonic() - start:.0f} s")
    except DeviceLost as error:
        _say(f"the device is lost: {error}")
    finally:
        record.write()
    folder = record.folder
    print(print_table(options.op, run.rows, peers, run.refused))
    print(_ceilings(run.roofline))
    if done < len(cases):
        print(f"stopped after {done} of {len(cases)} cases (--limit-s is {options.limit_s:g})")
    if folder is not None:
        print(f"written: {', '.join(str(path) for path in [folder / 'result.json', *plot_result(folder)])}")
    return int(run.failed or done == 0)


def _ceilings(roofline: Roofline) -> str:
    return (
        f"measured in this run: read {roofline.read_gb_per_s:,.0f} GB/s ({roofline.read_kernel}), copy "
        f"{roofline.copy_gb_per_s:,.0f} GB/s, bf16 product {roofline.bf16_tflops:,.0f} TFLOP/s"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    def numbers(text: str) -> list[int]:
        return [int(number) for number in names(text)]

    parser = argparse.ArgumentParser(prog="python -m bench.run", description="Time an op beside its peers.")
    add = parser.add_argument
    add("op", choices=OPS)
    add("--peers", help="names with commas between, or none; all that there are if not given")
    add(
        "--implementation",
        type=names,
        default=[],
        help="of ic-model, with commas between; triton if not given",
    )
    add("--cases", help="quick, full, toy, or numbers from --list; full if not given, toy without a GPU")
    add("--rows", type=numbers, default=[], help="only these row dimensions, such as 576,320")
    add("--heads", type=numbers, default=[], help="only these numbers of heads, such as 16,32")
    add("--samples", type=int, default=SAMPLES, help="per number")
    add("--seed", type=int, default=0, help="of the inputs")
    add("--results", type=Path, default=RESULTS, help="folder of results")
    add("--limit-s", type=float, default=540.0, help="start no case after so many seconds")
    add("--processes", type=int, default=12, help="that compile before the timing; 0 for none")
    add("--device", choices=("cuda", "cpu"), help="cuda if there is one")
    add("--list", action="store_true", help="print the cases and their numbers, and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
