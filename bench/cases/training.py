"""What training takes: tokens per second, MFU, utilisation and memory, by the trainer that people run.

    python -m bench.cases.training                                  # ic-1b on this GPU, ours beside PyTorch's
    python -m bench.cases.training --lengths 262144,327680 --implementations ours    # the longest that fits
    python -m bench.cases.training --gpus 8 --lengths 131072,524288,1048576 --implementations ours     # a ring
    python -m bench.cases.training --gpus 8 --ring 1 --lengths 8192 --implementations ours    # FSDP2 over 8
    python -m bench.cases.training --lengths 8192 --implementations ours --profile 2    # time by kernel
    python -m bench.cases.training --model ic-nano --toy            # two steps on the CPU: shows that it works

Each case is a process of its own, `accelerate launch --config_file accelerate/one-gpu.yaml -m ic_train.sft`, on
random weights and real text, with settings from `settings/training.json`. The first window of steps is left out
where there is another. MFU is what `ic_train.metrics` counts: three times the forward pass, attention with its
causal half, no recomputation, over the dense bf16 peak of the data sheet. Utilisation is the mean of NVML's over
the windows that count.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ic_model.byte_tokenizer import build_byte_tokenizer
from ic_train.data.text import write_corpus
from ic_train.evaluation import haystack
from ic_train.profiling import TABLE_FILE, UNPROFILED_STEPS
from ic_train.results import new_result_folder, write_result

ROOT = Path(__file__).parent.parent.parent
SETTINGS = json.loads((Path(__file__).parent / "settings" / "training.json").read_text())
LAUNCHERS = ROOT / "packages" / "ic-train" / "accelerate"
# the most important first: a time limit cuts the end
LENGTHS = (8192, 131072, 32768, 4096)
IMPLEMENTATIONS = ("ours", "torch")
TOY_LENGTHS = (256,)
# of a profile: the kernels that matter
SHOWN_LINES = 40
MEMORY_SIGNS = ("OutOfMemoryError", "out of memory")


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; the exit status: 1 where a case of ours did not run, 2 for a wrong argument."""
    options = _parser().parse_args(arguments)
    try:
        cases = _cases(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        longest = max(length for length, _ in cases)
        corpus = Path(options.corpus) if options.corpus else corpus_of_bytes(Path(scratch), longest)
        folder = None if options.toy else new_result_folder(options.results, "training")
        for length, implementation in cases:
            left_s = options.limit_s - (time.monotonic() - started)
            if left_s < options.case_s:
                print(f"left out after {options.limit_s} s: {length} {implementation}", flush=True)
                continue
            row = _run(options, length, implementation, corpus, Path(scratch), left_s)
            rows.append(row)
            _show(row)
            if "profile" in row and folder is not None:
                name = f"profile-{implementation}-{length}.txt"
                (folder / name).write_text(row["profile"])
                row["profile"] = name
            if folder is not None:
                # after every case: what was measured stays, whatever comes
                write_result(folder, "training", rows, seed=options.seed)
    failed = [
        row for row in rows if row["impl"].startswith("ours") and "error" in row and not row["out_of_memory"]
    ]
    return 1 if failed or not rows else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cases.training", description="Measure the trainer on this GPU."
    )
    add = parser.add_argument
    add("--model", default="ic-1b", help="a preset or a checkpoint's folder (default: ic-1b)")
    add("--lengths", default=",".join(map(str, LENGTHS)), help="tokens per sequence, with commas between")
    names = ", ".join(SETTINGS["implementations"])
    add("--implementations", default=",".join(IMPLEMENTATIONS), help=f"with commas between, of {names}")
    add("--corpus", help="folder that `ic-train data text` made (default: the Jargon File, in bytes)")
    add("--gpus", type=int, default=1, help="that train together; weights are sharded over all (default: 1)")
    add("--ring", type=int, default=0, help="of them share each sequence, by ring attention (default: all)")
    add("--limit-s", type=float, default=540, help="start no case that may end after so many seconds")
    add("--case-s", type=float, default=45, help="seconds that have to be left for a case to start")
    add("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the result's folder")
    add("--seed", type=int, default=0, help="of weights and order")
    add("--flags", default="", help="more flags for ic_train.sft, as one word")
    add("--profile", type=int, default=0, help="steps to profile, instead of measuring speed (default: 0)")
    add("--toy", action="store_true", help="two steps at toy lengths on the CPU, no result")
    return parser


def _cases(options: argparse.Namespace) -> list[tuple[int, str]]:
    names = options.implementations.split(",")
    for name in names:
        if name not in SETTINGS["implementations"]:
            accepted = ", ".join(SETTINGS["implementations"])
            raise ValueError(f"--implementations has {name!r}; accepted: {accepted}")
    if options.gpus < 1:
        raise ValueError(f"--gpus is {options.gpus}; it must be at least 1")
    if options.profile < 0:
        raise ValueError(f"--profile is {options.profile}; it must be at least 0")
    if options.ring < 0 or (options.ring and options.gpus % options.ring):
        raise ValueError(f"--ring is {options.ring}; it must divide --gpus, {options.gpus}")
    if options.toy:
        return [(length, name) for name in names for length in TOY_LENGTHS]
    lengths = options.lengths.split(",")
    for length in lengths:
        if length not in SETTINGS["lengths"]:
            raise ValueError(f"--lengths has {length!r}; accepted: {', '.join(SETTINGS['lengths'])}")
    return [(int(length), name) for name in names for length in lengths]


def corpus_of_bytes(scratch: Path, longest_tokens: int) -> Path:
    """The Jargon File as a corpus of bytes, for three sequences and more, which packing wants."""
    once = haystack.load_haystack("jargon")
    text = scratch / "jargon.txt"
    text.write_text(once * (1 + 4 * longest_tokens // len(once)))
    target = scratch / "corpus"
    write_corpus(target, [(str(text), "public-domain")], build_byte_tokenizer(), tokenizer_name="bytes")
    return target


def _command(options: argparse.Namespace, length: int, name: str, corpus: Path, output: Path) -> list[str]:
    toy: dict[str, Any] = {"batch": 1, "steps": 2, "window": 1, "flags": []}
    setting: dict[str, Any] = toy if options.toy else SETTINGS["lengths"][str(length)]
    flags = {
        "task": "text",
        "model": options.model,
        "corpora": corpus,
        "output_dir": output,
        "tokens_per_sequence": length,
        "per_device_train_batch_size": setting["batch"],
        "max_steps": setting["steps"] + setting["window"],
        "logging_steps": setting["window"],
        "learning_rate": 1e-4,
        "seed": options.seed,
        "save_strategy": "no",
        "save_final_model": "false",
        "report_to": "none",
        "context_parallel_size": options.ring or options.gpus,
        "disable_tqdm": "true",
    }
    if options.profile:
        steps = UNPROFILED_STEPS + options.profile
        flags |= {"profile_steps": options.profile, "max_steps": steps, "logging_steps": 1}
    flags |= {"use_cpu": "true"} if options.toy else {"bf16": "true", "optim": "adamw_torch_fused"}
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    if options.toy:
        launcher += ["--num_processes", "1", "--cpu"]
    else:
        config = LAUNCHERS / ("one-gpu.yaml" if options.gpus == 1 else "one-node.yaml")
        launcher += ["--config_file", str(config), "--num_processes", str(options.gpus)]
        # a free one: another case may run on other GPUs of the host
        launcher += ["--main_process_port", "0"]
    own = SETTINGS["implementations"][name]["flags"]
    return [*launcher, "-m", "ic_train.sft", *words, *setting["flags"], *own, *options.flags.split()]


def _run(
    options: argparse.Namespace, length: int, name: str, corpus: Path, scratch: Path, left_s: float
) -> dict[str, Any]:
    output = scratch / f"{name}-{length}"
    command = _command(options, length, name, corpus, output)
    environment = dict(os.environ)
    # long sequences come in few sizes and leave holes
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    row: dict[str, Any] = {"model": Path(options.model).name, "tokens_per_sequence": length, "impl": name}
    row |= {"gpus": options.gpus, "ring": options.ring or options.gpus}
    row["flags"] = " ".join(command[command.index("ic_train.sft") + 1 :]).replace(str(scratch), "SCRATCH")
    began = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            said, _ = process.communicate(timeout=left_s)
        except subprocess.TimeoutExpired:
            # the launcher ends what it started
            process.terminate()
            said, _ = process.communicate()
            said += "\nerror: no time left"
    row["wall_s"] = round(time.monotonic() - began, 1)
    logged = _windows(output)
    windows = logged[1:] or logged
    # a run of one window: its time is that of compiling, too
    if len(logged) == 1:
        row["compiles"] = True
    if process.returncode or not windows:
        # the launcher's own words about a rank that ended come last
        lines = [
            line for line in said.splitlines() if re.search(r"^(\[rank\d+\]: *)?(\S*Error|error)\b", line)
        ]
        lines = [line for line in lines if "ChildFailedError" not in line] or said.splitlines()[-1:]
        lines = lines or ["no output"]
        row["error"] = lines[-1].strip()[:300]
        row["out_of_memory"] = any(sign in said for sign in MEMORY_SIGNS)
        return row
    if options.profile:
        # without speeds: they were those under the profiler
        row["profile"] = (output / TABLE_FILE).read_text()
        return row
    row["samples_tokens_per_s"] = [window["tokens_per_s"] for window in windows]
    for field in ("tokens_per_s", "mfu", "gpu_util"):
        samples = [window[field] for window in windows if field in window]
        if samples:
            middle = statistics.mean if field == "gpu_util" else statistics.median
            row[field] = round(middle(samples), 4)
    row["tokens_per_s_per_gpu"] = round(row["tokens_per_s"] / options.gpus, 1)
    row["peak_gib"] = windows[-1].get("peak_gib")
    # the same for every number of GPUs and every implementation, to rounding
    row["losses"] = [round(window["loss"], 5) for window in windows]
    return row


def _windows(output: Path) -> list[dict[str, Any]]:
    file = output / "metrics.jsonl"
    if not file.is_file():
        return []
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def _show(row: dict[str, Any]) -> None:
    head = f"{row['tokens_per_sequence']:>8,} {row['impl']:<20}"
    if "error" in row:
        print(f"{head} {'out of memory' if row['out_of_memory'] else row['error']}", flush=True)
        return
    if "profile" in row:
        print(head, *row["profile"].splitlines()[:SHOWN_LINES], sep="\n", flush=True)
        return
    parts = [f"{row['tokens_per_s']:>10,.0f} tokens/s"]
    parts += [f"MFU {row['mfu']:.1%}"] if "mfu" in row else []
    parts += [f"GPU {row['gpu_util']:.1%}"] if "gpu_util" in row else []
    parts += [f"{row['peak_gib']:.1f} GiB"] if row["peak_gib"] else []
    print(head, ", ".join(parts), f"({row['wall_s']:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
