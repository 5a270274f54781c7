"""What preference training changed: two evaluations of `ic-train evaluate`, question by question, as one result.

    python -m bench.cases.preferences --before before/evaluation --after after/evaluation --training after

They have to ask the same questions. Rows hold counts, how many questions each of the two alone got right, and the
verdicts question by question; with perplexity, where both measured it, the mean and its interval.
`preferences.png` shows all of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ic_train.evaluation.passkey import wilson_interval
from ic_train.evaluation.report import different_questions, paired, read_report
from ic_train.results import host_of, new_result_folder, write_result

TOPIC = "preferences"
PLOT_FILE = "preferences.png"
# of the run, into every row
_TRAINED = ("objective", "training_pairs", "pairs_per_step")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print and write the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.cases.preferences", description=__doc__)
    for place in ("before", "after"):
        parser.add_argument(
            f"--{place}",
            type=Path,
            nargs="+",
            required=True,
            metavar="DIR",
            help=f"--out of evaluations {place} training",
        )
    parser.add_argument(
        "--training", type=Path, required=True, metavar="DIR", help="output folder of ic_train.dpo"
    )
    parser.add_argument("--results", type=Path, default=Path("bench/results"), metavar="DIR")
    parser.add_argument(
        "--measured-on",
        type=Path,
        metavar="RESULT",
        help="result.json or report.json of the machine that answered, whose device and versions the result "
        "states (default: this machine's)",
    )
    options = parser.parse_args(arguments)
    try:
        rows = compared(options.before, options.after, options.training)
        host = None if options.measured_on is None else host_of(options.measured_on)
        folder = new_result_folder(options.results, TOPIC, device=host["gpu"] if host else None)
        write_result(folder, TOPIC, rows, host=host)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    plot(rows, folder / PLOT_FILE)
    for row in rows:
        if row["task"] == "perplexity":
            change = (
                f"{row['perplexity_before']:.2f} -> {row['perplexity_after']:.2f}, to {row['to_tokens']:,}"
            )
        else:
            change = f"{row['right_before']:>4} -> {row['right_after']:>4} of {row['asked']}"
        print(f"{row['task']:12} {row['context_tokens']:>9,} tokens  {change}")
    print(f"written: {folder}")
    return 0


def compared(before: Sequence[Path], after: Sequence[Path], training: Path) -> list[dict[str, Any]]:
    """A row per task and length that both have.

    Args:
        before: folders of evaluations.
        after: the same questions, put to the trained model.
        training: output folder of the run.

    Raises:
        ValueError: the evaluations asked different questions, or a folder is not what it should be.
    """
    record_file = training / "training.json"
    if not record_file.is_file():
        raise ValueError(f"--training is {str(training)!r}, which has no training.json")
    record = json.loads(record_file.read_text())
    shared = {name: record["identity"][name] for name in _TRAINED} | {
        "longest_pair_tokens": record["longest_pair_tokens"],
        "training_wall_s": record["wall_s"],
        "training_commit": record["commit"],
    }
    found = {
        place: {_case(row): row for folder in folders for row in read_report(folder)}
        for place, folders in (("before", before), ("after", after))
    }
    rows = []
    for case, first in found["before"].items():
        if (second := found["after"].get(case)) is None:
            continue
        labels = {name: first[name] for name in ("model", "engine", "kv_dtype", "task", "context_tokens")}
        counts = _perplexities if first["task"] == "perplexity" else _counts
        rows.append({**labels, **counts(first, second), **shared})
    if not rows:
        raise ValueError("--before and --after have no task and length in common")
    return rows


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw what was right before and after over the length of the context, a panel per task, and perplexity.

    Args:
        rows: of `compared`.
        path: PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, panels = plt.subplots(
        1, len(tasks), figsize=(1.2 + 2.7 * len(tasks), 3.3), squeeze=False, layout="constrained"
    )
    for panel, task in zip(panels[0], tasks, strict=True):
        drawn = [row for row in rows if row["task"] == task]
        if task == "perplexity":
            # of the longest context, which has every span of the shorter ones
            longest = max(row["context_tokens"] for row in drawn)
            drawn = [row for row in drawn if row["context_tokens"] == longest]
        for place in ("before", "after"):
            points = sorted(_point(row, place) for row in drawn)
            tokens, middle, low, high = zip(*points, strict=True)
            # an interval that ends at its value does so but for rounding
            errors = [
                [max(0.0, at - end) for at, end in zip(middle, low, strict=True)],
                [max(0.0, end - at) for at, end in zip(middle, high, strict=True)],
            ]
            panel.errorbar(tokens, middle, errors, marker="o", markersize=4, capsize=3, label=place)
        panel.set_xscale("log", base=2)
        ticks = sorted({_point(row, "before")[0] for row in drawn})
        panel.set_xticks(ticks[:: -(-len(ticks) // 5)])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1024:g}k"))
        panel.grid(alpha=0.3)
        if task == "perplexity":
            panel.set_title("perplexity, 95 % interval", fontsize=10)
            panel.set_xlabel("up to position, tokens")
        else:
            panel.set_title(f"{task}: right, 95 % interval", fontsize=10)
            panel.set_xlabel("context, tokens")
            panel.set_ylim(-0.03, 1.03)
            panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[0][0].legend(fontsize=8)
    first = rows[0]
    figure.suptitle(
        f"{first['model']}, {first['objective']} on {first['training_pairs']:,} pairs of at most "
        f"{first['longest_pair_tokens']:,} tokens",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _point(row: dict[str, Any], place: str) -> tuple[float, float, float, float]:
    """Of a row before or after: tokens, and the value with both ends of its 95 % interval."""
    if row["task"] == "perplexity":
        return (
            row["to_tokens"],
            *(row[f"{name}_{place}"] for name in ("perplexity", "low", "high")),
        )
    right = row[f"right_{place}"]
    return (row["context_tokens"], right / row["asked"], *wilson_interval(right, row["asked"]))


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("task", "context_tokens", "from_tokens", "to_tokens"))


def _perplexities(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    found = {name: first[name] for name in ("from_tokens", "to_tokens")}
    for place, row in (("before", first), ("after", second)):
        found |= {f"{name}_{place}": row[name] for name in ("perplexity", "low", "high")}
    return found


def _counts(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return paired_counts(first, second, ("before", "after"))


def paired_counts(first: dict[str, Any], second: dict[str, Any], names: tuple[str, str]) -> dict[str, Any]:
    """How many questions both runs got right, how many each alone, and the verdict on every one.

    `verdicts_*` has a digit per question, 1 where it was right, in the order of the first row's samples;
    `questions_sha256` is that of their ids, questions and references in this order, as JSON.

    Args:
        first: row of a report, with its samples.
        second: the same task and length.
        names: of the two, behind "right_", "only_" and "verdicts_".

    Raises:
        ValueError: they asked different questions, or answers are scored by shares.
    """
    case = f"{first['task']} at {first['context_tokens']} tokens"
    if how := different_questions(first, second):
        raise ValueError(f"{case}: --{names[0]} and --{names[1]} asked different questions ({how})")
    if (pairs := paired(first, second)) is None:
        raise ValueError(
            f"{case}: --{names[0]} and --{names[1]} need the answer to every question, each right or wrong; here "
            "answers are missing, or scored by the share of their parts"
        )
    after = {sample["id"]: sample for sample in second["samples"]}
    asked = [[sample[name] for name in ("id", "question", "reference")] for sample in first["samples"]]
    return {
        "asked": len(asked),
        f"right_{names[0]}": pairs.both + pairs.lost,
        f"right_{names[1]}": pairs.both + pairs.won,
        f"only_{names[0]}": pairs.lost,
        f"only_{names[1]}": pairs.won,
        f"verdicts_{names[0]}": digits(sample["correct"] for sample in first["samples"]),
        f"verdicts_{names[1]}": digits(after[sample["id"]]["correct"] for sample in first["samples"]),
        "questions_sha256": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
    }


def digits(verdicts: Iterable[bool | float]) -> str:
    """Verdicts as a text of 1 and 0: a list would take a line of the result for each."""
    return "".join("1" if verdict else "0" for verdict in verdicts)


if __name__ == "__main__":
    sys.exit(main())
