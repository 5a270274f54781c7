"""Tables of serving results for `bench.report`: `<!-- results:serving point=decode -->`, and two others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]

# (field, heading, how it is written); what no row has is left out
_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("model", "model", str),
    ("impl", "attention", str),
    ("gpus", "GPUs", str),
    ("context_tokens", "context, tokens", "{:,}".format),
    ("sequences", "sequences", str),
    ("concurrency", "requests at a time", str),
    ("kv_dtype", "KV cache", str),
    ("memory_limit_gib", "card, GiB", "{:g}".format),
    ("ttft_s", "first token, s", "{:,.2f}".format),
    ("prefill_tokens_per_s", "prefill, tokens/s", "{:,.0f}".format),
    ("decode_tokens_per_s", "decode, tokens/s", "{:,.1f}".format),
    ("limit_tokens_per_s", "memory limit, tokens/s", "{:,.1f}".format),
    ("share_of_limit", "of limit", "{:.0%}".format),
    ("p50_tpot_ms", "ms per token, p50", "{:,.1f}".format),
    ("p99_tpot_ms", "p99", "{:,.1f}".format),
    ("p99_ttft_ms", "first token, p99, ms", "{:,.0f}".format),
    ("peak_gib", "peak, GiB", "{:.2f}".format),
    ("cache_tokens", "cache holds, tokens", "{:,}".format),
)
_TEXTS = {"model", "attention", "KV cache"}
_SAME = ("point", "model", "impl", "gpus", "context_tokens", "kv_dtype", "sequences", "concurrency", "gpu")

SERVING_FIELDS = frozenset({"point", "model", "impl", "context_tokens", "kv_dtype"})
PARITY_FIELDS = frozenset({"point", "case", "dtype", "equal", "prompts"})
FAULT_FIELDS = frozenset({"point", "fault", "held", "seconds"})


def serving_table(rows: Sequence[Row]) -> str:
    """Times, rates and memory, a line per implementation and length; of equal measurements the newest."""
    # results from before there were several had one
    rows = [{"gpus": 1, **row} for row in rows]
    newest = {tuple(row.get(field) for field in _SAME): row for row in rows}
    ordered = sorted(
        newest.values(),
        key=lambda row: (str(row["model"]), row["context_tokens"], str(row["impl"]), row["gpus"]),
    )
    columns = [column for column in _COLUMNS if any(row.get(column[0]) is not None for row in ordered)]
    if all(row["gpus"] == 1 for row in ordered):
        columns = [column for column in columns if column[0] != "gpus"]
    lines = [
        [title for _, title, _ in columns] + ["device", "result"],
        ["---" if title in _TEXTS else "---:" for _, title, _ in columns] + ["---", "---"],
    ]
    for row in ordered:
        cells = ["-" if row.get(field) is None else write(row[field]) for field, _, write in columns]
        lines.append([*cells, row["gpu"], f"`{row['result']}`"])
    return _markdown(lines)


def parity_table(rows: Sequence[Row]) -> str:
    """Prompts with the greedy tokens of transformers in float32, and how far logarithms are apart until others."""
    newest = {(row["model"], row["case"], row["gpu"]): row for row in rows}
    lines = [
        ["engine", "prompts with equal tokens", "largest difference of a logarithm", "device", "result"],
        ["---", "---:", "---:", "---", "---"],
    ]
    for row in newest.values():
        equal = f"{row['equal']} of {row['prompts']}"
        difference = f"{row['max_logprob_difference']:.1e}"
        lines.append([row["case"], equal, difference, row["gpu"], f"`{row['result']}`"])
    return _markdown(lines)


def faults_table(rows: Sequence[Row]) -> str:
    """Faults, whether each ended as it has to, and after how many seconds."""
    newest = {(row["fault"], row["gpu"]): row for row in rows}
    lines = [
        ["fault", "as it has to be", "seconds", "device", "result"],
        ["---", "---", "---:", "---", "---"],
    ]
    for row in newest.values():
        held = "yes" if row["held"] else "no"
        lines.append([row["fault"], held, f"{row['seconds']:.1f}", row["gpu"], f"`{row['result']}`"])
    return _markdown(lines)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# what `bench.report` takes: name, fields that a row must have, function
TABLES = {
    "serving": (SERVING_FIELDS, serving_table),
    "parity": (PARITY_FIELDS, parity_table),
    "faults": (FAULT_FIELDS, faults_table),
}
