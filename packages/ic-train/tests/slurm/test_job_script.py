"""What the batch scripts do when SLURM refuses, a job starts again, or an array is longer than its rates."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from training_runs import PACKAGE

SCRIPTS = PACKAGE / "slurm"
# a run that notes its arguments, and does what RUN says
SRUN = """\
#!/bin/bash
printf '%s\\n' "$@" >"$ROOT/arguments"
eval "$RUN"
"""
SCONTROL = """\
#!/bin/bash
echo "scontrol $*"
[ "$1" != requeue ] || exit "$REQUEUE_STATUS"
"""


class Job:
    """A batch script's job: `srun` and `scontrol` are stand-ins."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.output = root / "out"
        self.output.mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "sleep": "#!/bin/bash\n"}.items():
            (root / name).write_text(text)
            (root / name).chmod(0o755)

    def start(
        self, *words: str, run: str = "", script: str = "one-node.sbatch", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{self.root}:{os.environ['PATH']}",
            "ROOT": str(self.root),
            "OUT": str(self.output),
            "RUN": run,
            "REQUEUE_STATUS": "0",
            "IC_SLURM": str(SCRIPTS),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node1",
            **variables,
        }
        command = ["bash", str(SCRIPTS / script), "recipe.yaml", "--output_dir", str(self.output), *words]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    def resumes(self) -> list[str]:
        """The values of --resume that the run was given; the last one counts."""
        words = (self.root / "arguments").read_text().split()
        return [after for word, after in zip(words, words[1:], strict=False) if word == "--resume"]

    def save(self, step: int, saved_s: int) -> None:
        folder = self.output / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "complete.json").touch()
        os.utime(folder / "complete.json", (saved_s, saved_s))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_job_that_cannot_be_requeued_has_failed(job: Job) -> None:
    for run in (
        'touch "$OUT/requeue"',
        'mkdir "$OUT/checkpoint-1"; touch "$OUT/checkpoint-1/complete.json"; exit 9',
    ):
        ended = job.start(run=run, REQUEUE_STATUS="1")
        assert ended.returncode == 1
        assert "scontrol requeue 7" in ended.stdout
        assert "error: job 7 was not requeued; submit it again" in ended.stderr


def test_a_run_that_fails_is_requeued_if_it_has_saved(job: Job) -> None:
    job.save(60, 100)
    # goes back to an earlier one, as --resume may tell it to, and saves nothing
    ended = job.start(run='mv "$OUT/checkpoint-60" "$OUT/abandoned-checkpoint-60"; exit 9')
    assert ended.returncode == 9 and "requeue" not in ended.stdout
    # the same number as before is a save, too
    job.save(60, 200)
    ended = job.start(run='touch "$OUT/checkpoint-60/complete.json"; exit 9')
    assert "status 9, but the run has saved: requeueing job 7" in ended.stdout


def test_a_named_checkpoint_is_for_the_first_start(job: Job) -> None:
    named = ("--resume", str(job.output / "checkpoint-40"))
    job.save(40, 100)
    (job.output / "resumed").write_text("of an earlier job\n")
    job.start(*named)
    assert job.resumes()[-1] == named[1]
    # it ended before the trainer had gone on from it
    job.start(*named, SLURM_RESTART_COUNT="1")
    assert job.resumes()[-1] == named[1]
    (job.output / "resumed").write_text(f"{named[1]}\n")
    job.start(*named, SLURM_RESTART_COUNT="2")
    assert job.resumes()[-1] == "auto"


def test_an_array_task_without_a_rate_says_so(job: Job) -> None:
    rates = {"IC_RATES": "1e-5 2e-5"}
    ended = job.start(script="sweep.sbatch", SLURM_ARRAY_TASK_ID="2", **rates)
    assert ended.returncode == 2
    assert (
        "IC_RATES is '1e-5 2e-5', which has no rate for array task 2; submit with --array=0-1" in ended.stderr
    )
    assert job.start(script="sweep.sbatch", SLURM_ARRAY_TASK_ID="1", **rates).returncode == 0
    assert "--learning_rate\n2e-5\n" in (job.root / "arguments").read_text()
