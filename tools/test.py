"""Every test that needs no GPU: `hatch run test`.

With arguments, they go to pytest, and nothing else runs. Without, pytest is followed by the kernels' own tiers
(kernel_tests.py), which need processes of their own, and by Ansible's, which need an environment of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Run the tests; 1 where any fail, pytest's own status where it runs alone."""
    pytest = [sys.executable, "-m", "pytest"]
    if sys.argv[1:]:
        return subprocess.run([*pytest, *sys.argv[1:]], check=False, cwd=HERE.parent).returncode
    lines = []
    failed = False
    # all of them, whatever fails: one run says everything
    parts = (
        ("pytest", pytest),
        ("kernels", [sys.executable, str(HERE / "kernel_tests.py")]),
        ("ansible", ["hatch", "run", "ansible:test"]),
    )
    for name, command in parts:
        start = time.monotonic()
        environment = {**os.environ, "IC_TRAIN_PYTHON": sys.executable}
        status = subprocess.run(command, check=False, cwd=HERE.parent, env=environment).returncode
        failed |= status != 0
        verdict = f"failed with status {status}" if status else "passed"
        lines.append(f"{time.monotonic() - start:7.1f} s  {name}: {verdict}")
    print("\n== tests", *lines, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
