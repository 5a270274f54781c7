"""What preference training does for a model, from pairs to the table, in one command.

    python -m bench.cases.preference_training --model ic-nano --work WORK --lengths 4k,32k,128k
    python -m bench.cases.preference_training --work WORK --flags "--learning_rate 2e-5" --flags "--beta 0.5"

It makes pairs with the model's own wrong answers (`ic-train data preferences`), trains once for every `--flags`
(`ic_train.dpo`), and asks each trained model some questions at the shortest length. The one that gives most right
answers without losing text (`--most-perplexity`) is evaluated in full beside the model before training, with other
questions than those that chose it. The result has its counts; its rows say what the others had (`screened`).

The commands themselves go on where they were killed, and refuse a folder of other settings: give those another
`--work`. Further `--flags` and another recipe are new runs beside those that are there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ic_train import cli
from ic_train.evaluation.command import checkpoint_folder, parse_lengths
from ic_train.evaluation.report import read_report
from ic_train.results import new_result_folder, write_result

from bench.cases.preferences import PLOT_FILE, TOPIC, compared, plot

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "packages" / "ic-train" / "recipes" / "ic-nano" / "dpo.yaml"
SUITES = ("niah", "distractors", "corrections", "absent", "perplexity")
# from --seed: other questions than those of the result
SCREEN_SEED_STEP = 1_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Make pairs, train, choose, evaluate and write the result; the exit status."""
    options = _parser().parse_args(arguments)
    try:
        folder = run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {folder}")
    return 0


def run(options: argparse.Namespace) -> Path:
    """The result's folder.

    Raises:
        ValueError: an option is wrong, or a step failed.
    """
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    model = checkpoint_folder(options.model)
    if not options.recipe.is_file():
        raise ValueError(f"--recipe is {str(options.recipe)!r}; give a recipe of ic_train.dpo")
    if options.at_once < 1:
        raise ValueError(f"--at-once is {options.at_once}; it must be at least 1")
    shortest = str(min(parse_lengths(options.lengths)))
    settings = options.flags or [""]
    runs = [work / f"trained-{_key(options, flags)}" for flags in settings]
    before = work / "before"
    # few questions first: lengths too short for them end it here, not after hours
    steps = [*_evaluations(options, model, before, shortest, screen=True), _pairs(options)]
    _together(options, [*steps, *_evaluations(options, model, before, options.lengths)])
    begun = [(flags, out) for flags, out in zip(settings, runs, strict=True) if not _is_trained(out, flags)]
    _together(options, [_training(options, model, *one) for one in begun])
    screens = [_evaluations(options, trained, trained, shortest, screen=True) for trained in runs]
    _together(options, [step for steps in screens for step in steps])
    screened: list[dict[str, Any]] = []
    for flags, trained in zip(settings, runs, strict=True):
        screened.append({"flags": flags, **_screened(before / "screen", trained / "screen")})
        print(json.dumps(screened[-1]), flush=True)
    chosen = choose(screened, options.most_perplexity)
    trained = runs[chosen]
    _together(options, _evaluations(options, trained, trained, options.lengths))
    both = [[folder / "evaluation" / task for task in SUITES] for folder in (before, trained)]
    rows = compared(both[0], both[1], trained)
    found = {"training_flags": settings[chosen], "screened": screened}
    result = new_result_folder(options.results, TOPIC)
    write_result(result, TOPIC, [{**row, **found} for row in rows], seed=options.seed)
    plot(rows, result / PLOT_FILE)
    return result


def choose(screened: Sequence[dict[str, Any]], most_perplexity: float) -> int:
    """The number of the run to evaluate: most right answers among those that kept the text, else least lost text.

    Args:
        screened: of each run `right_after` and `perplexity_ratio`.
        most_perplexity: after training, times that before.
    """
    kept = [number for number, one in enumerate(screened) if one["perplexity_ratio"] <= most_perplexity]
    if not kept:
        return min(range(len(screened)), key=lambda number: screened[number]["perplexity_ratio"])
    return max(kept, key=lambda number: screened[number]["right_after"])


def _screened(before: Path, after: Path) -> dict[str, Any]:
    counts: dict[str, Any] = {}
    for place, folder in (("before", before), ("after", after)):
        rows = [row for task in SUITES for row in read_report(folder / task)]
        counts[f"right_{place}"] = sum(row["correct"] for row in rows if row["task"] != "perplexity")
        # of the last stretch of the longest context
        counts[f"perplexity_{place}"] = [row["perplexity"] for row in rows if row["task"] == "perplexity"][-1]
    return counts | {"perplexity_ratio": counts["perplexity_after"] / counts["perplexity_before"]}


@dataclass(frozen=True, slots=True)
class _Step:
    """A command: what errors call it, its log where it runs beside others, and the words after `python -m`."""

    what: str
    log: Path
    words: list[str]


def _step(log: Path, *words: Any) -> _Step:
    return _Step(f"ic-train {words[0]}", log, ["ic_train.cli", *map(str, words)])


def _pairs(options: argparse.Namespace) -> _Step:
    words = ["data", "preferences", options.work / "pairs", "--model", checkpoint_folder(options.model)]
    words += ["--device", options.device, "--dtype", options.dtype, "--kinds", options.kinds]
    words += ["--lengths", options.pair_lengths, "--short-tokens", options.short_tokens]
    words += ["--pairs", options.pairs, "--pairs-per-context", options.pairs_per_context]
    return _step(options.work / "pairs.log", *words)


def _evaluations(
    options: argparse.Namespace, model: Path, out: Path, lengths: str, *, screen: bool = False
) -> list[_Step]:
    """A step for every suite, so that they can run beside each other."""
    folder = out / ("screen" if screen else "evaluation")
    words = ["--lengths", lengths, "--device", options.device, "--dtype", options.dtype]
    words += ["--questions", options.screen_questions if screen else options.questions]
    words += ["--keys-per-context", options.keys_per_context]
    words += ["--seed", options.seed + (SCREEN_SEED_STEP if screen else 0)]
    return [
        _step(folder / f"{suite}.log", "evaluate", model, "--out", folder / suite, "--suite", suite, *words)
        for suite in SUITES
    ]


def _together(options: argparse.Namespace, steps: Sequence[_Step]) -> None:
    """All steps, `--at-once` at a time.

    Raises:
        ValueError: one failed; those beside it have ended.
    """
    if options.at_once == 1:
        for step in steps:
            _run(step, alone=True)
        return
    with ThreadPoolExecutor(options.at_once) as pool:
        jobs = [pool.submit(_run, step, alone=False) for step in steps]
    for job in jobs:
        job.result()


def _run(step: _Step, *, alone: bool) -> None:
    print(f"begun: {shlex.join(step.words)}", flush=True)
    started = time.monotonic()
    said = "above"
    if alone and step.words[0] == "ic_train.cli":
        status = cli.main(step.words[1:])
    elif alone:
        status = subprocess.run([sys.executable, "-m", *step.words], check=False).returncode
    else:
        step.log.parent.mkdir(parents=True, exist_ok=True)
        said = f"in {step.log}"
        with step.log.open("w") as out:
            command = [sys.executable, "-m", *step.words]
            status = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        raise ValueError(f"{step.what} failed with status {status}; what it said is {said}")
    print(f"took {time.monotonic() - started:.0f} s: {step.log.with_suffix('')}", flush=True)


def _key(options: argparse.Namespace, flags: str) -> str:
    """Of a trained model's folder, by what was asked for."""
    asked = json.dumps([flags, options.recipe.read_text(), options.text, options.device])
    return hashlib.sha256(asked.encode()).hexdigest()[:8]


def _is_trained(out: Path, flags: str) -> bool:
    there = (out / "training.json").is_file()
    if there:
        print(f"there already: {out} ({flags})", flush=True)
    return there


def _training(options: argparse.Namespace, model: Path, flags: str, out: Path) -> _Step:
    words = ["accelerate.commands.launch", "--num_processes", "1"]
    words += ["--num_machines", "1", "--dynamo_backend", "no", "--main_process_port", "0"]
    on_gpu = options.device.startswith("cuda")
    words += ["--mixed_precision", "bf16" if on_gpu else "no", *([] if on_gpu else ["--cpu"])]
    words += ["-m", "ic_train.dpo", "--config", str(options.recipe), "--model", str(model)]
    words += ["--preferences", str(options.work / "pairs"), "--output_dir", str(out)]
    if options.text:
        words += ["--text_corpora", *options.text]
    if not on_gpu:
        # the recipes are for a GPU
        words += ["--use_cpu", "true", "--bf16", "false", "--attn_implementation", "sdpa"]
    return _Step(f"training with {flags!r}", out.with_suffix(".log"), [*words, *shlex.split(flags)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cases.preference_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="ic-nano", metavar="DIR", help="checkpoint folder or ic-nano (default: ic-nano)")
    add("--work", type=Path, required=True, metavar="DIR", help="pairs, trained models and evaluations")
    add("--recipe", type=Path, default=RECIPE, metavar="FILE", help="of ic_train.dpo (default: ic-nano's)")
    add("--flags", action="append", metavar="WORDS", help="of ic_train.dpo; may be repeated: a run for each")
    add(
        "--text",
        nargs="+",
        default=[],
        metavar="DIR",
        help="of ic-train data text: text_corpora of every run",
    )
    add("--kinds", default="single,distractors,corrections,absent", metavar="A,B", help="of pairs")
    add("--pairs", type=int, default=400, metavar="N", help="per kind and length (default: 400)")
    add("--pairs-per-context", type=int, default=8, metavar="N", help="share a context (default: 8)")
    add("--pair-lengths", default="4k,32k", metavar="N,N", help="of pairs, in tokens (default: 4k,32k)")
    add("--short-tokens", default="1k", metavar="N", help="their short form (default: 1k)")
    add("--lengths", default="4k,32k,128k", metavar="N,N", help="of evaluation (default: 4k,32k,128k)")
    add("--questions", type=int, default=200, metavar="N", help="per task and length (default: 200)")
    add(
        "--keys-per-context",
        type=int,
        default=40,
        metavar="N",
        help="questions of one context (default: 40, as many as ic-nano's bytes have room for at 4k)",
    )
    add("--screen-questions", type=int, default=100, metavar="N", help="per task, to choose (default: 100)")
    add(
        "--at-once",
        type=int,
        default=1,
        metavar="N",
        help="suites asked, or runs trained, at a time on one GPU, each with a log in WORK (default: 1)",
    )
    add(
        "--most-perplexity",
        type=float,
        default=1.1,
        metavar="X",
        help="of text, times that before, for a run to be chosen (default: 1.1)",
    )
    add("--seed", type=int, default=1000, help="of the evaluation's questions (default: 1000)")
    add("--device", default="cuda", help="cuda or cpu (default: cuda)")
    add("--dtype", default="bfloat16", help="of the model when it answers (default: bfloat16)")
    add("--results", type=Path, default=Path("bench/results"), metavar="DIR")
    return parser


if __name__ == "__main__":
    sys.exit(main())
