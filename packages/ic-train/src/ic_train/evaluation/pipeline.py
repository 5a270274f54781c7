"""`ic-train evaluate pipeline`: serve a checkpoint, evaluate it, have it judged, compare it, decide.

Every step resumes: after an interruption the same call goes on from the last answer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ic_train.evaluation.client import ServerError
from ic_train.evaluation.records import hold_settings, read_settings
from ic_train.evaluation.report import compare, read_report
from ic_train.evaluation.serving import serve
from ic_train.evaluation.thresholds import check, load_thresholds, require_measured

# of `evaluate check` and `evaluate pipeline`, for a run below its thresholds
BELOW_THRESHOLDS = 4
DEFAULT_SERVE = ["vllm", "serve", "{model}", "--host", "127.0.0.1", "--port", "{port}"]
_FIELDS = {"serve": list, "start_timeout_s": (int, float), "evaluate": list, "judge": dict, "thresholds": str}
_JUDGE_FIELDS = {"server": str, "arguments": list}
_WEIGHTS_FILE = "weights.json"

Command = Callable[[Sequence[str]], int]


def add_evaluate_check(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = commands.add_parser(
        "evaluate check",
        help="hold an evaluation to thresholds",
        description=f"Hold an evaluation to thresholds. Exit status {BELOW_THRESHOLDS}: it is below one.",
    )
    parser.set_defaults(run=_check)
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="--out of an evaluation")
    add("--thresholds", type=Path, required=True, metavar="FILE", help="YAML: a list of thresholds")
    add("--base", type=Path, metavar="DIR", help="the evaluation to compare with, as the last release's")
    add("--judged", type=Path, metavar="DIR", help="--out of `ic-train judge` on the evaluation's answers")


def add_evaluate_pipeline(commands: Any, command: Command) -> None:
    """Add the command to argparse's sub-commands.

    Args:
        commands: argparse's sub-commands.
        command: runs `ic-train` with words.
    """
    parser = commands.add_parser(
        "evaluate pipeline",
        help="serve, evaluate, judge, compare, decide",
        description=(
            "Serve a checkpoint, evaluate it through the server, have the answers judged, compare with an earlier "
            f"evaluation, hold it to thresholds. Exit status {BELOW_THRESHOLDS}: it is below one."
        ),
    )
    parser.set_defaults(run=lambda options: _pipeline(options, command))
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint folder")
    add("--config", type=Path, required=True, metavar="FILE", help=f"YAML with {', '.join(_FIELDS)}")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of all results")
    add("--base", type=Path, metavar="DIR", help="the evaluation to compare with, as the last release's")


def _check(options: argparse.Namespace) -> int:
    verdicts = check(
        load_thresholds(options.thresholds),
        read_report(options.folder),
        base=read_report(options.base) if options.base else None,
        judged=_judged(options.judged),
    )
    for verdict in verdicts:
        print(verdict)
    return 0 if all(verdict.passed for verdict in verdicts) else BELOW_THRESHOLDS


def _pipeline(options: argparse.Namespace, command: Command) -> int:
    config = load_config(options.config)
    thresholds = options.config.parent / config["thresholds"]
    evaluated, judged = options.out / "evaluation", options.out / "judge"
    judge_words = ["judge", str(evaluated / "answers.jsonl"), "--out", str(judged)]
    if "judge" in config:
        judge_words += ["--server", config["judge"]["server"], *config["judge"].get("arguments", [])]
    # what would fail at the end fails here, before hours of evaluation
    require_measured(
        load_thresholds(thresholds),
        _planned(config["evaluate"]),
        base=read_report(options.base) if options.base else None,
        judged=_planned_judge(judge_words) if "judge" in config else None,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    _hold_weights(options.out, Path(options.model), evaluated / "answers.jsonl")
    words = [word.replace("{model}", options.model) for word in config.get("serve", DEFAULT_SERVE)]
    try:
        with serve(
            words, options.out / "server.log", start_timeout_s=config.get("start_timeout_s", 900)
        ) as url:
            status = command(["evaluate", "--server", url, "--out", str(evaluated), *config["evaluate"]])
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # the model's server is gone: a judge may need its GPU
    if not status and "judge" in config:
        status = command(judge_words)
    if status:
        return status
    if options.base:
        table = compare({"base": read_report(options.base), "this": read_report(evaluated)})
        (options.out / "comparison.md").write_text(table)
        print(table)
    check_words = ["evaluate", "check", str(evaluated), "--thresholds", str(thresholds)]
    check_words += ["--base", str(options.base)] if options.base else []
    return command([*check_words, *(["--judged", str(judged)] if "judge" in config else [])])


def _planned(words: Sequence[str]) -> list[dict[str, Any]]:
    """The rows that `ic-train evaluate` with these words reports: task, length, and what decides the questions.

    `ruler` may leave out tasks of its own at a length; which ones, only the tokenizer tells.
    """
    # takes seconds, which `evaluate check` is to be spared
    from ic_train.evaluation.command import add_evaluate, parse_lengths
    from ic_train.evaluation.haystack import load_haystack
    from ic_train.evaluation.ruler import ruler_suites
    from ic_train.evaluation.ruler_tasks import RULER_FILES
    from ic_train.evaluation.run import PERPLEXITY, SUITES
    from ic_train.evaluation.tasks import TASKS

    options = _parse(add_evaluate, ["evaluate", "--server", "", "--out", "", *words])
    suites = options.suite.split(",")
    for name in suites:
        if name not in SUITES or name == PERPLEXITY:
            served = ", ".join(suite for suite in SUITES if suite != PERPLEXITY)
            raise ValueError(f"evaluate has --suite with {name!r}; accepted behind a server are {served}")
    files = {name: getattr(options, name) for name in RULER_FILES if getattr(options, name)}
    haystack = hashlib.sha256(load_haystack(options.haystack).encode()).hexdigest()
    rows = []
    for suite in ruler_suites(suites, files):
        settings: dict[str, Any] = {"seed": options.seed, "questions": options.questions}
        # `passkey` has a text of its own; where each question has a context, nobody asks how many share one
        if suite != "passkey":
            settings["haystack_sha256"] = haystack
        if suite in TASKS and TASKS[suite].shares_context:
            settings["keys_per_context"] = options.keys_per_context
        for tokens in parse_lengths(options.lengths):
            rows.append({"task": suite, "context_tokens": tokens, "settings": settings})
    return rows


def _planned_judge(words: Sequence[str]) -> dict[str, Any]:
    """What `ic-train judge` with these words will say of itself."""
    from ic_train.judge.command import add_judge, check_judge

    options = _parse(add_judge, words)
    calibration = check_judge(options)
    kind = "pairs" if options.against else "absolute"
    return {"kind": kind, "calibrated": calibration and calibration["passed"]}


def _parse(add: Callable[[Any], None], words: Sequence[str]) -> argparse.Namespace:
    """Options of a command that `add` adds to argparse's; wrong ones end the program as on the command line."""
    parser = argparse.ArgumentParser(prog="ic-train")
    add(parser.add_subparsers())
    return parser.parse_args(words)


def _hold_weights(out: Path, model: Path, answers: Path) -> None:
    """Refuse a folder with answers of other weights: a server does not tell its weights, and their name stays."""
    from ic_train.evaluation.command import weights_fingerprint

    if not (model / "config.json").is_file():
        return
    weights = {"weights": weights_fingerprint(model)}
    if not answers.is_file() or not answers.stat().st_size:
        # nothing was answered with the weights of then
        (out / _WEIGHTS_FILE).unlink(missing_ok=True)
        hold_settings(out, weights, file=_WEIGHTS_FILE)
        return
    held = read_settings(out, file=_WEIGHTS_FILE)
    if held != weights:
        whose = f"of other weights than {model} has now" if held else "and not of which weights they are"
        raise ValueError(
            f"{out} holds answers{'' if held else ','} {whose}; move it away, or give another --out"
        )


def load_config(path: Path) -> dict[str, Any]:
    """A pipeline's configuration.

    Raises:
        ValueError: there is no such file, or a field is unknown, missing or of another type.
    """
    if not path.is_file():
        raise ValueError(f"--config is {str(path)!r}, which does not exist")
    try:
        config: Any = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config is {str(path)!r}, which is no YAML: {error}") from None
    _check_fields(path, config, _FIELDS, required=("evaluate", "thresholds"))
    if "judge" in config:
        _check_fields(path, config["judge"], _JUDGE_FIELDS, required=("server",))
    lists = {"serve": config.get("serve"), "evaluate": config["evaluate"]}
    lists["judge.arguments"] = config.get("judge", {}).get("arguments")
    for name, words in lists.items():
        if not all(isinstance(word, str) for word in words or ()):
            raise ValueError(f"{path}: {name} is {words!r}; every word must be text, numbers in quotes")
    return config


def _check_fields(path: Path, mapping: Any, fields: dict[str, Any], *, required: Sequence[str]) -> None:
    if not isinstance(mapping, dict) or set(mapping) - set(fields) or set(required) - set(mapping):
        found = ", ".join(map(str, mapping)) if isinstance(mapping, dict) else repr(mapping)
        raise ValueError(
            f"{path} has {found}; accepted are {', '.join(fields)}, needed {', '.join(required)}"
        )
    for name, value in mapping.items():
        if not isinstance(value, fields[name]):
            raise ValueError(f"{path}: {name} is {value!r}, which has the wrong type")


def _judged(folder: Path | None) -> dict[str, Any] | None:
    if folder is None:
        return None
    path = folder / "report.json"
    if not path.is_file():
        raise ValueError(f"--judged is {str(folder)!r}, which has no report.json")
    return json.loads(path.read_text())["rows"][0]
