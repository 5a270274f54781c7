"""Tables of training results for `bench.report`: speed, several GPUs beside one, their links, a rank that dies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

# what a run on one GPU must share with one on several
_SAME = ("model", "tokens_per_sequence", "impl", "gpu")


def training_table(rows: Sequence[Row]) -> str:
    """Speed, MFU, utilisation and memory of the trainer, a line per model, length, batch and implementation."""
    named = ("model", "tokens_per_sequence", "gpus", "ring", "impl", "gpu")
    # the time of a first step stands only where there is no other
    rows = sorted(rows, key=lambda row: not row.get("compiles", False))
    newest = {(*(row[field] for field in named), _batch(row), _recomputes(row)): row for row in rows}
    lines = [
        (
            "| model | sequence, tokens | per GPU and step | GPUs, ring | by | tokens/s | MFU | GPU busy "
            "| peak, GiB | device | result |"
        ),
        "|---|---:|---|---|---|---:|---:|---:|---:|---|---|",
    ]
    order = ("model", "tokens_per_sequence", "impl")
    for row in sorted(newest.values(), key=lambda row: (*(row[field] for field in order), _batch(row))):
        busy = f"{row['gpu_util']:.1%}" if "gpu_util" in row else "-"
        batch = f"{_batch(row)}{', recomputed' if _recomputes(row) else ''}"
        made_by = f"`{row['impl']}`{', first step' if row.get('compiles') else ''}"
        lines.append(
            f"| {row['model']} | {row['tokens_per_sequence']:,} | {batch} | {row['gpus']}, {row['ring']} "
            f"| {made_by} | {row['tokens_per_s']:,.0f} | {row['mfu']:.1%} | {busy} | {row['peak_gib']:.1f} "
            f"| {row['gpu']} | `{row['result']}` |"
        )
    return "\n".join(lines)


def _batch(row: Row) -> int:
    """Sequences per GPU and step of the optimiser."""
    return int(_flag(row, "per_device_train_batch_size")) * int(_flag(row, "gradient_accumulation_steps"))


def _recomputes(row: Row) -> bool:
    return _flag(row, "gradient_checkpointing") == "true"


def _flag(row: Row, name: str) -> str:
    """A flag's value in the trainer's command: the last one holds; transformers' default otherwise."""
    values = re.findall(rf"--{name} (\S+)", row["flags"])
    return values[-1] if values else {"gradient_checkpointing": "false"}.get(name, "1")


def scaling_table(rows: Sequence[Row]) -> str:
    """Several GPUs beside one: tokens per second and GPU, memory and, in a ring, losses, which are to be equal."""
    rows = [row for row in rows if not row.get("compiles")]
    one = {_work(row): row for row in rows if row["gpus"] == 1}
    newest = {(*_work(row), row["gpus"], row["ring"]): row for row in rows if row["gpus"] > 1}
    lines = [
        (
            "| model | sequence, tokens | per GPU and step | by | GPUs, ring | tokens/s per GPU | of one GPU's "
            "| MFU | peak, GiB | losses, of one GPU | device | result, of one GPU |"
        ),
        "|---|---:|---|---|---|---:|---:|---:|---:|---|---|---|",
    ]
    order = ("model", "tokens_per_sequence", "impl", "gpus", "ring")
    for row in sorted(newest.values(), key=lambda row: [row[field] for field in order]):
        alone = one.get(_work(row))
        rate = row["tokens_per_s_per_gpu"]
        share = f"{rate / alone['tokens_per_s']:.1%}" if alone else "-"
        loss = "-"
        if alone and row["ring"] == row["gpus"]:
            loss = f"{_losses(row)}, {_losses(alone)}"
        batch = f"{_batch(row)}{', recomputed' if _recomputes(row) else ''}"
        beside = f", `{alone['result']}`" if alone else ""
        lines.append(
            f"| {row['model']} | {row['tokens_per_sequence']:,} | {batch} | `{row['impl']}` "
            f"| {row['gpus']}, {row['ring']} | {rate:,.0f} | {share} | {row['mfu']:.1%} "
            f"| {row['peak_gib']:.1f} | {loss} | {row['gpu']} | `{row['result']}`{beside} |"
        )
    return "\n".join(lines)


def links_table(rows: Sequence[Row]) -> str:
    """What one step of a ring passes on, how fast, and what keys and values would be; beside a large message."""
    newest = {
        (row["model"], row["gpus"], row["message"], row["tokens_per_sequence"], row["gpu"]): row
        for row in rows
    }
    lines = [
        "| message | GPUs | MiB a step | as keys and values, MiB | us | GB/s each way | device | result |",
        "|---|---:|---:|---:|---:|---:|---|---|",
    ]
    for row in sorted(newest.values(), key=lambda row: (row["gpus"], row["tokens_per_sequence"])):
        what, expanded = "large", "-"
        if row["message"] == "rows":
            what = f"rows of {row['tokens_per_sequence']:,} tokens, {row['model']}"
            expanded = f"{row['expanded_bytes_per_step'] / 2**20:,.0f}"
        lines.append(
            f"| {what} | {row['gpus']} | {row['bytes_per_step'] / 2**20:,.0f} | {expanded} "
            f"| {row['median_us']:,.0f} | {row['gb_per_s']:.0f} | {row['gpu']} | `{row['result']}` |"
        )
    return "\n".join(lines)


def rank_loss_table(rows: Sequence[Row]) -> str:
    """Runs whose last rank was killed, beside the same runs left alone."""
    newest = {(row["model"], row["gpus"], row["gpu"]): row for row in rows}
    lines = [
        (
            "| model | GPUs | killed after step | resumed from | after, s | largest relative difference of a loss "
            "| device | result |"
        ),
        "|---|---:|---:|---:|---:|---:|---|---|",
    ]
    for row in newest.values():
        lines.append(
            f"| {row['model']} | {row['gpus']} | {row['killed_after_step']} of {row['steps']} "
            f"| {row['resumed_from_step']} | {row['resuming_after_s']:.1f} "
            f"| {row['max_relative_loss_difference']:.1e} | {row['gpu']} | `{row['result']}` |"
        )
    return "\n".join(lines)


def _work(row: Row) -> tuple[Any, ...]:
    """What each GPU does in a step."""
    return (*(row[field] for field in _SAME), _batch(row), _recomputes(row))


def _losses(row: Row) -> str:
    return " ".join(f"{loss:.3f}" for loss in row["losses"])


_TRAINING_FIELDS = frozenset({"tokens_per_sequence", "impl", "ring", "mfu", "flags"})
# what `bench.report` takes: name, fields that a row must have, function
TABLES = {
    "training": (_TRAINING_FIELDS, training_table),
    "training-scaling": (_TRAINING_FIELDS, scaling_table),
    "training-links": (
        frozenset({"message", "bytes_per_step", "gb_per_s", "expanded_bytes_per_step"}),
        links_table,
    ),
    "training-rank-loss": (
        frozenset({"killed_after_step", "resumed_from_step", "resuming_after_s"}),
        rank_loss_table,
    ),
}
