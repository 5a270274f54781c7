"""Throughput of a training run: tokens per second, FLOP per token, model FLOP utilisation, and the GPU's."""

from __future__ import annotations

import logging
import threading
import time
from importlib import import_module, util
from typing import Any

import torch
from ic_model import ICConfig
from ic_model.sizing import linear_flop_per_token, prefill_attention_flop_per_token
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ic_train.data.curriculum import Curriculum

logger = logging.getLogger(__name__)

# dense bf16 matrix rate in TFLOP/s by the vendors' data sheets, found by a part of the device's name
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0, "3090": 71.0}


def training_flop_per_token(config: ICConfig, tokens_per_sequence: int) -> float:
    """FLOP of forward and backward per trained token, the way MFU counts them (PaLM, arXiv 2204.02311, app. B).

    Three times the forward pass: the products with weights (without the embedding look-up), and the attention of
    which a causal mask needs half, averaged over the sequence.

    Args:
        config: shapes.
        tokens_per_sequence: T.
    """
    attention = prefill_attention_flop_per_token(config, tokens_per_sequence)
    return 3.0 * (linear_flop_per_token(config) + attention)


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU in TFLOP/s, or None where it is not known (then no MFU is reported)."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in device_name), None)


def training_flop(config: ICConfig, tokens: int, attended_pairs: int) -> float:
    """FLOP of forward and backward, counted as `training_flop_per_token` does, for documents of any lengths.

    Args:
        config: shapes.
        tokens: trained on.
        attended_pairs: of a query and a key that it sees, summed over documents: `t (t + 1) / 2` for one of
        t tokens.
    """
    # one token sees itself: what the sizing gives for a context of one token, is the cost of a pair
    per_pair = prefill_attention_flop_per_token(config, 1)
    return 3.0 * (tokens * linear_flop_per_token(config) + attended_pairs * per_pair)


class UtilisationSampler:
    """Samples NVML's utilisation of this process's GPU in a thread: the share of time in which a kernel ran.

    Says nothing about how much of the GPU the kernels used; that is what MFU is for.

    Args:
        interval_s: between two samples. NVML's own window is between 1/6 s and 1 s.
    """

    def __init__(self, interval_s: float = 0.25) -> None:
        self.interval_s = interval_s
        self.samples: list[float] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def possible(self) -> bool:
        """Whether there is a GPU and NVML's bindings."""
        return torch.cuda.is_available() and util.find_spec("pynvml") is not None

    def start(self) -> None:
        """Begin; without NVML nothing is sampled."""
        if self.possible and self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def take(self) -> float | None:
        """Mean of the samples since the last call, 0 to 1; None where there are none."""
        samples, self.samples = self.samples, []
        return sum(samples) / len(samples) if samples else None

    def stop(self) -> None:
        """End."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        pynvml = import_module("pynvml")
        try:
            pynvml.nvmlInit()
            # by UUID: CUDA_VISIBLE_DEVICES renumbers for CUDA, not for NVML
            uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            while not self._stop.wait(self.interval_s):
                self.samples.append(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
        except pynvml.NVMLError as error:
            # as in a container without the right to ask, or on a slice of a GPU
            logger.warning("NVML does not say how much the GPU is used: %s", error)


class ThroughputMeter(TrainerCallback):
    """Measures `tokens_per_s` and `mfu` between two lines of a trainer's log.

    Args:
        config: of the model that is trained.
        curriculum: says how many tokens each step had.
        processes: data-parallel processes, all on devices of one kind.
    """

    def __init__(self, config: ICConfig, curriculum: Curriculum, processes: int = 1) -> None:
        self.config = config
        self.curriculum = curriculum
        self.processes = processes
        self.peak = peak_tflops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        self._start_clock(0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start counting, also after a resume."""
        self._start_clock(state.global_step)

    def measure(self, finished_steps: int) -> dict[str, Any]:
        """The stage's name and the speed since the last call; empty where no step was finished since."""
        steps = range(self._first_step, finished_steps)
        if not steps:
            return {}
        seconds = time.perf_counter() - self._started
        tokens, flop = 0, 0.0
        for step in steps:
            stage = self.curriculum.stage_at(step)
            step_tokens = stage.tokens_per_sequence * stage.sequences_per_step * self.processes
            tokens += step_tokens
            flop += step_tokens * training_flop_per_token(self.config, stage.tokens_per_sequence)
        self._start_clock(finished_steps)
        measured: dict[str, Any] = {
            "stage": self.curriculum.stage_at(finished_steps - 1).name,
            "tokens_per_s": round(tokens / seconds),
        }
        if self.peak is not None:
            measured["mfu"] = round(flop / seconds / (self.peak * 1e12 * self.processes), 4)
        return measured

    def _start_clock(self, step: int) -> None:
        self._first_step = step
        self._started = time.perf_counter()
