"""`ic-train judge`: grade answers by a language model; `ic-train judge calibrate`: measure that model first."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ic_train.evaluation.client import ServerError
from ic_train.evaluation.command import add_server, check_at_least, connect, report_server_error
from ic_train.evaluation.passkey import wilson_interval
from ic_train.evaluation.records import (
    SETTINGS_FILE,
    Records,
    hold_settings,
    read_records,
    read_settings,
    require_ids,
)
from ic_train.evaluation.trackers import add_report_to, parse_report_to, send_report
from ic_train.judge.calibration import agreement_by_fault, calibration_pairs, findings
from ic_train.judge.grading import (
    MERGED,
    SEPARATE,
    UNPARSABLE,
    Judge,
    Request,
    held_system,
    outcome,
    read_cases,
    require_unchanged,
)
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


def check_judge(options: argparse.Namespace) -> dict[str, Any] | None:
    """Refuse options of `ic-train judge` that are wrong whatever the answers; its calibration's row, if any.

    Raises:
        ValueError: an option is out of range, its file is not there, or the calibration is of another judge.
    """
    parse_report_to(options.report_to)
    # reaches no server yet
    connect(options)
    settings = _shared_settings(options)
    calibration = _calibration(options.calibration, settings)
    if calibration and options.judge:
        _require_judge(calibration, options.judge)
    return calibration


def _judge(options: argparse.Namespace) -> int:
    calibration = check_judge(options)
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

    settings: dict[str, Any] = {"kind": "pairs" if others else "absolute"}
    if "answers" in read_settings(options.out):
        # folders of earlier versions hold the files as a whole, and not what each judgement is of
        settings = {
            "answers": _digest(options.answers),
            "against": options.against and _digest(options.against),
        }
    try:
        judgements, asked = _grade(options, settings, requests, calibration)
    except ServerError as error:
        return report_server_error(error)
    row = _pair_row(cases, judgements) if others else _absolute_row(cases, answers, judgements)
    row = {**asked, "calibrated": calibration and calibration["passed"], **row}
    _write(options.out, row, _judge_table(row), seed=None)
    send_report(parse_report_to(options.report_to), options.out)
    return 0


def _calibrate(options: argparse.Namespace) -> int:
    check_at_least(options, pairs=_FEWEST_PAIRS)
    trackers = parse_report_to(options.report_to)
    pairs = calibration_pairs(options.pairs, options.seed)
    settings = {"pairs": options.pairs, "seed": options.seed}
    try:
        judgements, asked = _grade(
            options, settings, lambda judge: [request for pair in pairs for request in pair.requests(judge)]
        )
    except ServerError as error:
        return report_server_error(error)
    found = findings(pairs, judgements)
    passed = all(finding.passed for finding in found)
    row: dict[str, Any] = {
        **asked,
        "kind": "calibration",
        "passed": passed,
        "findings": [{**asdict(finding), "passed": finding.passed} for finding in found],
        "agreement_by_fault": agreement_by_fault(pairs, judgements),
    }
    lines = [f"Judge {row['judge']}: {'keeps to' if passed else 'is not shown to keep to'} all limits.", ""]
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


def _shared_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What a calibration and the judgements that rely on it have in common, beside the judge's name."""
    check_at_least(options, max_tokens=1)
    return {"rubric": load_rubric(options.rubric), "max_tokens": options.max_tokens}


def _grade(
    options: argparse.Namespace,
    settings: dict[str, Any],
    requests: Callable[[Judge], list[Request]],
    calibration: dict[str, Any] | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """All judgements by id; who made them, and how the system's text was sent."""
    shared = _shared_settings(options)

    async def run() -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        async with connect(options) as client:
            served = await client.served_model(options.judge)
            judge = Judge(client=client, model=served.name, concurrency=options.concurrency, **shared)
            if calibration:
                _require_judge(calibration, served.name)
            wanted = requests(judge)
            hold_settings(options.out, {"judge": served.name, **shared, **settings})
            with Records(options.out / JUDGEMENTS_FILE) as records:
                require_unchanged(options.out / JUDGEMENTS_FILE, records.by_id, wanted)
                system = _system(options, records, calibration)
                held = sum(request.id in records.by_id for request in wanted)
                with tqdm(total=len(wanted), initial=held, desc="judge", unit="judgement") as bar:
                    system = await judge.grade(wanted, records, bar.update, system=system)
                asked = {"judge": served.name, "system": system}
                return {request.id: records.by_id[request.id] for request in wanted}, asked

    return asyncio.run(run())


def _system(options: argparse.Namespace, records: Records, calibration: dict[str, Any] | None) -> str | None:
    """How the system's text is to be sent: as before, or as it was to be calibrated; None where nothing says."""
    held = held_system(records)
    if not calibration:
        return held
    # earlier versions knew one way and did not note it
    calibrated = calibration.get("system", SEPARATE)
    if held and held != calibrated:
        raise ValueError(
            f"{options.out} has judgements with the system's text {held}, --calibration {options.calibration} has "
            f"it {calibrated}; calibrate the judge behind this server, or give another --out"
        )
    return calibrated


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
        *(["The system's text was sent with the user's."] if row["system"] == MERGED else []),
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


def _calibration(folder: Path | None, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The row of a calibration with the same settings; None where nobody measured the judge."""
    if folder is None:
        return None
    for name in (REPORT_FILE, SETTINGS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"--calibration is {str(folder)!r}, which has no {name}")
    row = json.loads((folder / REPORT_FILE).read_text())["rows"][0]
    if row.get("kind") != "calibration":
        raise ValueError(
            f"--calibration is {str(folder)!r}, which holds {row.get('kind')}; it must be --out of "
            "`ic-train judge calibrate`"
        )
    held = read_settings(folder)
    for name, value in settings.items():
        if held.get(name) != value:
            raise ValueError(
                f"--calibration {str(folder)!r} was made with {name} {held.get(name)!r}, this judge has "
                f"{value!r}; calibrate it as it is asked here"
            )
    return row


def _require_judge(calibration: dict[str, Any], model: str) -> None:
    if calibration["judge"] != model:
        raise ValueError(
            f"--calibration is of {calibration['judge']!r}; it must be the calibration of {model!r}"
        )


def _write(folder: Path, row: dict[str, Any], table: str, *, seed: int | None) -> None:
    write_result(folder, "judge", [row], seed=seed)
    (folder / "result.json").replace(folder / REPORT_FILE)
    (folder / TABLE_FILE).write_text(table)
    print(f"{table}\nwritten: {folder / TABLE_FILE}")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
