"""`ic-train convert-table`: one source at several (C, R), before and after healing, as a committed result."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from ic_model import ICForCausalLM
from torch.nn import functional as F
from transformers import AutoTokenizer

from ic_train.convert.calibration import Windows, choose_windows
from ic_train.convert.command import add_text_options, window_sizes
from ic_train.convert.options import ConversionOptions, perplexity
from ic_train.convert.run import convert
from ic_train.convert.source import Source, open_source
from ic_train.evaluation.haystack import load_haystack
from ic_train.evaluation.passkey import evaluate_passkey
from ic_train.results import device_name, new_result_folder, write_result

PAIRS = ("256:64", "192:64", "128:64", "128:32", "64:16")
PASSKEY_STAGES = ("source", "converted", "healed")
TOPIC = "conversion"

Row = dict[str, Any]


def add_convert_table(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = commands.add_parser(
        "convert-table",
        help="convert one source to several sizes, heal them, and write a result",
        description=(
            "Convert one source at several sizes of the latent row, measure perplexity on "
            "held-out text before and, "
            "with --heal-config, after healing, and write result.json. Continues where it was interrupted."
        ),
    )
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="Hugging Face folder or .gguf file")
    add("work", type=Path, metavar="WORK", help="folder for checkpoints and measurements")
    add(
        "--pairs",
        nargs="+",
        default=list(PAIRS),
        metavar="C:R",
        help=f"kv_lora_rank:qk_rope_head_dim (default: {' '.join(PAIRS)})",
    )
    add(
        "--heal-config",
        type=Path,
        metavar="RECIPE",
        help="recipe of ic_train.heal; without it, nothing is healed",
    )
    add(
        "--heal-seconds",
        type=float,
        nargs="+",
        default=[1200.0],
        metavar="S",
        help="time for each, or one time for every pair (default: 1200)",
    )
    add(
        "--heal-learning-rates",
        type=float,
        nargs="+",
        default=[],
        metavar="LR",
        help="for each, or one for every pair (default: the recipe's); what begins close to its source wants less",
    )
    add("--corpora", nargs="+", default=[], metavar="DIR", help="packed corpora to heal on")
    add(
        "--at-once",
        type=int,
        default=1,
        metavar="N",
        help="sizes healed and asked at a time, each by a process with its log in WORK; "
        "the result has those that have ended (default: 1)",
    )
    add(
        "--passkey-tokens",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="context lengths at which pass keys are asked for (default: none)",
    )
    add(
        "--passkey-stages",
        nargs="+",
        choices=PASSKEY_STAGES,
        default=list(PASSKEY_STAGES),
        help="models that are asked (default: all)",
    )
    add("--passkey-contexts", type=int, default=10, help="contexts per length (default: 10)")
    add("--passkey-keys", type=int, default=3, help="pass keys in each (default: 3)")
    add(
        "--results",
        type=Path,
        default=Path("bench/results"),
        metavar="DIR",
        help="where the dated folder goes (default: bench/results)",
    )
    add_text_options(parser)


def _run(options: argparse.Namespace) -> int:
    pairs = [_pair(text) for text in options.pairs]
    if len(set(pairs)) < len(pairs):
        raise ValueError(f"--pairs has {' '.join(options.pairs)}; each size once, its models have one folder")
    if options.heal_config and not options.corpora:
        raise ValueError("--heal-config is given; --corpora must say what to heal on")
    seconds = _for_each(pairs, options.heal_seconds, "--heal-seconds")
    rates = _for_each(pairs, options.heal_learning_rates or [None], "--heal-learning-rates")
    if options.at_once < 1:
        raise ValueError(f"--at-once is {options.at_once}; it must be at least 1")
    options.work.mkdir(parents=True, exist_ok=True)
    source = open_source(options.source)
    windows = choose_windows(source.tokenizer, options.calibration, options.held_out, window_sizes(options))
    sizes = [_Size(*pair, *others) for *others, pair in zip(seconds, rates, pairs, strict=True)]
    table = _Table(options.results, options.seed, {None: [], **{size: [] for size in sizes}})
    if options.at_once > 1:
        _side_by_side(options, source, windows, sizes, table)
    else:
        _ask_source(options, source, table)
        for size in sizes:
            _measure(options, source, windows, size, table)
    print(f"written: {table.folder}")
    return 0


@dataclass(frozen=True, slots=True)
class _Size:
    """One size of the latent row, and how its model is healed."""

    rank: int
    rope: int
    seconds: float
    rate: float | None

    @property
    def wanted(self) -> ConversionOptions:
        return ConversionOptions(kv_lora_rank=self.rank, qk_rope_head_dim=self.rope)


@dataclass(slots=True)
class _Table:
    """Rows of the result, written and printed with every step: healing takes long, and what was measured stays.

    `rows` has a list for the source (None) and one for each size, in the order in which they stand in the result:
    that of the command, whichever size ends first.
    """

    results: Path
    seed: int
    rows: dict[_Size | None, list[Row]]
    folder: Path | None = None

    def add(self, rows: list[Row], size: _Size | None = None) -> None:
        self.rows[size].extend(rows)
        self.folder = self.folder or new_result_folder(self.results, TOPIC)
        write_result(self.folder, TOPIC, list(chain.from_iterable(self.rows.values())), seed=self.seed)
        for row in rows:
            print(_line(row), flush=True)


def _ask_source(options: argparse.Namespace, source: Source, table: _Table) -> None:
    if options.passkey_tokens and "source" in options.passkey_stages:
        table.add(_passkey(options, _lossless(options, source), source.name))


def _measure(
    options: argparse.Namespace, source: Source, windows: Windows, size: _Size, table: _Table
) -> None:
    """Convert, heal and ask one size; what is in WORK already is read."""
    asked = options.passkey_stages if options.passkey_tokens else []
    out = _folder(options, size)
    record = _converted(options, out, size.wanted)
    if not any(row.get("stage") == "source" for row in table.rows[None]):
        table.add([_source_row(source, record)])
    table.add(_rows(source, record), size)
    name = f"{size.rank}+{size.rope}"
    # before any pass key: healing is what takes long, and what cannot be had elsewhere
    healed = _heal(options, out, size) if options.heal_config else None
    if healed:
        table.add([_healed_row(options, source, record, healed, windows)], size)
    if "converted" in asked:
        table.add(_passkey(options, out, source.name, name), size)
    if healed and "healed" in asked:
        table.add(_passkey(options, healed, source.name, f"{name} healed"), size)


def _folder(options: argparse.Namespace, size: _Size) -> Path:
    return options.work / f"{size.rank}-{size.rope}"


def _side_by_side(
    options: argparse.Namespace, source: Source, windows: Windows, sizes: list[_Size], table: _Table
) -> None:
    """Each size is handed to a process of its own as soon as it is converted, and added when that has ended.

    Raises:
        ValueError: one of them failed, when all have ended.
    """
    errors = []
    with ThreadPoolExecutor(options.at_once) as pool:
        jobs = {}
        for size in sizes:
            out = _folder(options, size)
            _converted(options, out, size.wanted)
            job = pool.submit(_alone, _words(options, size), out.with_suffix(".log"))
            jobs[job] = size
        _ask_source(options, source, table)
        for job in as_completed(jobs):
            if error := job.exception():
                errors.append(error)
                continue
            _measure(options, source, windows, jobs[job], table)
    if errors:
        raise errors[0]


def _alone(command: list[str], log: Path) -> None:
    print(f"begun: {log}", flush=True)
    with log.open("w") as out:
        finished = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False)
    if finished.returncode:
        said = log.read_text()
        # a progress bar may stand before it in the line, and behind it
        reason = (re.findall(r"[Ee]rror: .*", said) or said.splitlines() or ["nothing said"])[-1]
        raise ValueError(f"{log.stem} failed with status {finished.returncode}: {reason}; more in {log}")
    print(f"ended: {log}", flush=True)


def _words(options: argparse.Namespace, size: _Size) -> list[str]:
    """The command for one size, which leaves its result in WORK."""
    stages = [stage for stage in options.passkey_stages if stage != "source"]
    lists = {
        "--corpora": options.corpora,
        "--passkey-stages": stages,
        "--passkey-tokens": options.passkey_tokens if stages else [],
        "--calibration": options.calibration,
        "--held-out": options.held_out,
        "--heal-config": [options.heal_config] if options.heal_config else [],
        "--heal-learning-rates": [] if size.rate is None else [size.rate],
    }
    names = "passkey_contexts passkey_keys calibration_samples calibration_tokens evaluation_samples"
    numbers = {
        name: getattr(options, name) for name in (*names.split(), "evaluation_tokens", "seed", "device")
    }
    words = [sys.executable, "-m", "ic_train.cli", "convert-table", options.source, options.work]
    words += ["--pairs", f"{size.rank}:{size.rope}", "--heal-seconds", size.seconds]
    words += ["--results", options.work / "results"]
    words += [word for name, values in lists.items() if values for word in (name, *values)]
    words += [word for name, value in numbers.items() for word in (f"--{name.replace('_', '-')}", value)]
    return [str(word) for word in words]


def _pair(text: str) -> tuple[int, int]:
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise ValueError(f"--pairs has {text!r}; accepted: kv_lora_rank:qk_rope_head_dim, as 256:64")
    return int(parts[0]), int(parts[1])


def _for_each(pairs: list[tuple[int, int]], values: list[Any], name: str) -> list[Any]:
    """A value for each pair, out of as many or of one for all."""
    given = values * len(pairs) if len(values) == 1 else values
    if len(given) != len(pairs) or any(value is not None and value <= 0 for value in given):
        raise ValueError(
            f"{name} is {values}; it must be one number above 0, or one for each of {len(pairs)} pairs"
        )
    return given


def _converted(options: argparse.Namespace, out: Path, wanted: ConversionOptions) -> Row:
    if (out / "conversion.json").is_file():
        return json.loads((out / "conversion.json").read_text())
    return convert(
        options.source,
        out,
        wanted,
        calibration=options.calibration,
        held_out=options.held_out,
        sizes=window_sizes(options),
        device=options.device,
        measured=options.work / "measured",
    )


def _lossless(options: argparse.Namespace, source: Source) -> Path:
    """The source as a model of ours that keeps everything, so that one program asks all of them."""
    width = source.shape.key_width
    out = options.work / "source"
    _converted(options, out, ConversionOptions(kv_lora_rank=width, qk_rope_head_dim=width))
    return out


def _source_row(source: Source, record: Row) -> Row:
    numbers = record["kv_numbers_per_token"]
    return {
        "source": source.name,
        "stage": "source",
        "perplexity": record["perplexity"]["source"],
        "kv_numbers_per_token": numbers["before"],
        "kv_saved_vs_mha": 1 - numbers["before"] / numbers["multi_head"],
        "kv_saved_vs_source": 0.0,
        "text": record["text"],
    }


def _rows(source: Source, record: Row) -> list[Row]:
    steps = [step for step in record["perplexity"] if step != "source"]
    return [
        _sizes(source, record)
        | {
            # the last lossy step is the converted model
            "stage": "converted" if step == steps[-1] else step,
            "perplexity": record["perplexity"][step],
            "perplexity_vs_source": record["perplexity"][step] / record["perplexity"]["source"],
            "plan": record["plan"]["name"],
            # a conversion that was there already may be older than this result
            "converted_at_commit": record["commit"],
            "wall_s": record["wall_s"],
            "peak_memory_bytes": record["peak_memory_bytes"],
        }
        for step in steps
    ]


def _sizes(source: Source, record: Row) -> Row:
    return {
        "source": source.name,
        "kv_lora_rank": record["kv_lora_rank"],
        "qk_rope_head_dim": record["qk_rope_head_dim"],
        "kv_numbers_per_token": record["kv_numbers_per_token"]["after"],
        "kv_saved_vs_mha": record["kv_saved_vs_mha"],
        "kv_saved_vs_source": record["kv_saved_vs_source"],
    }


def _heal(options: argparse.Namespace, converted: Path, size: _Size) -> Path:
    healed = converted.with_name(f"{converted.name}-healed")
    if (healed / "training.json").is_file():
        return healed
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    command += ["--cpu"] if options.device == "cpu" else []
    command += ["-m", "ic_train.heal", "--config", str(options.heal_config), "--model", str(converted)]
    command += ["--teacher", str(options.source), "--output_dir", str(healed)]
    # the recipe is for a GPU
    command += ["--use_cpu", "true"] if options.device == "cpu" else []
    command += [] if size.rate is None else ["--learning_rate", str(size.rate)]
    command += ["--max_seconds", str(size.seconds), "--corpora", *options.corpora]
    finished = subprocess.run(command, check=False)
    if finished.returncode:
        raise ValueError(
            f"healing {converted} failed with status {finished.returncode}; what it said is above"
        )
    return healed


def _healed_row(
    options: argparse.Namespace, source: Source, record: Row, healed: Path, windows: Windows
) -> Row:
    training = json.loads((healed / "training.json").read_text())
    value = _healed_perplexity(healed, windows.evaluation, options.device)
    return _sizes(source, record) | {
        "stage": "healed",
        "perplexity": value,
        "perplexity_vs_source": value / record["perplexity"]["source"],
        "tokens": training["tokens"],
        "learning_rate": float(training["optimizer"]["learning_rate"]),
        "wall_s": training["wall_s"],
        "gpu": training["gpu"],
        "loss_log": [line for line in training["log"] if "loss" in line],
    }


def _healed_perplexity(healed: Path, token_ids: torch.Tensor, device: str) -> float:
    """Measured once for a training and a text."""
    asked = hashlib.sha256((healed / "training.json").read_bytes() + token_ids.cpu().numpy().tobytes())
    file = healed / "perplexity.json"
    known: Row = json.loads(file.read_text()) if file.is_file() else {}
    if known.get("of") != asked.hexdigest():
        value = measured_perplexity(healed, token_ids, device)
        known = {"of": asked.hexdigest(), "perplexity": value, "gpu": device_name()}
        file.write_text(json.dumps(known) + "\n")
    return known["perplexity"]


def measured_perplexity(checkpoint: Path, token_ids: torch.Tensor, device: str) -> float:
    """Perplexity of a checkpoint on windows `[B, T]`, in float32, one window at a time."""
    model = ICForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).to(device).eval()
    total = 0.0
    with torch.inference_mode():
        for row in token_ids.to(device):
            logits = model(row[None], use_cache=False).logits[0, :-1]
            total += float(F.cross_entropy(logits, row[1:], reduction="sum"))
    return perplexity(total / (len(token_ids) * (token_ids.shape[1] - 1)))


def _passkey(options: argparse.Namespace, checkpoint: Path, source: str, size: str = "") -> list[Row]:
    """Pass keys found at every length; what was asked before is read back."""
    cuda = options.device.startswith("cuda")
    dtype = torch.bfloat16 if cuda else torch.float32
    asked = {
        "model": f"{source} {size}".rstrip(),
        "source": source,
        "engine": "transformers",
        "kv_dtype": str(dtype).removeprefix("torch."),
        "task": "passkey",
        "haystack": "jargon",
    }
    settings = [options.passkey_contexts, options.passkey_keys, options.seed, device_name()]
    file = options.work / f"passkeys-{checkpoint.name}.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    tokenizer = model = None
    rows = []
    for context_tokens in options.passkey_tokens:
        key = json.dumps([*asked.values(), context_tokens, *settings])
        if key not in known:
            if model is None:
                tokenizer = AutoTokenizer.from_pretrained(checkpoint)
                model = ICForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(options.device).eval()
            samples = list(
                evaluate_passkey(
                    model,
                    tokenizer,
                    load_haystack("jargon"),
                    context_tokens=context_tokens,
                    num_contexts=options.passkey_contexts,
                    keys_per_context=options.passkey_keys,
                    seed=options.seed,
                )
            )
            known[key] = asked | {
                "context_tokens": context_tokens,
                "correct": sum(sample["correct"] for sample in samples),
                "total": len(samples),
                "samples": samples,
            }
            file.write_text(json.dumps(known))
        rows.append(known[key])
    return rows


def _line(row: Row) -> str:
    if row.get("task") == "passkey":
        return f"{row['model']}: {row['correct']} of {row['total']} pass keys at {row['context_tokens']:,} tokens"
    size = (
        f"C {row['kv_lora_rank']:>4}  R {row['qk_rope_head_dim']:>3}" if "kv_lora_rank" in row else " " * 13
    )
    relative = row.get("perplexity_vs_source", 1.0)
    return (
        f"{size}  {row['stage']:<14} perplexity {row['perplexity']:9.3f}  {relative:7.3f} x  cache "
        f"{row['kv_saved_vs_source']:6.1%} less than the source's, {row['kv_saved_vs_mha']:.1%} "
        "less than multi-head"
    )
