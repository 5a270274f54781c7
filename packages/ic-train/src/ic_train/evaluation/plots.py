"""Plots of retrieval results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

_DEPTH_BINS = 10


def plot_passkey(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the share of pass keys found by context length and depth, one row of cells per length.

    Args:
        rows: retrieval rows with their samples.
        path: PNG to write.
    """
    figure, axis = plt.subplots(figsize=(8, 0.9 + 0.6 * len(rows)), layout="constrained")
    cells, counts, labels = [], [], []
    for row in sorted(rows, key=lambda row: row["context_tokens"]):
        bins: list[list[bool]] = [[] for _ in range(_DEPTH_BINS)]
        for sample in row["samples"]:
            bins[min(int(sample["depth"] * _DEPTH_BINS), _DEPTH_BINS - 1)].append(sample["correct"])
        cells.append([sum(found) / len(found) if found else float("nan") for found in bins])
        # counts, not shares: a cell has too few questions for a percentage
        counts.append([f"{sum(found)}/{len(found)}" if found else "" for found in bins])
        labels.append(f"{row['context_tokens']:,} ({row['correct']}/{row['total']})")
    axis.imshow(cells, aspect="auto", cmap="RdYlGn", vmin=0, vmax=1)
    for y, line in enumerate(counts):
        for x, count in enumerate(line):
            # both ends of the scale are dark
            colour = "white" if count and abs(cells[y][x] - 0.5) > 0.4 else "black"
            axis.text(x, y, count, ha="center", va="center", fontsize=8, color=colour)
    axis.set_yticks(range(len(rows)), labels)
    axis.set_xticks(range(_DEPTH_BINS), [f"{10 * part}-{10 * part + 10}" for part in range(_DEPTH_BINS)])
    axis.set_xlabel("depth of the answer in the context, %")
    axis.set_ylabel("context, tokens")
    first = rows[0]
    axis.set_title(
        f"{first['task']}: {first['model']}, {first['engine']}, {first['kv_dtype']} cache; found of asked"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
