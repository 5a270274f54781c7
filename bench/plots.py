"""Plots of a result, made from its JSON alone: `python -m bench.plots bench/results/FOLDER ...`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# of each op: rows that share these values make one figure
_FIGURES = {
    "mla_decode": ("row_dim",),
    "mla_prefill": ("direction",),
    "latent_cache": ("row_dim",),
    "rms_norm": ("direction", "residual"),
    "rope": (),
}
# and rows that share these too make one line of panels
_PANELS = {
    "mla_decode": ("heads", "kv_dtype"),
    "mla_prefill": ("heads",),
    "latent_cache": ("kv_dtype",),
    "rms_norm": ("row_dim",),
    "rope": ("heads",),
}
_RATE = {"mla_prefill": ("tflops", "TFLOP/s")}


def plot_result(folder: Path) -> list[Path]:
    """Draw time and rate against context and batch, one line per implementation.

    Args:
        folder: of a result; the pictures are written there.

    Returns:
        the files written: none where matplotlib is not installed, which is said.
    """
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed", file=sys.stderr)
        return []
    matplotlib.use("Agg")
    result = json.loads((folder / "result.json").read_text())
    # several queries and unequal lengths have but a case or two: they stand in the tables
    rows = [
        row
        for row in result["rows"]
        if row.get("op") in _FIGURES
        and row.get("lengths") != "uneven"
        and (row["op"] != "mla_decode" or row["query_tokens"] == 1)
    ]
    return [
        _figure(folder, result, dict(zip(names, values, strict=True)), chosen)
        for (_, names, values), chosen in _grouped(rows, lambda row: _FIGURES[row["op"]]).items()
    ]


def _grouped(rows: Sequence[Row], fields: Callable[[Row], tuple[str, ...]]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        names = fields(row)
        groups.setdefault((row["op"], names, tuple(row[name] for name in names)), []).append(row)
    return groups


def _figure(folder: Path, result: Row, named: Row, rows: list[Row]) -> Path:
    import matplotlib.pyplot as plt

    op = rows[0]["op"]
    rate, unit = _RATE.get(op, ("gb_per_s", "GB/s"))
    lines = _grouped(rows, lambda row: _PANELS[op])
    impls = sorted({row["impl"] for row in rows}, key=lambda name: (not _is_ours(rows, name), name))
    colours = {name: f"C{place}" for place, name in enumerate(impls)}
    # a single sequence of growing length; many sequences of the length that most batches have
    columns = [(axis, field) for axis in _axes(rows) for field in ("median_us", rate)]
    figure, panels = plt.subplots(
        len(lines),
        len(columns),
        figsize=(4.2 * len(columns), 3.2 * len(lines)),
        squeeze=False,
        layout="constrained",
    )
    for panel_row, ((_, names, values), chosen) in zip(panels, lines.items(), strict=True):
        title = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
        for panel, (axis, field) in zip(panel_row, columns, strict=True):
            _draw(panel, chosen, axis, field, colours)
            panel.set_title(title, fontsize=9)
            panel.set_ylabel("time, us" if field == "median_us" else unit)
    # panels may all be empty where there is but one point
    handles = {label: handle for panel in panels.flat for handle, label in _legend(panel)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=8)
    suffix = "".join(f"-{name}-{value}" for name, value in named.items()).lower()
    heading = ", ".join([op, *(f"{name} {value}" for name, value in named.items()), result["gpu"]])
    figure.suptitle(heading, fontsize=11)
    path = folder / f"{op}{suffix}.png".replace("_", "-")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _axes(rows: Sequence[Row]) -> list[str]:
    batches = {(row["batch"], row["context_tokens"]) for row in rows}
    grows = [
        name for name, place in (("context_tokens", 1), ("batch", 0)) if len({b[place] for b in batches}) > 1
    ]
    return grows or ["context_tokens"]


def _draw(panel: Any, rows: Sequence[Row], axis: str, field: str, colours: Row) -> None:
    fixed = "batch" if axis == "context_tokens" else "context_tokens"
    values = [row[fixed] for row in rows]
    kept = min(values) if axis == "context_tokens" else max(set(values), key=lambda v: (values.count(v), -v))
    for name, colour in colours.items():
        points = sorted((row[axis], row[field]) for row in rows if row["impl"] == name and row[fixed] == kept)
        if points:
            style = {"linewidth": 2.5} if _is_ours(rows, name) else {"linewidth": 1.2, "linestyle": "--"}
            panel.plot(
                *zip(*points, strict=True), marker="o", markersize=3, label=name, color=colour, **style
            )
    panel.set_xscale("log", base=2)
    if field == "median_us":
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=0)
        if field == "gb_per_s" and rows:
            panel.axhline(rows[0]["read_gb_per_s"], color="grey", linewidth=0.8, label="measured read")
    panel.set_xlabel(f"{'context, tokens' if axis == 'context_tokens' else 'batch'} ({fixed} {kept:,})")
    panel.grid(alpha=0.3)


def _is_ours(rows: Sequence[Row], name: str) -> bool:
    return any(row["ours"] for row in rows if row["impl"] == name)


def _legend(panel: Any) -> list[tuple[Any, str]]:
    return list(zip(*panel.get_legend_handles_labels(), strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the plots of result folders anew."""
    folders = [Path(name) for name in (sys.argv[1:] if arguments is None else arguments)]
    if not folders:
        print("usage: python -m bench.plots FOLDER ...", file=sys.stderr)
        return 2
    for folder in folders:
        for path in plot_result(folder):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
