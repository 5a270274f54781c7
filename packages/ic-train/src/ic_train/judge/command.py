"""`ic-train judge`: grade answers by a language model; `ic-train judge calibrate`: measure that model first."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ic_train.evaluation.client import ServerError
from ic_train.evaluation.command import add_server, check_at_least, connect, report_server_error
from ic_train.evaluation.passkey import wilson_interval
from ic_train.evaluation.records import Records, hold_settings, read_records, require_ids
from ic_train.evaluation.trackers import add_report_to, parse_report_to, send_report
from ic_train.judge.calibration import agreement_by_fault, calibration_pairs, findings
from ic_train.judge.grading import UNPARSABLE, Judge, Request, outcome, read_cases
from ic_train.judge.prometheus import load_rubric
from ic_train.results import write_result

JUDGEMENTS_FILE, REPORT_FILE, TABLE_FILE = "judgements.jsonl", "report.json", "report.md"
# of `judge calibrate`, for a judge that is not to be believed
NOT_CALIBRATED = 3
_FEWEST_PAIRS = 20


def add_judge(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = commands.add_parser(
        "judge",
        help="grade answers by a language model",
        description=(
            "Grade the answers of `ic-train evaluate` (JSON lines with id, question, reference, answer and quote) "
            "by a judge behind an OpenAI-compatible server: scores from 1 to 5 against the reference, or with "
            "--against pairs in both orders, where a verdict that follows the place is a tie. "
            "Measure the judge first: ic-train judge calibrate."
        ),
    )
    parser.set_defaults(run=_judge)
    add = parser.add_argument
    add("answers", type=Path, metavar="ANSWERS", help="answers.jsonl of an evaluation")
    add("--against", type=Path, metavar="OTHER", help="answers of another model to the same questions")
    add("--calibration", type=Path, metavar="DIR", help="--out of this judge's calibration, for the report")
    _add_shared(parser)


def add_judge_calibrate(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = commands.add_parser(
        "judge calibrate",
        help="measure a judge on pairs with known answers",
        description=(
            "Measure a judge's agreement on pairs with known answers, its position flips and its length bias. "
            f"Exit status {NOT_CALIBRATED}: it is not shown to keep to the limits."
        ),
    )
    parser.set_defaults(run=_calibrate)
    parser.add_argument(
        "--pairs", type=int, default=100, help="of each kind; four judgements each (default: 100)"
    )
    parser.add_argument("--seed", type=int, default=1000, help="of the pairs (default: 1000)")
    _add_shared(parser)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of judgements and report")
    add("--judge", metavar="NAME", help="the served name; default: the only one that the server has")
    add(
        "--rubric",
        type=Path,
        metavar="FILE",
        help="YAML with criteria and score1 to score5 (default: retrieval)",
    )
    add("--max-tokens", type=int, default=1024, help="of feedback and verdict (default: 1024)")
    add_server(parser, required=True)
    add_report_to(parser)


def _judge(options: argparse.Namespace) -> int:
    trackers = parse_report_to(options.report_to)
    answers = read_records(options.answers)
    cases = read_cases(options.answers, answers)
    others = None
    if options.against:
        others = read_records(options.against)
        other_cases = read_cases(options.against, others)
        require_ids(options.against, other_cases, cases)
        require_ids(options.answers, cases, other_cases)
        for name, case in cases.items():
            if case != other_cases[name]:
                raise ValueError(f"{name} is another question in {options.against} than in {options.answers}")

    def requests(judge: Judge) -> list[Request]:
        if others is None:
            return [judge.absolute(name, case, answers[name]["answer"]) for name, case in cases.items()]
        pairs = (
            judge.pair(name, c, answers[name]["answer"], others[name]["answer"]) for name, c in cases.items()
        )
        return [request for pair in pairs for request in pair]

    settings = {"answers": _digest(options.answers), "against": options.against and _digest(options.against)}
    try:
        judgements, model = _grade(options, settings, requests)
    except ServerError as error:
        return report_server_error(error)
    calibration = _calibration(options.calibration, model)
    row = _pair_row(cases, judgements) if others else _absolute_row(cases, answers, judgements)
    row = {"judge": model, "calibrated": calibration, **row}
    _write(options.out, row, _judge_table(row), seed=None)
    send_report(trackers, options.out)
    return 0


def _calibrate(options: argparse.Namespace) -> int:
    check_at_least(options, pairs=_FEWEST_PAIRS)
    trackers = parse_report_to(options.report_to)
    pairs = calibration_pairs(options.pairs, options.seed)
    settings = {"pairs": options.pairs, "seed": options.seed}
    try:
        judgements, model = _grade(
            options, settings, lambda judge: [request for pair in pairs for request in pair.requests(judge)]
        )
    except ServerError as error:
        return report_server_error(error)
    found = findings(pairs, judgements)
    passed = all(finding.passed for finding in found)
    row = {
        "judge": model,
        "kind": "calibration",
        "passed": passed,
        "findings": [{**asdict(finding), "passed": finding.passed} for finding in found],
        "agreement_by_fault": agreement_by_fault(pairs, judgements),
    }
    lines = [f"Judge {model}: {'keeps to' if passed else 'is not shown to keep to'} all limits.", ""]
    lines += ["| measure | found | 95 % interval | limits | |", "|---|---|---|---|---|"]
    for finding in found:
        (low, high), (least, most) = finding.interval, finding.limits
        lines.append(
            f"| {finding.name} | {finding.count:g}/{finding.total} | {low:.1%} to {high:.1%} | "
            f"{least:.0%} to {most:.0%} | {'passed' if finding.passed else 'FAILED'} |"
        )
    lines += ["", "| fault of the wrong answer | seen |", "|---|---|"]
    lines += [f"| {fault} | {right}/{total} |" for fault, (right, total) in row["agreement_by_fault"].items()]
    _write(options.out, row, "\n".join(lines) + "\n", seed=options.seed)
    send_report(trackers, options.out)
    return 0 if passed else NOT_CALIBRATED


def _grade(
    options: argparse.Namespace, settings: dict[str, Any], requests: Any
) -> tuple[dict[str, dict[str, Any]], str]:
    """All judgements by id, and the judge's name."""
    check_at_least(options, max_tokens=1)
    rubric = load_rubric(options.rubric)

    async def run() -> tuple[dict[str, dict[str, Any]], str]:
        async with connect(options) as client:
            served = await client.served_model(options.judge)
            judge = Judge(
                client=client,
                model=served.name,
                rubric=rubric,
                max_tokens=options.max_tokens,
                concurrency=options.concurrency,
            )
            shared = {"judge": served.name, "rubric": rubric, "max_tokens": options.max_tokens}
            hold_settings(options.out, {**shared, **settings})
            wanted = requests(judge)
            with Records(options.out / JUDGEMENTS_FILE) as records:
                held = sum(request.id in records.by_id for request in wanted)
                with tqdm(total=len(wanted), initial=held, desc="judge", unit="judgement") as bar:
                    await judge.grade(wanted, records, bar.update)
                return {request.id: records.by_id[request.id] for request in wanted}, served.name

    return asyncio.run(run())


def _absolute_row(
    cases: dict[str, Any], answers: dict[str, dict[str, Any]], judgements: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    verdicts = {name: judgements[name]["verdict"] for name in cases}
    scores = [verdict for verdict in verdicts.values() if verdict is not None]
    counts = Counter(scores)
    row = {
        "kind": "absolute",
        "total": len(verdicts),
        UNPARSABLE: len(verdicts) - len(scores),
        "scores": {str(score): counts[score] for score in range(1, 6)},
        "mean": sum(scores) / len(scores) if scores else None,
        "good": counts[4] + counts[5],
    }
    exact = [name for name in cases if isinstance(answers[name].get("correct"), bool)]
    # a score of 4 or 5 is a judge's word for right; without a verdict there is no agreement
    agreed = [name for name in exact if verdicts[name] and (verdicts[name] >= 4) == answers[name]["correct"]]
    return {**row, "exact_total": len(exact), "exact_agreed": len(agreed)}


def _pair_row(cases: dict[str, Any], judgements: dict[str, dict[str, Any]]) -> dict[str, Any]:
    counts = Counter(outcome(judgements, name) for name in cases)
    return {
        "kind": "pairs",
        "total": len(cases),
        UNPARSABLE: counts[UNPARSABLE],
        **{name: counts[name] for name in ("first", "second", "flip")},
    }


def _judge_table(row: dict[str, Any]) -> str:
    calibrated = {None: "not calibrated: measure it first (ic-train judge calibrate)", True: "calibrated"}
    lines = [
        f"Judge {row['judge']}, {calibrated.get(row['calibrated'], 'calibration FAILED')}.",
        f"{row['total']} {row['kind']} graded.",
        "",
        "| | count | 95 % interval |",
        "|---|---|---|",
    ]
    parts = (
        {"answers (first)": "first", "against (second)": "second", "tie (flipped with the order)": "flip"}
        if row["kind"] == "pairs"
        else {"score 4 or 5": "good"}
    )
    for label, name in {**parts, UNPARSABLE: UNPARSABLE}.items():
        low, high = wilson_interval(row[name], row["total"])
        lines.append(f"| {label} | {row[name]}/{row['total']} | {max(low, 0):.1%} to {min(high, 1):.1%} |")
    if row["kind"] == "absolute":
        scores = ", ".join(f"{score}: {count}" for score, count in row["scores"].items())
        mean = "none" if row["mean"] is None else f"{row['mean']:.2f}"
        lines += ["", f"Mean of the parsable scores: {mean} ({scores})."]
        if row["exact_total"]:
            lines.append(f"Agrees with exact match on {row['exact_agreed']} of {row['exact_total']}.")
    return "\n".join(lines) + "\n"


def _calibration(folder: Path | None, model: str) -> bool | None:
    """Whether the judge passed; None where nobody measured it."""
    if folder is None:
        return None
    path = folder / REPORT_FILE
    if not path.is_file():
        raise ValueError(f"--calibration is {str(folder)!r}, which has no {REPORT_FILE}")
    row = json.loads(path.read_text())["rows"][0]
    if row.get("kind") != "calibration" or row["judge"] != model:
        raise ValueError(
            f"--calibration is of {row['judge']!r} ({row.get('kind')}); it must be the calibration of {model!r}"
        )
    return row["passed"]


def _write(folder: Path, row: dict[str, Any], table: str, *, seed: int | None) -> None:
    write_result(folder, "judge", [row], seed=seed)
    (folder / "result.json").replace(folder / REPORT_FILE)
    (folder / TABLE_FILE).write_text(table)
    print(f"{table}\nwritten: {folder / TABLE_FILE}")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
