"""Results of an evaluation: report.json, a Markdown table, heat maps, and several runs side by side."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ic_train.evaluation.passkey import wilson_interval
from ic_train.evaluation.plots import plot_passkey
from ic_train.evaluation.records import read_settings
from ic_train.results import write_result

REPORT_FILE, TABLE_FILE = "report.json", "report.md"
# with fewer, the interval of a share near 90 % is wider than 8 points
MIN_FOR_PERCENTAGE = 200
_FEW = (
    f"Counts without a percentage: fewer than {MIN_FOR_PERCENTAGE} questions, too few for one. "
    "Intervals are Wilson's, 95 %."
)
_SHARES = (
    "{tasks}: each answer counts by the share of its parts that were found. The interval is the one of as many "
    "answers that are right or wrong; shares vary less, so it is too wide rather than too narrow."
)
_RULER = (
    "{tasks}: RULER's prompts and scores by lm-eval {versions}, with {haystacks} for its essays. Published "
    "numbers have another text, and are no measure for these."
)
_PAIRED = (
    "Lost and won are the questions that only the first run, or only the other one, has right. The interval of "
    "the difference is Newcombe's for the same questions."
)
_INDEPENDENT = (
    "independent: the difference's interval is Newcombe's for two separate samples, since a report lacks its "
    "answers, or scores are shares. For the same questions it is mostly too wide."
)
# of run.json: what decides questions and contexts of a length. Not the tokenizer: models may have their own
_QUESTION_SETTINGS = ("seed", "questions", "keys_per_context", "haystack_sha256")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """How many of the questions that two runs were asked which of them got right.

    Args:
        both: right in both.
        lost: right in the first alone.
        won: right in the second alone.
        neither: wrong in both.
    """

    both: int
    lost: int
    won: int
    neither: int


def write_report(folder: Path, rows: list[dict[str, Any]], *, seed: int, notes: Sequence[str] = ()) -> str:
    """Write report.json, report.md and a heat map per task; the Markdown table.

    Args:
        folder: the run's.
        rows: retrieval rows with their samples, and perplexity rows.
        seed: of the run.
        notes: sentences below the table, without their full stop.
    """
    for row in rows:
        if row["task"] != "perplexity":
            row["low"], row["high"] = wilson_interval(row["correct"], row["total"])
    write_result(folder, "evaluation", rows, seed=seed)
    (folder / "result.json").replace(folder / REPORT_FILE)
    table = "\n".join([compare({folder.name: rows}), *(f"{note}.\n" for note in notes)])
    (folder / TABLE_FILE).write_text(table)
    for task in dict.fromkeys(row["task"] for row in rows):
        # a question about several places has no depth
        drawn = [row for row in rows if row["task"] == task and has_depths(row)]
        if drawn:
            plot_passkey(drawn, folder / f"{task}.png")
    return table


def read_report(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's report.json, each with the run's settings, where its run.json is there.

    Raises:
        ValueError: it does not exist, or is none.
    """
    path = folder / REPORT_FILE if folder.is_dir() else folder
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; `ic-train evaluate` writes it when every question is answered"
        )
    try:
        rows = json.loads(path.read_text())["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no report: {error!r}") from None
    settings = read_settings(path.parent)
    return [{**row, "settings": settings} for row in rows] if settings else rows


def compare(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Runs side by side as a Markdown table; beside the second and later ones, the difference to the first.

    Args:
        runs: name to rows.
    """
    names = list(runs)
    columns = [names[0], *(column for name in names[1:] for column in (name, f"{name} - {names[0]}"))]
    parts = []
    for perplexity in (False, True):
        by_run = [_by_key(rows, perplexity=perplexity) for rows in runs.values()]
        keys = list(dict.fromkeys(key for found in by_run for key in found))
        if not keys:
            continue
        left = ("task", "context tokens") + (("positions",) if perplexity else ())
        lines = [f"| {' | '.join((*left, *columns))} |", "|" + "---|" * (len(left) + len(columns))]
        differences = []
        for key in keys:
            first = by_run[0].get(key)
            cells = [_cell(first)]
            for found in by_run[1:]:
                differences.append(_difference(first, found.get(key)))
                cells += [_cell(found.get(key)), differences[-1]]
            labels = [key[0], f"{key[1]:,}", *([f"{key[2]:,}-{key[3]:,}"] if perplexity else [])]
            lines.append(f"| {' | '.join([*labels, *cells])} |")
        parts.append("\n".join(lines) + "\n")
        retrieval = [found[key] for found in by_run for key in found if not perplexity]
        if any(row["total"] < MIN_FOR_PERCENTAGE for row in retrieval):
            parts.append(_FEW + "\n")
        for end, note in ((" won", _PAIRED), (", independent", _INDEPENDENT)):
            if any(difference.endswith(end) for difference in differences):
                parts.append(note + "\n")
        if shares := dict.fromkeys(row["task"] for row in retrieval if row.get("shares")):
            parts.append(_SHARES.format(tasks=", ".join(shares)) + "\n")
        if ruler := [row for row in retrieval if row.get("lm_eval")]:
            tasks, versions, haystacks = (
                ", ".join(dict.fromkeys(str(row[name]) for row in ruler))
                for name in ("task", "lm_eval", "haystack")
            )
            parts.append(_RULER.format(tasks=tasks, versions=versions, haystacks=haystacks) + "\n")
    return "\n".join(parts)


def difference_interval(first: tuple[int, int], second: tuple[int, int]) -> tuple[float, float]:
    """95 % confidence interval of the second share minus the first, of two independent samples.

    Newcombe's hybrid of two Wilson intervals (Statistics in Medicine 17:873-890, 1998, method 10).

    Args:
        first: correct and total.
        second: correct and total.
    """
    p, q = first[0] / first[1], second[0] / second[1]
    (p_low, p_high), (q_low, q_high) = wilson_interval(*first), wilson_interval(*second)
    low = q - p - math.sqrt((q - q_low) ** 2 + (p_high - p) ** 2)
    high = q - p + math.sqrt((q_high - q) ** 2 + (p - p_low) ** 2)
    return low, high


def paired_interval(pairs: Pairs) -> tuple[float, float]:
    """95 % confidence interval of the second share minus the first, of the same questions.

    Newcombe's square-and-add of Wilson intervals [l, u] around the shares p and q of a run each (Statistics in
    Medicine 17:2635-2650, 1998, method 10), with a, b, c, d for both, lost, won, neither of n questions:

        low  = q - p - sqrt((q - l_q)^2 - 2 phi (q - l_q) (u_p - p) + (u_p - p)^2)
        high = q - p + sqrt((u_q - q)^2 - 2 phi (u_q - q) (p - l_p) + (p - l_p)^2)
        phi  = e / sqrt((a + b) (c + d) (a + c) (b + d)), 0 where that is no number
        e    = ad - bc where that is below 0, else max(ad - bc - n / 2, 0)

    Runs with the same right answers have an interval, too: n questions that no run lost do not show that there are
    none. It covers less than 95 % where about half are right and hardly one is lost or won: 91 % at 200
    questions of which 2 in 100 are lost and none is won.

    Args:
        pairs: at least one question.
    """
    a, b, c, d = pairs.both, pairs.lost, pairs.won, pairs.neither
    total = a + b + c + d
    p, q = (a + b) / total, (a + c) / total
    (p_low, p_high), (q_low, q_high) = wilson_interval(a + b, total), wilson_interval(a + c, total)
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    excess = a * d - b * c
    if excess > 0:
        excess = max(excess - total / 2, 0)
    phi = excess / math.sqrt(margins) if margins else 0.0

    def added(one: float, other: float) -> float:
        """Both sides' distances as one; rounding may leave less than 0."""
        return math.sqrt(max(one * one - 2 * phi * one * other + other * other, 0.0))

    return q - p - added(q - q_low, p_high - p), q - p + added(q_high - q, p - p_low)


def change_interval(first: dict[str, Any], second: dict[str, Any]) -> tuple[float, float]:
    """95 % confidence interval of the second row's share minus the first's: paired where `paired` can be.

    Args:
        first: row of a report.
        second: of the same task and length.

    Raises:
        ValueError: they asked different questions; says what differs.
    """
    if how := different_questions(first, second):
        raise ValueError(
            f"{first['task']} at {first['context_tokens']} tokens: the two runs asked different questions "
            f"({how}); evaluate both with the same settings"
        )
    if pairs := paired(first, second):
        return paired_interval(pairs)
    return difference_interval((first["correct"], first["total"]), (second["correct"], second["total"]))


def different_questions(first: dict[str, Any], second: dict[str, Any]) -> str:
    """How what two rows asked differs; empty where it does not, or where the reports do not say.

    Args:
        first: row of a report.
        second: of the same task and length.
    """
    asked = [
        {(name, one["question"], one["reference"]) for name, one in _samples(row).items()}
        for row in (first, second)
    ]
    seen = bool(asked[0] and asked[1]) and asked[0] != asked[1]
    named = _QUESTION_SETTINGS if seen else _unseen_settings(first)
    before, after = (row.get("settings", {}) for row in (first, second))
    settings = [
        f"{name} {str(before[name])[:12]} and {str(after[name])[:12]}"
        for name in named
        if name in before and name in after and before[name] != after[name]
    ]
    if seen and not settings:
        return f"{len(asked[0])} and {len(asked[1])} questions, {len(asked[0] & asked[1])} the same"
    return ", ".join(settings)


def paired(first: dict[str, Any], second: dict[str, Any]) -> Pairs | None:
    """How two rows did on each question; None where one lacks its answers, or scores one by a share.

    Args:
        first: row of a report.
        second: with the same questions, which `different_questions` tells.
    """
    before, after = _samples(first), _samples(second)
    if not before or not after:
        return None
    found = Counter((one["correct"], after[name]["correct"]) for name, one in before.items())
    if any(score not in (0, 1) for scores in found for score in scores):
        return None
    return Pairs(both=found[1, 1], lost=found[1, 0], won=found[0, 1], neither=found[0, 0])


def _samples(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A row's answers by the id of their question; those of `evaluate passkey` have none."""
    return {sample["id"]: sample for sample in row.get("samples", []) if "id" in sample}


def _unseen_settings(row: dict[str, Any]) -> tuple[str, ...]:
    """Those that change a row's contexts, but may leave its questions as they are."""
    if row["task"] == "perplexity":
        return ("seed", "texts", "haystack_sha256")
    if row["task"] == "passkey":
        return ()
    return ("haystack_sha256",) if row.get("lm_eval") else ("keys_per_context", "haystack_sha256")


def _by_key(rows: list[dict[str, Any]], *, perplexity: bool) -> dict[tuple[Any, ...], dict[str, Any]]:
    chosen = [row for row in rows if (row["task"] == "perplexity") == perplexity]
    names = ("task", "context_tokens") + (("from_tokens", "to_tokens") if perplexity else ())
    return {tuple(row[name] for name in names): row for row in chosen}


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not run"
    if row["task"] == "perplexity":
        text = f"{row['perplexity']:.4g}"
        return text if row["low"] is None else f"{text} [{row['low']:.4g}, {row['high']:.4g}]"
    low, high = wilson_interval(row["correct"], row["total"])
    share = f" = {row['correct'] / row['total']:.1%}" if row["total"] >= MIN_FOR_PERCENTAGE else ""
    return f"{row['correct']:.6g}/{row['total']}{share} [{low:.1%}, {high:.1%}]"


def _difference(first: dict[str, Any] | None, second: dict[str, Any] | None) -> str:
    if first is None or second is None:
        return ""
    if how := different_questions(first, second):
        return f"different {'texts' if first['task'] == 'perplexity' else 'questions'}: {how}"
    if first["task"] == "perplexity":
        return f"{second['perplexity'] - first['perplexity']:+.4g}"
    low, high = change_interval(first, second)
    few = min(first["total"], second["total"]) < MIN_FOR_PERCENTAGE
    share = second["correct"] / second["total"] - first["correct"] / first["total"]
    pairs = paired(first, second)
    kind = f"{pairs.lost} lost, {pairs.won} won" if pairs else "independent"
    return f"{'' if few else f'{100 * share:+.1f} '}[{100 * low:+.1f}, {100 * high:+.1f}] points, {kind}"


def has_depths(row: dict[str, Any]) -> bool:
    """Whether a row's samples say where in the context their answers lay: without that there is no heat map."""
    return any(sample.get("depth") is not None for sample in row.get("samples", []))
