"""The batch scripts on a real SLURM: a run that is told to end and then loses a node ends like one left alone."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import openai_server
import pytest
from slurm_cluster import Cluster, free_ports, install
from training_runs import FSDP_ON_CPU, PACKAGE, RECIPES, make_toys, steps_of

from ic_train.checkpoints import COMPLETE

SCRIPTS = PACKAGE / "slurm"
STEPS = 80
# a run that is still going on whatever happens, however slowly
ENDLESS = 100_000
# of each wait; on an idle machine they take a tenth of it
PATIENCE_S = 600


@dataclass
class Jobs:
    """A cluster, and what is to be trained on it."""

    cluster: Cluster
    toys: dict[str, Path]

    def submit(self, script: str, *words: str, options: tuple[str, ...] = ()) -> str:
        log = self.cluster.root / f"{script}-%A-%a.log"
        sizes = ("--gpus-per-node=1", "--cpus-per-task=1", "--oversubscribe", "--exclusive=user")
        command = ["sbatch", "--parsable", f"--output={log}", *sizes, *options, str(SCRIPTS / script)]
        return self.cluster.run(*command, *words)

    def train(self, output: Path, *more: str, script: str = "several-nodes.sbatch", **options: Any) -> str:
        flags = ["--model", str(self.toys["model"]), "--corpora", str(self.toys["corpora"])]
        words = [str(RECIPES / "text.yaml"), *flags, "--output_dir", str(output), *more]
        # this machine may give out any port to whoever connects; but an array shares what it is given
        self.cluster.environment.pop("IC_MASTER_PORT", None)
        if script != "sweep.sbatch":
            self.cluster.environment["IC_MASTER_PORT"] = str(free_ports(1)[0])
        return self.submit(script, *words, **options)

    def reached(self, output: Path, step: int) -> bool:
        file = output / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        # the last line may be half written
        return any(f'"step": {step},' in line for line in lines)

    @cached_property
    def evaluation(self) -> str:
        """The job that evaluates one of a sweep's runs, and waits for them; submitted when first asked for."""
        output = self.toys["runs"] / "sweep"
        self.cluster.environment["IC_RATES"] = "1e-3 1e-2"
        more = ("--max_steps", "2", "--save_strategy", "no")
        node = "--nodelist=node1"
        sweep = self.train(output, *more, script="sweep.sbatch", options=("--array=0-1", node))
        model = output / "lr-1e-2"
        evaluate = ["--suite", "niah", "--lengths", "1k", "--questions", "8", "--keys-per-context", "4"]
        config = {
            # reads what it is asked about, as a model would that finds everything
            "serve": [sys.executable, openai_server.__file__, "{port}"],
            "evaluate": [*evaluate, "--tokenizer", str(model)],
            "thresholds": "thresholds.yaml",
        }
        settings = self.cluster.root / "pipeline"
        settings.mkdir()
        # JSON is YAML
        (settings / "pipeline.yaml").write_text(json.dumps(config))
        limits = [{"task": "niah", "context_tokens": 1024, "least": 0.6}]
        (settings / "thresholds.yaml").write_text(json.dumps(limits))
        words = (str(model), "--config", str(settings / "pipeline.yaml"))
        job = self.submit("evaluate.sbatch", *words, options=(f"--dependency=afterok:{sweep}", node))
        assert self.cluster.state_of(job) == "PENDING"
        return job


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    install()
    root = tmp_path_factory.mktemp("slurm")
    cluster = Cluster(root)
    cluster.environment |= {
        "IC_PYTHON": sys.executable,
        "IC_SLURM": str(SCRIPTS),
        "IC_LAUNCHER": str(FSDP_ON_CPU),
        # both nodes are this machine, which no name of theirs leads to
        "IC_MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{Path(sys.executable).parent}:{cluster.environment['PATH']}",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    try:
        yield Jobs(cluster, make_toys(root / "toys"))
    finally:
        cluster.close()


@pytest.mark.timeout(1800)
def test_a_run_through_a_signal_and_a_dead_node_goes_on_like_one_left_alone(jobs: Jobs) -> None:
    cluster, output, whole = jobs.cluster, jobs.toys["runs"] / "disturbed", jobs.toys["runs"] / "alone"
    # the rate depends on the number of steps otherwise
    more = ("--lr_scheduler_type", "constant_with_warmup", "--save_steps", "20", *accumulate(1))
    job = jobs.train(output, *more, "--max_steps", str(ENDLESS), "--save_total_limit", "2")
    cluster.wait_for(lambda: jobs.reached(output, 15), "step 15", PATIENCE_S)
    # to the steps, not to the batch script: what --signal=USR1@300 does before the time limit
    cluster.run("scancel", "--signal=USR1", job)
    cluster.wait_for(lambda: cluster.restarts_of(job) == 1, "first requeue", PATIENCE_S)
    # the same two processes on the node that stays, while the other run waits for its turn
    on_one = ("--nodes=1", "--gpus-per-node=2", "--nodelist=node1")
    alone = jobs.train(whole, *more, "--max_steps", str(STEPS), options=on_one)
    (log,) = cluster.root.glob(f"several-nodes.sbatch-{job}-*.log")
    stopped = int(re.findall(r"SIGUSR1: saving after step (\d+) and ending", log.read_text())[-1])
    assert (output / f"checkpoint-{stopped}" / COMPLETE).is_file()
    cluster.wait_for(lambda: jobs.reached(output, stopped + 25), "progress after the signal", PATIENCE_S)
    assert cluster.state_of(job) == "RUNNING"
    cluster.silence_node("node2")
    # it has the other node, and the time in which SLURM notices
    _ = jobs.evaluation
    cluster.wait_for(lambda: cluster.restarts_of(job) == 2, "second requeue", PATIENCE_S)
    before = steps_of(output)[-1]["step"]
    cluster.replace_node("node2")
    cluster.wait_until_done(alone, PATIENCE_S)
    cluster.wait_for(lambda: jobs.reached(output, max(STEPS, before + 1)), "the last steps", PATIENCE_S)
    cluster.run("scancel", job)
    *_, resumed = map(int, re.findall(r"resuming from \S*checkpoint-(\d+)", log.read_text()))
    # the node took the steps since its last checkpoint with it: they were done twice
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    done = [line["step"] for line in lines if "loss" in line]
    assert done == [*range(1, before + 1), *range(resumed + 1, done[-1] + 1)] and stopped <= resumed
    left, pieced = steps_of(whole), steps_of(output)[:STEPS]
    assert [step["step"] for step in pieced] == list(range(1, STEPS + 1)) == [step["step"] for step in left]
    for name in ("loss", "grad_norm", "learning_rate"):
        assert [step[name] for step in pieced] == [step[name] for step in left], name


def test_a_sweep_has_a_folder_per_rate_and_the_evaluation_waits_for_it(jobs: Jobs) -> None:
    jobs.cluster.wait_until_done(jobs.evaluation, PATIENCE_S)
    output = jobs.toys["runs"] / "sweep"
    rates = {rate: steps_of(output / f"lr-{rate}") for rate in ("1e-3", "1e-2")}
    assert rates["1e-3"][0]["loss"] == rates["1e-2"][0]["loss"]
    assert max(step["learning_rate"] for step in rates["1e-2"]) == pytest.approx(1e-2)
    report = json.loads((output / "lr-1e-2" / "pipeline" / "evaluation" / "report.json").read_text())
    assert [(row["task"], row["correct"], row["total"]) for row in report["rows"]] == [("niah", 8, 8)]


def accumulate(steps: int) -> tuple[str, str]:
    return ("--gradient_accumulation_steps", str(steps))
