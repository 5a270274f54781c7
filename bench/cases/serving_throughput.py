"""A batch workload through a real server, by vLLM's own `vllm bench serve`: tokens per second and latencies."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cases.serving_server import VLLM, ServerFailed, serve

if TYPE_CHECKING:
    from bench.cases.serving import Run


def load(run: Run) -> None:
    """A row per implementation and number of requests at a time."""
    o = run.options
    for impl in o.impl.split(","):
        arguments = ["--max-model-len", str(o.input_tokens + o.output_tokens + 64), "--dtype", o.dtype]
        arguments += ["--max-num-seqs", str(o.max_num_seqs), "--max-num-batched-tokens", str(o.step_tokens)]
        arguments += ["--no-enable-prefix-caching", "--kv-cache-dtype", o.kv_dtype, *json.loads(o.serve)]
        if ":" in impl:
            arguments += ["--attention-backend", impl.split(":")[1]]
        with tempfile.TemporaryDirectory() as scratch:
            try:
                with serve(run.model(impl), arguments, Path(scratch) / "log") as server:
                    for concurrency in o.concurrency:
                        found = _bench_serve(run, server.url, server.model, Path(scratch), concurrency)
                        if found is not None:
                            run.add(_throughput_row(o, impl, concurrency, found))
            except ServerFailed as error:
                run.error(impl, str(error))


def _bench_serve(run: Run, url: str, model: str, scratch: Path, concurrency: int) -> dict[str, Any] | None:
    o = run.options
    common = [
        "bench",
        "serve",
        "--backend",
        "vllm",
        "--base-url",
        url,
        "--model",
        model,
        "--dataset-name",
        "random",
    ]
    common += [
        "--random-input-len",
        str(o.input_tokens),
        "--random-output-len",
        str(o.output_tokens),
        "--ignore-eos",
        # what random weights draw at random is no text, which vLLM decodes again from the start with every token
        "--temperature",
        "0",
    ]
    common += [
        "--percentile-metrics",
        "ttft,tpot,itl,e2el",
        "--metric-percentiles",
        "50,90,99",
        "--seed",
        str(o.seed),
    ]
    common += ["--max-concurrency", str(concurrency), "--save-result", "--result-dir", str(scratch)]
    # the first compiles; its numbers are thrown away
    for name, requests in (("warm.json", min(2, o.requests)), ("timed.json", o.requests)):
        command = [*VLLM, *common, "--num-prompts", str(requests), "--result-filename", name]
        print(f"    {requests} requests, {concurrency} at a time", flush=True)
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                timeout=max(10, run.left_s),
                errors="replace",
            )
        except subprocess.TimeoutExpired:
            run.error("vllm bench serve", "no time left")
            return None
        if done.returncode:
            run.error("vllm bench serve", (done.stdout + done.stderr)[-2000:])
            return None
    return json.loads((scratch / "timed.json").read_text())


def _throughput_row(
    o: argparse.Namespace, impl: str, concurrency: int, found: dict[str, Any]
) -> dict[str, Any]:
    numbers = {
        key: value for key, value in found.items() if isinstance(value, int | float) and not math.isnan(value)
    }
    return {
        "model": o.model,
        "impl": impl,
        "context_tokens": o.input_tokens + o.output_tokens,
        "memory_limit_gib": None,
        "kv_dtype": o.kv_dtype,
        "concurrency": concurrency,
        "ttft_s": found.get("p50_ttft_ms", math.nan) / 1e3,
        "decode_tokens_per_s": found.get("output_throughput"),
        **{key: value for key, value in numbers.items() if key not in ("concurrency",)},
    }
