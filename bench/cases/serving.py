"""Serving with real vLLM, beside stock vLLM in the same run: what the plugin is worth, and that it is right.

    python -m bench.cases.serving passkey      keys found through the server, at 131,072 and 1,048,576 tokens
    python -m bench.cases.serving decode       tokens per second behind a long context, beside stock and bandwidth
    python -m bench.cases.serving prefill      time to the first token of a long prompt, beside stock
    python -m bench.cases.serving small-card   131,072 tokens within 8 GiB, with the kernels that Turing would run
    python -m bench.cases.serving throughput   a batch workload under `vllm bench serve`, beside stock
    python -m bench.cases.serving parity       the same greedy tokens as transformers, whatever is on or off
    python -m bench.cases.serving faults       what must end in a clear error or go on

Each prints progress, stops at `--limit-s`, and writes `result.json` after every measurement. `--help` of each
lists its options. On a host without a package registry run `python -m bench.cases.serving_host` first. Stock is
the same model as a DeepSeek-V3, served by vLLM's own classes and attention. Without a GPU small numbers show that
the code works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ic_model.presets import preset_names
from ic_model.sizing import load_config, size
from ic_model.sizing_serving import PAGE_TOKENS
from ic_train.results import new_result_folder, write_result

from bench.cases.serving_engine import on_gpu
from bench.cases.serving_host import model_folder
from bench.cases.serving_server import run_child

ROOT = Path(__file__).resolve().parents[2]
STOCK = "stock"
OURS = "ours"
TURING = {"decode": "turing", "prefill": "torch"}
# left of the time for ending a server and writing
SPARE_S = 15


@dataclass
class Run:
    """A run of one point: options, deadline, and the rows found so far."""

    topic: str
    options: argparse.Namespace
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: bool = False
    started: float = field(default_factory=time.monotonic)
    folder: Path | None = None

    @property
    def left_s(self) -> float:
        """Seconds until the limit."""
        return self.options.limit_s - SPARE_S - (time.monotonic() - self.started)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, show it, and write the result."""
        row = {"point": self.topic, **row}
        self.rows.append(row)
        shown = {key: value for key, value in row.items() if not isinstance(value, list | dict)}
        print("  " + ", ".join(f"{key} {_short(value)}" for key, value in shown.items()), flush=True)
        if self.folder is None:
            self.folder = new_result_folder(Path(self.options.results), f"serving-{self.topic}")
        write_result(self.folder, f"serving-{self.topic}", self.rows, seed=self.options.seed)

    def chosen(self, cases: Iterable[str]) -> list[str]:
        """Of the cases, those that `--only` asks for: one by its whole name, or all with a word in theirs."""
        only, cases = self.options.only, list(cases)
        return [
            name
            for name in cases
            if not only or any(word == name or (word not in cases and word in name) for word in only)
        ]

    def error(self, what: str, message: str) -> None:
        """Show what did not work; the exit status will be 1."""
        self.failed = True
        print(f"  FAILED {what}: {message}", flush=True)

    def model(self, impl: str) -> Path:
        """The checkpoint that an implementation serves."""
        return model_folder(Path(self.options.models), self.options.model, stock=impl.startswith(STOCK))


def _short(value: Any) -> str:
    return (
        f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    )


def engine_arguments(run: Run, impl: str, **engine: Any) -> dict[str, Any]:
    """Arguments of vLLM's LLM for an implementation.

    Args:
        run: the run.
        impl: "ours", "stock" (vLLM's choice), or "stock:BACKEND" for one of its attention backends by name.
        engine: what the point sets.
    """
    if run.options.gpus > 1:
        engine = {"tensor_parallel_size": run.options.gpus, **engine}
    arguments = {
        "model": str(run.model(impl)),
        "dtype": run.options.dtype,
        "enable_prefix_caching": False,
        **engine,
    }
    if ":" in impl:
        arguments["attention_backend"] = impl.split(":")[1]
    section = json.loads(run.options.ic_options)
    if impl == OURS and section:
        arguments["additional_config"] = {"infinite_context": section}
    return arguments


def measure_engines(run: Run, *, lengths: list[int], **task: Any) -> None:
    """Time each implementation in its own process; a row per length."""
    o = run.options
    decode = bool(task.get("skip_prefill_attention"))
    roofline = run_child({"task": "roofline"}, 120) if decode else {}
    config = load_config(o.model if o.model in preset_names() else str(run.model(OURS)))
    for impl in o.impl.split(","):
        print(f"{impl}: {', '.join(f'{length:,}' for length in lengths)} tokens", flush=True)
        if run.left_s < 30:
            run.error(impl, "no time left; give it a run of its own with --impl")
            continue
        engine = engine_arguments(
            run, impl, max_model_len=max(lengths), kv_cache_dtype=o.kv_dtype, max_num_seqs=o.max_num_seqs
        )
        engine |= {"max_num_batched_tokens": o.step_tokens}
        if not task.get("memory_limit_gib"):
            # what the longest context takes: the peak is then what is needed, not what vLLM would fill
            kv_dtype = {"auto": "bf16", "fp8": "fp8"}[o.kv_dtype]
            per_token = size(config, context_tokens=1, kv_dtype=kv_dtype).kv_bytes_per_token
            engine["kv_cache_memory_bytes"] = (max(lengths) + 4 * PAGE_TOKENS) * per_token
        engine |= json.loads(o.engine)
        specification = {"task": "timed", "engine": engine, "lengths": lengths, "new_tokens": o.new_tokens}
        found = run_child({**specification, "limit_s": run.left_s - 30, **task}, run.left_s)
        if "error" in found:
            run.error(impl, found["error"])
            continue
        for one in found["runs"]:
            if not one["finished"]:
                run.error(f"{impl} at {one['context_tokens']:,} tokens", f"no time for it: {one}")
                continue
            run.add(_engine_row(run, impl, found, one, task, roofline, config))


def _engine_row(
    run: Run, impl: str, found: dict, one: dict, task: dict, roofline: dict, config: Any
) -> dict[str, Any]:
    o = run.options
    row: dict[str, Any] = {
        "model": o.model,
        "impl": impl,
        "context_tokens": one["context_tokens"],
        "memory_limit_gib": task.get("memory_limit_gib"),
        "kv_dtype": o.kv_dtype,
        "weight_dtype": o.dtype,
        "sequences": task.get("sequences", 1),
        "gpus": o.gpus,
        "step_tokens": found["step_tokens"],
    }
    if not task.get("skip_prefill_attention"):
        row |= {
            "ttft_s": one["ttft_s"],
            "prefill_tokens_per_s": task.get("sequences", 1) * one["context_tokens"] / one["ttft_s"],
        }
    if one["step_s"]:
        step_s = statistics.median(one["step_s"])
        row |= {"decode_tokens_per_s": task.get("sequences", 1) / step_s, "step_s": one["step_s"]}
        # several GPUs each read the whole cache, and their part of the weights
        if roofline.get("read_gb_per_s") and task.get("sequences", 1) == o.gpus == 1:
            kv_dtype = {"auto": "bf16", "fp8": "fp8"}[o.kv_dtype]
            read = size(config, context_tokens=one["context_tokens"], kv_dtype=kv_dtype).decode_read_bytes
            bound = roofline["read_gb_per_s"] * 1e9 / read
            row |= {"limit_tokens_per_s": bound, "share_of_limit": row["decode_tokens_per_s"] / bound}
            row |= {"read_gb_per_s": roofline["read_gb_per_s"]}
    row |= {
        key: one[key] for key in ("peak_gib", "reserved_gib", "beside_gib", "allocated_gib") if key in one
    }
    return row | {"cache_tokens": found["cache_tokens"], "start_s": found["start_s"]}


def decode(run: Run) -> None:
    """Tokens per second at batch 1; the context is written without attending to it, as its time is prefill's."""
    measure_engines(run, lengths=run.options.context_tokens, skip_prefill_attention=True)


def prefill(run: Run) -> None:
    """Time to the first token, the shorter prompts first; what would not end in time is said and left out."""
    measure_engines(run, lengths=sorted(run.options.context_tokens))


def small_card(run: Run) -> None:
    """One sequence and then two within the memory of a small card, float16, with Turing's kernels."""
    o = run.options
    o.dtype, o.impl = "float16", OURS
    if not json.loads(o.ic_options):
        o.ic_options = json.dumps(TURING)
    for sequences in (1, 2):
        measure_engines(
            run,
            lengths=o.context_tokens,
            memory_limit_gib=o.memory_limit_gib,
            sequences=sequences,
        )
    for row in run.rows:
        if on_gpu() and row["peak_gib"] > o.memory_limit_gib:
            run.error("memory", f"{row['peak_gib']:.2f} GiB were used, more than {o.memory_limit_gib}")
        if row["cache_tokens"] < 2 * row["context_tokens"]:
            run.error("memory", f"the cache holds {row['cache_tokens']:,} tokens, no second sequence")


def passkey(run: Run) -> None:
    """Keys found through the server: each asked for alone, behind its document, which prefix caching keeps."""
    from bench.cases.serving_passkey import find_keys

    find_keys(run)


def throughput(run: Run) -> None:
    """`vllm bench serve` on random requests, ours and stock one after the other."""
    from bench.cases.serving_throughput import load

    load(run)


def parity(run: Run) -> None:
    """Greedy tokens beside transformers' in float32 and what the served dtype changes; switches change nothing."""
    from bench.cases.serving_parity import compare

    compare(run, engine_arguments(run, OURS, **json.loads(run.options.engine)))


def faults(run: Run) -> None:
    """What must end in a clear error or a clean recovery, within its time."""
    from bench.cases.serving_faults import provoke_all

    provoke_all(run)


POINTS: dict[str, Callable[[Run], None]] = {
    "passkey": passkey,
    "decode": decode,
    "prefill": prefill,
    "small-card": small_card,
    "throughput": throughput,
    "parity": parity,
    "faults": faults,
}
SEVERAL_GPUS = ("decode", "prefill", "parity")
DEFAULTS: dict[str, dict[str, Any]] = {
    "passkey": {"model": "ic-nano", "context_tokens": [131072, 1048576]},
    "decode": {"context_tokens": [1048576], "impl": "ours,stock:TRITON_MLA", "max_num_seqs": 4},
    "prefill": {"context_tokens": [131072, 262144], "impl": "ours,stock", "new_tokens": 8, "max_num_seqs": 4},
    "small-card": {"context_tokens": [131072], "step_tokens": 2048, "max_num_seqs": 4, "new_tokens": 32},
    "throughput": {"impl": "ours,stock:TRITON_MLA", "max_num_seqs": 64},
    "parity": {"model": "ic-nano"},
    "faults": {"model": "ic-nano"},
}


def parser() -> argparse.ArgumentParser:
    """Command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    points = top.add_subparsers(dest="point", required=True)
    for name, point in POINTS.items():
        one = points.add_parser(name, help=(point.__doc__ or "").splitlines()[0])
        one.add_argument(
            "--model", default="ic-1b", help=f"{', '.join(preset_names())}, or a folder; default %(default)s"
        )
        one.add_argument(
            "--models",
            default=str(Path(tempfile.gettempdir()) / "ic-models"),
            help="folder for random weights",
        )
        one.add_argument(
            "--impl", default=OURS, help="with commas: ours, stock, stock:BACKEND; default %(default)s"
        )
        if name in SEVERAL_GPUS:
            one.add_argument(
                "--gpus", type=int, default=1, help="of one engine: tensor parallelism; default %(default)s"
            )
        one.add_argument("--dtype", default="bfloat16")
        one.add_argument("--kv-dtype", default="auto", choices=("auto", "fp8"))
        one.add_argument("--context-tokens", type=int, nargs="+", default=[1048576])
        one.add_argument("--new-tokens", type=int, default=64)
        one.add_argument(
            "--step-tokens", type=int, default=8192, help="max_num_batched_tokens; default %(default)s"
        )
        one.add_argument("--max-num-seqs", type=int, default=64)
        one.add_argument(
            "--memory-limit-gib", type=float, default=8.0, help="small-card: of the card; default %(default)s"
        )
        one.add_argument("--kv-dtypes", default="auto,fp8", help="passkey: with commas; default %(default)s")
        one.add_argument("--keys", type=int, default=200, help="passkey: per length; default %(default)s")
        one.add_argument(
            "--contexts", type=int, default=4, help="passkey: documents per length; default %(default)s"
        )
        one.add_argument("--input-tokens", type=int, default=8192, help="throughput; default %(default)s")
        one.add_argument("--output-tokens", type=int, default=256, help="throughput; default %(default)s")
        one.add_argument("--requests", type=int, default=64, help="throughput; default %(default)s")
        one.add_argument(
            "--concurrency", type=int, nargs="+", default=[64], help="throughput; default %(default)s"
        )
        one.add_argument(
            "--only",
            action="append",
            default=[],
            metavar="CASE",
            help="parity, faults: this case, or all with it in their name; may be given several times",
        )
        one.add_argument(
            "--ic-options", default="{}", help="JSON: the plugin's options, such as " + json.dumps(TURING)
        )
        one.add_argument("--engine", default="{}", help="JSON: more arguments of vLLM's LLM")
        one.add_argument("--serve", default="[]", help="JSON: more arguments of vllm serve")
        one.add_argument("--seed", type=int, default=1000)
        one.add_argument("--limit-s", type=float, default=540, help="seconds in all; default %(default)s")
        one.add_argument("--results", default=str(ROOT / "bench" / "results"))
        one.set_defaults(**{"gpus": 1, **DEFAULTS[name]})
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run a point; 1 where something failed, 2 for a wrong argument."""
    top = parser()
    options = top.parse_args(arguments)
    for name in ("ic_options", "engine", "serve"):
        try:
            json.loads(getattr(options, name))
        except ValueError as error:
            top.error(f"--{name.replace('_', '-')} is {getattr(options, name)!r}, which is not JSON: {error}")
    if options.gpus < 1:
        top.error(f"--gpus is {options.gpus}; it must be at least 1")
    run = Run(options.point, options)
    try:
        run.model(OURS)
    except ValueError as error:
        top.error(str(error))
    POINTS[options.point](run)
    ended = "failed" if run.failed else "ok"
    print(f"{ended} after {time.monotonic() - run.started:.0f} s; {run.folder or 'no result'}")
    return int(run.failed or not run.rows)


if __name__ == "__main__":
    sys.exit(main())
