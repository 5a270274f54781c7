"""Where a training step's time goes: PyTorch's profiler over some steps of a run.

MFU and utilisation say how well a GPU is used, not what to change; the table of kernels does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

TABLE_FILE, TRACE_FILE = "profile.txt", "trace.json.gz"
# the first steps compile kernels and grow the allocator's pools; the last of them starts the profiler
UNPROFILED_STEPS = 3
logger = logging.getLogger(__name__)


class StepProfile(TrainerCallback):
    """Profiles some steps after the first three and writes both files to the output folder.

    For one process: all ranks do the same. Each step is waited for. A full disk is logged, and training goes on.

    Args:
        steps: how many, at least 1.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._profiler: profile | None = None
        self._ends_s: list[float] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare."""
        on_gpu = args.device.type == "cuda"
        self._profiler = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
            schedule=schedule(wait=UNPROFILED_STEPS - 1, warmup=1, active=self.steps, repeat=1),
            on_trace_ready=lambda profiler: self._write(profiler, Path(args.output_dir)),
        )
        self._profiler.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count; kernels run on after they were launched, so that a step ends with the last of them."""
        if self._profiler is not None:
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            if len(self._ends_s) < UNPROFILED_STEPS + self.steps:
                self._ends_s.append(time.perf_counter())
            self._profiler.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End, also where the run was stopped before its steps were over."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _write(self, profiler: profile, folder: Path) -> None:
        # fewer than asked for where the run ended before
        steps = len(self._ends_s) - UNPROFILED_STEPS
        if steps < 1:
            return
        # ranges that somebody named hold kernels, which count themselves
        events = [event for event in profiler.key_averages() if not event.is_user_annotation]
        rows = [
            (event.key, event.count, event.self_device_time_total)
            for event in events
            if event.device_type == DeviceType.CUDA
        ]
        if not rows:
            rows = [(event.key, event.count, event.self_cpu_time_total) for event in events]
        wall_s = self._ends_s[-1] - self._ends_s[UNPROFILED_STEPS - 1]
        try:
            (folder / TABLE_FILE).write_text(table(rows, steps, wall_s))
            profiler.export_chrome_trace(str(folder / TRACE_FILE))
        except OSError as error:
            logger.error("the profile was not written: %s", error)


def table(rows: Iterable[tuple[str, int, float]], steps: int, wall_s: float) -> str:
    """Text of one line per kernel, those that took most first.

    Args:
        rows: name, number of launches and microseconds in all, of all steps together.
        steps: how many steps those are.
        wall_s: seconds that they took in all, under the profiler.
    """
    ordered = sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])
    total = sum(row[2] for row in ordered)
    lines = [
        f"{total / steps / 1000:.1f} ms of kernels in steps of {wall_s / steps * 1000:.1f} ms; mean of {steps}",
        f"{'ms/step':>9} {'share':>6} {'calls/step':>10}  kernel",
    ]
    lines += [
        f"{spent / steps / 1000:>9.3f} {spent / total:>6.1%} {count / steps:>10.1f}  {name[:160]}"
        for name, count, spent in ordered
    ]
    return "\n".join(lines) + "\n"
