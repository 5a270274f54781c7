"""Whether a model finds the same in process and behind a server: two evaluations as one result, with heat maps.

    ic-train evaluate MODEL --suite niah,distractors --lengths 4k,1M --out runs/process
    ic-train evaluate --server URL --tokenizer MODEL --suite niah,distractors --lengths 4k,1M --out runs/server
    python -m bench.cases.evaluation_engines --process runs/process --server runs/server

Rows hold the counts of both, how many questions each of the two alone got right, how many answers are the same
text, and all of that question by question.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ic_train.evaluation.plots import plot_passkey
from ic_train.evaluation.report import has_depths, read_report
from ic_train.results import host_of, new_result_folder, write_result

from bench.cases.preferences import digits, paired_counts

TOPIC = "evaluation-engines"
PLACES = ("process", "server")
_Asked = dict[tuple[str, int], dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print and write the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.cases.evaluation_engines", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for place, what in zip(PLACES, ("in this process", "with --server"), strict=True):
        parser.add_argument(
            f"--{place}",
            type=Path,
            nargs="+",
            required=True,
            metavar="DIR",
            help=f"--out of `ic-train evaluate` {what}; several are taken for one",
        )
    parser.add_argument("--results", type=Path, default=Path("bench/results"), metavar="DIR")
    parser.add_argument(
        "--measured-on",
        type=Path,
        metavar="RESULT",
        help="result.json of the machine that answered, whose device and versions the result states "
        "(default: this machine's)",
    )
    options = parser.parse_args(arguments)
    try:
        found = {place: _asked(getattr(options, place)) for place in PLACES}
        rows = compared(*found.values())
        host = None if options.measured_on is None else host_of(options.measured_on)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder = new_result_folder(options.results, TOPIC, device=host["gpu"] if host else None)
    write_result(folder, TOPIC, rows, host=host)
    for place, asked in found.items():
        for task in dict.fromkeys(row["task"] for row in rows):
            if drawn := [row for row in asked.values() if row["task"] == task and has_depths(row)]:
                plot_passkey(drawn, folder / f"{task}-{place}.png")
    for row in rows:
        print(
            f"{row['task']:12} {row['context_tokens']:>9,} tokens  {row['right_process']:>4} and "
            f"{row['right_server']:>4} of {row['asked']} right, {row['same_text']} the same text"
        )
    print(f"written: {folder}")
    return 0


def compared(process: _Asked, server: _Asked) -> list[dict[str, Any]]:
    """A row per task and length that both have.

    Args:
        process: of evaluations by transformers, rows by task and length.
        server: the same questions behind a server.

    Raises:
        ValueError: they asked different questions, or have nothing in common.
    """
    rows = []
    for case, first in process.items():
        if (second := server.get(case)) is None:
            continue
        counts = paired_counts(first, second, PLACES)
        other = {sample["id"]: sample["answer"] for sample in second["samples"]}
        same = [sample["answer"] == other[sample["id"]] for sample in first["samples"]]
        rows.append(
            {
                "model": first["model"],
                "engine": second["engine"],
                "dtype_in_process": first["kv_dtype"],
                "task": case[0],
                "context_tokens": case[1],
                **counts,
                "same_text": sum(same),
                "same_texts": digits(same),
            }
        )
    if not rows:
        raise ValueError("--process and --server have no task and length in common")
    return rows


def _asked(folders: Sequence[Path]) -> _Asked:
    """Rows with questions by task and length; of what several folders have the last one's."""
    return {
        (row["task"], row["context_tokens"]): row
        for folder in folders
        for row in read_report(folder)
        if row["task"] != "perplexity"
    }


if __name__ == "__main__":
    sys.exit(main())
