"""Write the tables of committed results into documents: `python bench/report.py [--check]`.

A document marks where a table goes, and the marks stay:

    <!-- results:retrieval model=ic-nano -->
    <!-- /results -->

What stands between them is made from `bench/results/*/result.json`, never typed. Words after the table's name
keep only rows with such a field. Of several rows that measured the same, the newest result's is shown.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ic_train.evaluation.passkey import wilson_interval

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = ("README.md", "docs/**/*.md", "bench/**/*.md", "packages/**/*.md")
NO_ROWS = "No results are committed yet."

_BLOCK = re.compile(
    r"^<!-- results:(?P<table>[\w-]+)(?P<filters>(?: \w+=\S+)*) -->\n(?P<body>.*?)^<!-- /results -->$",
    re.MULTILINE | re.DOTALL,
)
_RETRIEVAL_KEY = ("task", "model", "engine", "kv_dtype", "context_tokens")

Row = dict[str, Any]


def retrieval_table(rows: Sequence[Row]) -> str:
    """Share of what was found, by context length, with its 95 % confidence interval (Wilson)."""
    newest = {tuple(row[field] for field in (*_RETRIEVAL_KEY, "gpu")): row for row in rows}
    lines = [
        "| model | context, tokens | found | share (95 % interval) | engine, KV cache | device | result |",
        "|---|---:|---:|---|---|---|---|",
    ]
    for row in sorted(
        newest.values(), key=lambda row: [str(row["model"]), row["context_tokens"], row["engine"]]
    ):
        low, high = wilson_interval(row["correct"], row["total"])
        share = row["correct"] / row["total"]
        lines.append(
            f"| {row['model']} | {row['context_tokens']:,} | {row['correct']} of {row['total']} "
            f"| {share:.1%} ({low:.1%} to {high:.1%}) | {row['engine']}, {row['kv_dtype']} | {row['gpu']} "
            f"| `{row['result']}` |"
        )
    return "\n".join(lines)


# name in the mark: (fields that its rows have, the table)
TABLES: dict[str, tuple[frozenset[str], Callable[[Sequence[Row]], str]]] = {
    "retrieval": (frozenset({*_RETRIEVAL_KEY, "correct", "total"}), retrieval_table),
}


def load_rows(results: Path) -> list[Row]:
    """Every row of every result, oldest first, with the result's folder name and device.

    Raises:
        ValueError: a file is not a result: names the file and what it lacks.
    """
    rows: list[Row] = []
    for path in sorted(results.glob("*/result.json")):
        result = json.loads(path.read_text())
        lacking = {"topic", "command", "commit", "gpu", "versions", "rows"} - set(result)
        if lacking or not result["rows"]:
            raise ValueError(f"{path} is no result: it has no {', '.join(sorted(lacking) or ['rows'])}")
        rows += [{**row, "result": path.parent.name, "gpu": result["gpu"]} for row in result["rows"]]
    return rows


def render(text: str, rows: Sequence[Row], source: str) -> str:
    """A document with its marked tables made anew.

    Args:
        text: the document.
        rows: from load_rows.
        source: the document's name, for messages.

    Raises:
        ValueError: a mark names a table that there is not, or a mark is not closed.
    """

    def block(match: re.Match[str]) -> str:
        name, filters = match["table"], dict(word.split("=", 1) for word in match["filters"].split())
        if name not in TABLES:
            raise ValueError(f"{source} has a table {name!r}; it must be one of {', '.join(sorted(TABLES))}")
        fields, table = TABLES[name]
        chosen = [
            row
            for row in rows
            if fields <= set(row) and all(str(row.get(field)) == value for field, value in filters.items())
        ]
        opening = match[0].split("\n", 1)[0]
        return f"{opening}\n{table(chosen) if chosen else NO_ROWS}\n<!-- /results -->"

    # examples in code, with their indentation, are left alone
    opened = len(re.findall(r"^<!-- results:", text, re.MULTILINE))
    if opened != len(_BLOCK.findall(text)):
        raise ValueError(f"{source} has a results mark that is malformed or lacks its <!-- /results -->")
    return _BLOCK.sub(block, text)


def stale_documents(root: Path = ROOT, *, write: bool = False) -> list[Path]:
    """Documents whose tables are not what the results say.

    Args:
        root: of the repository.
        write: bring them up to date.
    """
    rows = load_rows(root / "bench" / "results")
    stale = []
    for path in sorted({path for pattern in DOCUMENTS for path in root.glob(pattern)}):
        text = path.read_text()
        made = render(text, rows, str(path.relative_to(root)))
        if made != text:
            stale.append(path)
            if write:
                path.write_text(made)
    return stale


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the tables; 1 when --check finds one out of date."""
    parser = argparse.ArgumentParser(prog="python bench/report.py", description="Tables from bench/results.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail when a table is out of date"
    )
    options = parser.parse_args(arguments)
    try:
        stale = stale_documents(write=not options.check)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in stale:
        print(f"{'out of date' if options.check else 'written'}: {path.relative_to(ROOT)}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
