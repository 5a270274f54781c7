"""Write the dashboards as JSON: `python charts/infinite-context/dashboards/build.py [--check]`.

The JSON in files/grafana is what the chart ships; --check fails when it is not what this code makes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import batch
import gpus
import long_context
import serving
import training
from grafana_foundation_sdk.cog.encoder import JSONEncoder

FOLDER = Path(__file__).parents[1] / "files" / "grafana"
BOARDS = {
    "serving": serving.build,
    "long-context": long_context.build,
    "gpus": gpus.build,
    "batch": batch.build,
    "training": training.build,
}


def rendered() -> dict[Path, str]:
    """Text of every dashboard's file."""
    return {
        FOLDER / f"{name}.json": json.dumps(build().build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"
        for name, build in BOARDS.items()
    }


def main(arguments: list[str]) -> int:
    """Write the files, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file differs")
    check = parser.parse_args(arguments).check
    texts = rendered()
    present = {path: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")}
    wrong = sorted(
        path.name for path in texts.keys() | present.keys() if texts.get(path) != present.get(path)
    )
    if check:
        print("\n".join(f"{name} is not what dashboards/build.py makes: run it" for name in wrong))
        return 1 if wrong else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in present.keys() - texts.keys():
        path.unlink()
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
