"""The table that a benchmark prints: one line per case and implementation of ic-model, its peers beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]

# what tells the cases of an op apart, beside the columns that every table has
CASE_FIELDS = {
    "mla_decode": ("row_dim", "heads", "batch", "context_tokens", "lengths", "query_tokens", "kv_dtype"),
    "mla_prefill": ("direction", "heads", "batch", "context_tokens"),
    "latent_cache": ("row_dim", "context_tokens", "kv_dtype"),
    "rms_norm": ("direction", "residual", "row_dim", "context_tokens"),
    "rope": ("heads", "context_tokens"),
}
_HEADINGS = {
    "row_dim": "row",
    "context_tokens": "tokens",
    "query_tokens": "queries",
    "kv_dtype": "cache",
    "lengths": "lengths",
}


def case_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a row's case from others of its op."""
    return tuple(row.get(name) for name in CASE_FIELDS[row["op"]])


def text_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns of text, numbers to the right."""
    widths = [max(len(line[place]) for line in [header, *lines]) for place in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [header, *lines]
    )


def print_table(
    op: str, rows: Sequence[Row], peers: Sequence[str], refused: Sequence[Mapping[str, str]]
) -> str:
    """The table of a run, and below it why there are dashes.

    Args:
        op: the op.
        rows: of the result.
        peers: columns; each shows the peer's time, and that over ours.
        refused: `impl`, `case` and `reason` of what was not measured.
    """
    fields = CASE_FIELDS[op]
    header = [_HEADINGS.get(name, name) for name in fields]
    header += ["MB", "GFLOP", "impl", "us", "GB/s", "TFLOP/s", "roofline", *peers, "rel_err"]
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(case_key(row), []).append(row)
    lines = []
    for key, found in cases.items():
        ours = [row for row in found if row["ours"]]
        theirs = {row["impl"]: row for row in found if not row["ours"]}
        for row in ours or [None]:
            lines.append([_cell(value) for value in key] + _numbers(found[0], row, theirs, peers))
    text = text_table(header, lines)
    notes = _notes(rows, refused)
    return "\n".join([text, *(["", *notes] if notes else [])])


def _numbers(any_row: Row, row: Row | None, theirs: Mapping[str, Row], peers: Sequence[str]) -> list[str]:
    cells = [f"{any_row['bytes'] / 1e6:,.1f}", f"{any_row['flop'] / 1e9:,.2f}"]
    if row is None:
        cells += ["-"] * 5
    else:
        cells += [row["impl"], microseconds(row["median_us"]), f"{row['gb_per_s']:,.0f}"]
        cells += [f"{row['tflops']:,.1f}", f"{row['roofline_share']:.0%}"]
    for peer in peers:
        other = theirs.get(peer)
        if other is None:
            cells.append("-")
        elif row is None:
            cells.append(microseconds(other["median_us"]))
        else:
            ratio = other["median_us"] / row["median_us"]
            cells.append(f"{microseconds(other['median_us'])} ({ratio:.2f}x)")
    return [*cells, "-" if row is None else f"{row['rel_err']:.1e}"]


def _notes(rows: Sequence[Row], refused: Sequence[Mapping[str, str]]) -> list[str]:
    notes = []
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in refused:
        reasons.setdefault((entry["impl"], entry["reason"]), []).append(entry["case"])
    for (name, reason), cases in reasons.items():
        where = cases[0] if len(cases) == 1 else f"{cases[0]} and {len(cases) - 1} more"
        notes.append(f"- {name}: {reason} [{where}]")
    remarks = {(row["impl"], row["note"]) for row in rows if row.get("note")}
    notes += [f"{name}: {remark}" for name, remark in sorted(remarks)]
    slow = sorted({row["impl"] for row in rows if row["timing"] == "events"})
    if slow:
        notes.append(f"launched from Python, not from a CUDA graph: {', '.join(slow)}")
    if any(not row["ours"] for row in rows):
        notes.append("(1.50x): the peer takes 1.5 times as long as ours")
    return notes


def microseconds(value: float) -> str:
    """A time with three digits that count."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
