"""The plot of conversions: what a smaller cache costs in perplexity, before healing and after.

`python -m bench.conversion FOLDER` draws `conversion.png` into a result's folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.report import CONVERSION_FIELDS, conversion_sizes

PLOT_FILE = "conversion.png"


def plot_conversion_result(folder: Path) -> Path:
    """Perplexity relative to the source over the share of the source's cache that is saved.

    Args:
        folder: of a result.

    Returns:
        the file that was written.

    Raises:
        ValueError: the result has no conversions.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = json.loads((folder / "result.json").read_text())
    rows = [{**row, "result": folder.name} for row in result["rows"] if set(row) >= CONVERSION_FIELDS]
    sizes = conversion_sizes(rows)
    if not sizes:
        raise ValueError(f"{folder / 'result.json'} has no conversions")
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
    panel.set_xlabel("numbers per token saved against the source's own cache")
    panel.set_ylabel("perplexity, relative to the source")
    panel.set_title(f"{rows[0]['source']}, C + R at each point", fontsize=10)
    panel.grid(alpha=0.3, which="both")
    panel.legend()
    path = folder / PLOT_FILE
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the plots of result folders anew."""
    folders = [Path(name) for name in (sys.argv[1:] if arguments is None else arguments)]
    if not folders:
        print("usage: python -m bench.conversion FOLDER ...", file=sys.stderr)
        return 2
    try:
        for folder in folders:
            print(plot_conversion_result(folder))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
