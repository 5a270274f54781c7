"""A rank dies in the middle of a run: the launcher starts the ranks again, and the losses are as if none had died.

    python -m bench.cases.rank_loss --gpus 2            # ic-nano, FSDP2, the last rank is killed once
    python -m bench.cases.rank_loss --gpus 2 --toy      # on the CPU, no result

The same run is launched twice by the command of docs/training.md (`accelerate launch --max_restarts`, the trainer
with `--resume auto`): left alone, and with SIGKILL to its last rank as soon as a checkpoint is there. The row has
the step of the kill, the checkpoint that the launcher's second start took, the seconds from the kill until it was
read, and the largest relative difference of the two runs' losses.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ic_train.checkpoints import latest_checkpoint
from ic_train.results import new_result_folder, write_result

from bench.cases.serving_server import end_session
from bench.cases.training import LAUNCHERS, ROOT, corpus_of_bytes

TOPIC = "rank-loss"
TRAINER = "ic_train.sft"


class Failed(Exception):
    """A launch did not do what it has to; the message has the end of what it said."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Launch both runs; 1 where one failed or the losses differ, 2 for a wrong argument."""
    options = _parser().parse_args(arguments)
    if options.gpus < 2:
        print(f"error: --gpus is {options.gpus}; it must be at least 2", file=sys.stderr)
        return 2
    if not 0 < options.save_steps < options.steps:
        print(
            f"error: --save-steps is {options.save_steps}; accepted: 1 to {options.steps - 1}, so that there is "
            "a checkpoint before the end",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        try:
            row = measure(options, Path(scratch))
        except Failed as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(json.dumps({key: value for key, value in row.items() if key != "losses"}, indent=1), flush=True)
    if not options.toy:
        folder = new_result_folder(options.results, TOPIC)
        write_result(folder, TOPIC, [row], seed=options.seed)
        print(f"written: {folder}")
    return int(row["max_relative_loss_difference"] > options.tolerance)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cases.rank_loss",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--gpus", type=int, default=2, help="ranks (default: 2)")
    add("--model", default="ic-nano", help="a preset or a checkpoint's folder (default: ic-nano)")
    add("--tokens", type=int, default=8192, help="per sequence (default: 8,192)")
    add("--steps", type=int, default=60, help="of each run (default: 60)")
    add("--save-steps", type=int, default=20, help="from one checkpoint to the next (default: 20)")
    add("--limit-s", type=float, default=240, help="seconds for each run (default: 240)")
    add("--tolerance", type=float, default=1e-3, help="of a loss, relative (default: 1e-3)")
    add("--seed", type=int, default=0, help="of weights and order")
    add("--results", type=Path, default=ROOT / "bench" / "results", metavar="DIR")
    add("--toy", action="store_true", help="short sequences on the CPU, no result")
    return parser


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Both runs and what is to be said of them.

    Raises:
        Failed: a run ended badly, took longer than its limit, or the second was not resumed.
    """
    corpus = corpus_of_bytes(scratch, options.tokens)
    began = time.monotonic()
    _train(options, corpus, scratch / "alone", kill=False)
    alone_s = time.monotonic() - began
    print(f"left alone: {alone_s:.0f} s", flush=True)
    killed = _train(options, corpus, scratch / "killed", kill=True)
    losses = {name: _losses(scratch / name) for name in ("alone", "killed")}
    if losses["alone"].keys() != losses["killed"].keys():
        raise Failed(f"steps of the two runs: {sorted(losses['alone'])} and {sorted(losses['killed'])}")
    return {
        "model": Path(options.model).name,
        "gpus": options.gpus,
        "tokens_per_sequence": options.tokens,
        "steps": options.steps,
        "alone_s": round(alone_s, 1),
        **killed,
        "max_relative_loss_difference": max(
            abs(losses["killed"][step] / loss - 1) for step, loss in losses["alone"].items()
        ),
        "losses": {name: list(found.values()) for name, found in losses.items()},
    }


def _command(options: argparse.Namespace, corpus: Path, output: Path) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = "cpu.yaml" if options.toy else "one-node.yaml"
    flags = {
        "task": "text",
        "model": options.model,
        "corpora": corpus,
        "output_dir": output,
        "tokens_per_sequence": options.tokens,
        "per_device_train_batch_size": 1,
        "max_steps": options.steps,
        "save_steps": options.save_steps,
        "logging_steps": 1,
        "learning_rate": 1e-4,
        "seed": options.seed,
        "save_final_model": "false",
        "report_to": "none",
        "disable_tqdm": "true",
        "resume": "auto",
    }
    flags |= {"use_cpu": "true"} if options.toy else {"bf16": "true", "attn_implementation": "mla_prefill"}
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCHERS / config)),
        *("--num_processes", str(options.gpus), "--main_process_ip", "127.0.0.1"),
        *("--main_process_port", str(port), "--rdzv_backend", "c10d", "--max_restarts", "1", "-m", TRAINER),
        *(word for key, value in flags.items() for word in (f"--{key}", str(value))),
    ]


def _train(options: argparse.Namespace, corpus: Path, output: Path, *, kill: bool) -> dict[str, Any]:
    # docs/training.md says why the store
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    log = output.with_suffix(".log")
    deadline = time.monotonic() + options.limit_s
    command = _command(options, corpus, output)
    row: dict[str, Any] = {"command": " ".join(command[1:]).replace(str(output.parent), "SCRATCH")}
    with log.open("wb") as said:
        launcher = subprocess.Popen(
            command, stdout=said, stderr=said, env=environment, start_new_session=True
        )
    try:
        if kill:
            row |= _kill_the_last_rank(options, launcher, output, log, deadline)
        code = launcher.wait(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise Failed(f"not finished after {options.limit_s:.0f} s: {_tail(log)}") from None
    finally:
        # it takes its ranks with it
        end_session(launcher)
    if code:
        raise Failed(f"the launcher ended with {code}: {_tail(log)}")
    if kill:
        resumed = _resumed(log)
        if len(set(resumed)) != 1:
            raise Failed(f"resumed {len(resumed)} times: {_tail(log)}")
        row["resumed_from_step"] = int(resumed[0])
    return row


def _kill_the_last_rank(
    options: argparse.Namespace,
    launcher: subprocess.Popen[bytes],
    output: Path,
    log: Path,
    deadline: float,
) -> dict[str, Any]:
    _wait(lambda: latest_checkpoint(output) is not None, launcher, log, deadline)
    ranks = ranks_of(launcher)
    if len(ranks) != options.gpus:
        raise Failed(f"the launcher has {len(ranks)} ranks: {_tail(log)}")
    os.kill(ranks[-1], signal.SIGKILL)
    killed = time.monotonic()
    # read afterwards: until then it goes on
    step = max(_losses(output))
    if step == options.steps:
        raise Failed(
            f"all of its {step} steps were done before a rank could be killed; accepted: more --steps"
        )
    _wait(lambda: bool(_resumed(log)), launcher, log, deadline)
    return {"killed_after_step": step, "resuming_after_s": round(time.monotonic() - killed, 1)}


def ranks_of(launcher: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of the trainers that a launcher has started, in the order of their ranks."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in children if TRAINER.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]


def _resumed(log: Path) -> list[str]:
    return re.findall(r"resuming from \S*checkpoint-(\d+)", log.read_text(errors="replace"))


def _wait(until: Callable[[], bool], launcher: subprocess.Popen[bytes], log: Path, deadline: float) -> None:
    while not until():
        if launcher.poll() is not None:
            raise Failed(f"the launcher ended with {launcher.returncode}: {_tail(log)}")
        if time.monotonic() > deadline:
            raise Failed(f"no time left: {_tail(log)}")
        time.sleep(0.05)


def _losses(output: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]


if __name__ == "__main__":
    sys.exit(main())
