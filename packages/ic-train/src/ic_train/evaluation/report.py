"""Results of an evaluation: report.json, a Markdown table, heat maps, and several runs side by side."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ic_train.evaluation.passkey import wilson_interval
from ic_train.evaluation.plots import plot_passkey
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


def write_report(folder: Path, rows: list[dict[str, Any]], *, seed: int) -> str:
    """Write report.json, report.md and a heat map per task; the Markdown table.

    Args:
        folder: the run's.
        rows: retrieval rows with their samples, and perplexity rows.
        seed: of the run.
    """
    for row in rows:
        if row["task"] != "perplexity":
            row["low"], row["high"] = wilson_interval(row["correct"], row["total"])
    write_result(folder, "evaluation", rows, seed=seed)
    (folder / "result.json").replace(folder / REPORT_FILE)
    table = compare({folder.name: rows})
    (folder / TABLE_FILE).write_text(table)
    for task in dict.fromkeys(row["task"] for row in rows):
        # a question about several places has no depth
        drawn = [row for row in rows if row["task"] == task and has_depths(row)]
        if drawn:
            plot_passkey(drawn, folder / f"{task}.png")
    return table


def read_report(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's report.json.

    Raises:
        ValueError: it does not exist, or is none.
    """
    path = folder / REPORT_FILE if folder.is_dir() else folder
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; `ic-train evaluate` writes it when every question is answered"
        )
    try:
        return json.loads(path.read_text())["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no report: {error!r}") from None


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
        for key in keys:
            first = by_run[0].get(key)
            cells = [_cell(first)]
            for found in by_run[1:]:
                cells += [_cell(found.get(key)), _difference(first, found.get(key))]
            labels = [key[0], f"{key[1]:,}", *([f"{key[2]:,}-{key[3]:,}"] if perplexity else [])]
            lines.append(f"| {' | '.join([*labels, *cells])} |")
        parts.append("\n".join(lines) + "\n")
        retrieval = [found[key] for found in by_run for key in found if not perplexity]
        if any(row["total"] < MIN_FOR_PERCENTAGE for row in retrieval):
            parts.append(_FEW + "\n")
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
    """95 % confidence interval of the second share minus the first.

    Newcombe's hybrid of two Wilson intervals (Statistics in Medicine 17, 1998, method 10).

    Args:
        first: correct and total.
        second: correct and total.
    """
    p, q = first[0] / first[1], second[0] / second[1]
    (p_low, p_high), (q_low, q_high) = wilson_interval(*first), wilson_interval(*second)
    low = q - p - math.sqrt((q - q_low) ** 2 + (p_high - p) ** 2)
    high = q - p + math.sqrt((q_high - q) ** 2 + (p - p_low) ** 2)
    return low, high


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
    if first["task"] == "perplexity":
        return f"{second['perplexity'] - first['perplexity']:+.4g}"
    low, high = difference_interval((first["correct"], first["total"]), (second["correct"], second["total"]))
    few = min(first["total"], second["total"]) < MIN_FOR_PERCENTAGE
    share = second["correct"] / second["total"] - first["correct"] / first["total"]
    return f"{'' if few else f'{100 * share:+.1f} '}[{100 * low:+.1f}, {100 * high:+.1f}] points"


def has_depths(row: dict[str, Any]) -> bool:
    """Whether a row's samples say where in the context their answers lay: without that there is no heat map."""
    return any(sample.get("depth") is not None for sample in row.get("samples", []))
