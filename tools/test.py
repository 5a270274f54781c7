"""Every test that needs no GPU: `hatch run test`.

With arguments, they go to pytest, and nothing else runs. Without, all parts run: pytest over the packages, the
kernels' own tiers (kernel_tests.py), which need processes of their own, and Ansible's, which need an environment
of their own. Two at a time: most of the time goes to programs of one thread. What a part printed follows as a
whole when it has ended, so that no two are mixed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from kernel_tests import VERSIONS

ROOT = Path(__file__).resolve().parents[1]
AT_ONCE = 2
# how often it is said what runs
PROGRESS_S = 60
# what a part gets to stop what it started, once it is told to end
STOP_S = 60

PYTEST = [sys.executable, "-m", "pytest"]
KERNELS = [sys.executable, "tools/kernel_tests.py"]
TRAIN = "packages/ic-train/tests"
# of ic-train, what serves, converts and judges; the other half trains
SERVING = tuple(
    f"{TRAIN}/test_{name}.py"
    for name in (
        "convert_exact", "convert_files", "convert_smollm2", "convert_table", "data_text", "dpo", "evaluate",
        "evaluate_checks", "evaluate_client", "evaluate_compare", "evaluate_failures", "evaluate_pipeline",
        "evaluate_trackers", "evaluation", "hard_sets", "judge", "judge_folders", "judge_server", "perplexity",
        "preference_folders", "preferences", "ruler", "ruler_fitting",
    )
)  # fmt: skip
# name: command, the longest first
PARTS: dict[str, list[str]] = {
    "ansible": ["hatch", "run", "ansible:test"],
    "ic-train, training": [*PYTEST, TRAIN, *(f"--ignore={file}" for file in SERVING)],
    "ic-train, serving": [*PYTEST, *SERVING],
    "charts": [*PYTEST, "charts/tests"],
    "ic-vllm-plugin": [*PYTEST, "packages/ic-vllm-plugin/tests"],
    **{f"kernels, Triton {version}": [*KERNELS, "--triton", version] for version in VERSIONS},
    "ic-model, tests": [*PYTEST, "packages/ic-model/tests", "tests"],
}
# Debian's packages that tests need, where they are missing: one after the other, since apt takes one at a time
PROGRAMS = """
import sys
sys.path[:0] = ["packages/ic-train/tests", "charts/tests", "charts/tests/monitoring", "ansible/tests"]
import image, monitoring_programs, podman_tools, slurm_cluster
slurm_cluster.install()
podman_tools.install_packages(podman_tools.PROGRAMS)
podman_tools.install_packages(
    {"/usr/bin/rclone": "rclone", "/usr/bin/busybox": "busybox", "/usr/sbin/haproxy": "haproxy"}
)
image.install_tools()
monitoring_programs.programs()
"""


@dataclass
class Part:
    """A command whose output goes to a file of its own."""

    name: str
    command: list[str]
    output: Path
    start: float = 0.0
    process: subprocess.Popen[bytes] | None = None
    line: str = ""

    def run(self, core: int) -> None:
        """Run it to its end; `line` says how that was."""
        self.start = time.monotonic()
        with self.output.open("wb") as file:
            # a group of its own: ctrl-c reaches it once, through `stop`
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=_environment(core),
                start_new_session=True,
            )
            status = self.process.wait()
        verdict = f"failed with status {status}" if status else "passed"
        self.line = f"{time.monotonic() - self.start:7.1f} s  {self.name}: {verdict}"

    def text(self) -> str:
        """What it has printed."""
        return self.output.read_text(errors="replace")

    def progress(self) -> str:
        """How long it has run, and pytest's last word on how far it is."""
        percent = [word for word in self.text().split() if word.endswith("%]") and word[:-2].isdigit()]
        return f"{self.name} {time.monotonic() - self.start:.0f} s" + (
            f" ({percent[-1][:-1]})" if percent else ""
        )


def main() -> int:
    """Run the tests; 1 where any fail, pytest's own status where it runs alone."""
    if sys.argv[1:]:
        return subprocess.run([*PYTEST, *sys.argv[1:]], check=False, cwd=ROOT).returncode
    # where it fails, the parts that need them say why
    subprocess.run([sys.executable, "-c", PROGRAMS], check=False, cwd=ROOT)
    with tempfile.TemporaryDirectory(prefix="ic-tests-") as folder:
        parts = [
            Part(name, command, Path(folder) / f"{number}.log")
            for number, (name, command) in enumerate(PARTS.items())
        ]
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            # in a script's background it stays without effect, but not on the parts, which `stop` ends by it
            signal.signal(signal.SIGINT, lambda *_: None)
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            run_all(parts, pool)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            stop(parts)
    print("\n== tests", *(part.line for part in parts), sep="\n")
    return int(not all(part.line.endswith("passed") for part in parts))


def run_all(parts: Sequence[Part], pool: ThreadPoolExecutor) -> None:
    """Run them in their order, and all of them whatever fails: one run says everything."""
    cores: SimpleQueue[int] = SimpleQueue()
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    for number in range(AT_ONCE):
        cores.put(usable[number % len(usable)])

    def run(part: Part) -> None:
        core = cores.get()
        try:
            part.run(core)
        finally:
            cores.put(core)

    waiting = {pool.submit(run, part): part for part in parts}
    while waiting:
        done, _ = wait(waiting, PROGRESS_S, FIRST_COMPLETED)
        for one in done:
            part = waiting.pop(one)
            # what went wrong in the thread itself
            one.result()
            print(f"\n== {part.name}", part.text(), part.line, sep="\n", flush=True)
        if not done:
            running = [part.progress() for part in waiting.values() if part.process is not None]
            print(f"running: {', '.join(running)}", flush=True)


def stop(parts: Sequence[Part]) -> None:
    """End what still runs, as ctrl-c in a terminal would: pytest then stops what its tests started."""
    running = [part.process for part in parts if part.process is not None and part.process.poll() is None]
    for process in running:
        # gone meanwhile
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
    for process in running:
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _environment(core: int) -> dict[str, str]:
    """One thread for each process of a part, and one core for vLLM's worker: parts share the machine."""
    own = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": str(core), "IC_TRAIN_PYTHON": sys.executable}
    return {**os.environ, **own}


if __name__ == "__main__":
    sys.exit(main())
