"""The kernels' tests that need no GPU, on the oldest and on the newest Triton: `hatch run kernels`.

Two tiers, each in its own process, because Triton reads `TRITON_INTERPRET` when it is imported, and because no
other test may run with it:

- interpret: the kernels run on the CPU, in Triton's interpreter;
- aot: the kernels are compiled for every chip, and held to its limits.

Arguments other than --triton and --tier go to pytest: `hatch run kernels -- --triton 3.6 -k rms_norm`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = "packages/ic-model/tests/ops"

# the Triton of vLLM 0.26, and the newest: each moves on with what it stands for. Held to a minor release, since a
# new one must not fail an unchanged commit
VERSIONS = ("3.6", "3.9")

# NumPy runs the kernels of these, and no Triton: once is enough
EMULATED = [
    f"--ignore={TESTS}/test_{name}_{chip}.py"
    for name, chip in (("mla_decode", "hopper"), ("mla_decode", "turing"), ("mla_prefill", "hopper"))
]

# pytest's exit status where it found none
NO_TESTS = 5

# pytest's arguments, and variables
TIERS: dict[str, tuple[list[str], dict[str, str]]] = {
    "interpret": ([TESTS], {"TRITON_INTERPRET": "1"}),
    "aot": ([TESTS, "-m", "aot"], {"TRITON_INTERPRET": "0"}),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tiers, all of them whatever fails; 1 where any fails."""
    parser = argparse.ArgumentParser(
        prog="hatch run kernels --",
        description="The kernels' tests that need no GPU; further arguments go to pytest.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--triton", action="append", choices=VERSIONS, help="only this version; may be repeated"
    )
    parser.add_argument("--tier", action="append", choices=TIERS, help="only this tier; may be repeated")
    options, rest = parser.parse_known_args(arguments)
    lines = []
    for version in options.triton or VERSIONS:
        variables = dict(os.environ)
        folder = triton_folder(version)
        if folder is not None:
            variables["PYTHONPATH"] = os.pathsep.join(
                filter(None, (str(folder), os.environ.get("PYTHONPATH")))
            )
        for tier in options.tier or TIERS:
            chosen, extra = TIERS[tier]
            emulated = EMULATED if tier == "interpret" and version != VERSIONS[-1] else []
            command = [sys.executable, "-m", "pytest", *chosen, *emulated, *rest]
            # what the caller chose may be in the other tier only
            none_chosen = NO_TESTS if rest else 0
            lines.append(run(f"{tier}, Triton {version}", command, variables | extra, fine=(0, none_chosen)))
    print("\n== kernels", *lines, sep="\n")
    return int(not all(line.endswith("passed") for line in lines))


def triton_folder(version: str) -> Path | None:
    """The folder to import a version of Triton from; None where the environment has that version itself.

    It lies in the environment, beside the site-packages, and is filled at first use. An environment per version
    would hold PyTorch once more each, and only the version of PyTorch that asks for just that Triton.
    """
    try:
        if metadata.version("triton").startswith(f"{version}."):
            return None
    except metadata.PackageNotFoundError:
        pass
    folder = Path(sys.prefix) / f"triton-{version}"
    if not folder.is_dir():
        print(f"installing Triton {version} into {folder}", flush=True)
        # moved into place when it is complete
        part = folder.with_name(f"{folder.name}.part{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(part)]
        subprocess.run([*pip, f"triton=={version}.*"], check=True)
        part.rename(folder)
    return folder


def run(name: str, command: Sequence[str], variables: dict[str, str], *, fine: Sequence[int]) -> str:
    """Run a command in the root; a line with its seconds that ends in "passed" where its status is fine.

    Args:
        name: of what runs.
        command: program and arguments.
        variables: all environment variables.
        fine: exit statuses of success.
    """
    print(f"\n== {name}", flush=True)
    start = time.monotonic()
    status = subprocess.run(command, check=False, cwd=ROOT, env=variables).returncode
    verdict = f"failed with status {status}" if status not in fine else "passed"
    return f"{time.monotonic() - start:7.1f} s  {name}: {verdict}"


if __name__ == "__main__":
    sys.exit(main())
