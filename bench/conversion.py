"""The plot of conversions: what a smaller cache costs in perplexity, before healing and after.

`python -m bench.conversion FOLDER ...` draws the sizes of all these results into the first one's `conversion.png`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.report import CONVERSION_FIELDS, Row, conversion_sizes

PLOT_FILE = "conversion.png"
TICKS = (1, 1.1, 1.25, 1.5, 2, 3, 5, 10)


def plot_conversions(folders: Sequence[Path]) -> Path:
    """Perplexity relative to the source over the share of the source's cache that is saved.

    Args:
        folders: of results, of one source; each size is taken from one of them, as in the table.

    Returns:
        the file that was written.

    Raises:
        ValueError: a result has no conversions, or they are of several sources.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, PercentFormatter

    rows = [row for folder in sorted(folders, key=lambda folder: folder.name) for row in _conversions(folder)]
    if len(sources := dict.fromkeys(row["source"] for row in rows)) > 1:
        raise ValueError(f"the results are of {', '.join(sources)}; one plot is of one source")
    sizes = conversion_sizes(rows)
    figure, panel = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for stage in ("converted", "healed"):
        points = [
            (size[stage]["kv_saved_vs_source"], size[stage]["perplexity"] / size["source"]["perplexity"])
            for size in sizes
            if stage in size
        ]
        if points:
            panel.plot(*zip(*points, strict=True), marker="o", label=stage)
    for size in sizes:
        row = size.get("healed", size["converted"])
        place = (row["kv_saved_vs_source"], row["perplexity"] / size["source"]["perplexity"])
        text = f"{row['kv_lora_rank']}+{row['qk_rope_head_dim']}"
        panel.annotate(text, place, textcoords="offset points", xytext=(4, -12), fontsize=8)
    panel.axhline(1.0, color="grey", linewidth=0.8)
    panel.set_yscale("log")
    for axis in (panel.yaxis, panel.xaxis):
        axis.set_minor_formatter(NullFormatter())
    panel.set_yticks(TICKS, [f"{tick:g} x" for tick in TICKS])
    panel.xaxis.set_major_formatter(PercentFormatter(1.0))
    panel.set_xlabel("numbers per token saved against the source's own cache")
    panel.set_ylabel("perplexity, relative to the source")
    panel.set_title(f"{rows[0]['source']}, C + R at each point", fontsize=10)
    panel.grid(alpha=0.3, which="both")
    panel.legend()
    path = folders[0] / PLOT_FILE
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _conversions(folder: Path) -> list[Row]:
    result = json.loads((folder / "result.json").read_text())
    rows = [{**row, "result": folder.name} for row in result["rows"] if set(row) >= CONVERSION_FIELDS]
    if not conversion_sizes(rows):
        raise ValueError(f"{folder / 'result.json'} has no conversions")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the plot of result folders."""
    folders = [Path(name) for name in (sys.argv[1:] if arguments is None else arguments)]
    if not folders:
        print("usage: python -m bench.conversion FOLDER ...", file=sys.stderr)
        return 2
    try:
        print(plot_conversions(folders))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
