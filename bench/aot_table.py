"""What every kernel needs on every chip, compiled without a GPU: `python bench/aot_table.py`.

Prints a table and writes it to `bench/results`; fails where a kernel does not compile or does not fit the chip.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ic_model.ops import aot
from ic_train.results import new_result_folder, write_result

RESULTS = Path(__file__).resolve().parent / "results"
TOPIC = "aot"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table and the result; 1 where something does not compile or fit."""
    parser = argparse.ArgumentParser(prog="python bench/aot_table.py", description=__doc__)
    aot.add_arguments(parser)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder that the result's folder is made in"
    )
    options = parser.parse_args(arguments)
    pairs = [(op, capability) for capability in options.capability for op in options.op]
    rows = aot.rows(aot.compile_all(pairs, progress=lambda line: print(line, file=sys.stderr, flush=True)))
    print(aot.table(rows))
    failed = [row for row in rows if row["error"]]
    if failed:
        # a result is of kernels that work
        print(f"no result is written: {len(failed)} of {len(rows)} do not compile or fit", file=sys.stderr)
        return 1
    folder = new_result_folder(options.results, TOPIC)
    write_result(folder, TOPIC, rows)
    print(f"written: {folder / 'result.json'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
