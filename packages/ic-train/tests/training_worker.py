"""Works through launches of `training_runs.launch_all`: imports once, then forks the processes of each launch."""

import json
import multiprocessing
import os
import resource
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from torch import distributed as dist

from ic_train import dpo, sft
from ic_train.long_context import run as _imported_before_the_fork  # noqa: F401

MODULES = {"sft": sft, "dpo": dpo}


def sharding_environment(config: Path) -> dict[str, str]:
    """What accelerate's launcher makes of a configuration file for its processes."""
    fields = yaml.safe_load(config.read_text())["fsdp_config"]
    variables = {name.upper(): str(value).lower() for name, value in fields.items()}
    variables["FSDP_AUTO_WRAP_POLICY"] = fields["fsdp_auto_wrap_policy"]
    variables["FSDP_STATE_DICT_TYPE"] = fields["fsdp_state_dict_type"]
    return variables | {"ACCELERATE_USE_FSDP": "true"}


def work(rank: int, launch: dict[str, Any], port: int, results: Any) -> None:
    torch.set_num_threads(1)
    processes = launch["processes"]
    if launch["sharded"]:
        os.environ.update(
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            | {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            | {"ACCELERATE_USE_CPU": "true"}
            | sharding_environment(Path(launch["config"]))
        )
    before, errors = dict(os.environ), {}
    for run in launch["runs"]:
        os.environ.clear()
        os.environ.update(before | run["environment"])
        # a file may have so many bytes: the disk is full, as far as a run can tell
        limit = int(os.environ.get("TEST_FILE_BYTES", resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        try:
            MODULES[run["module"]].main(run["flags"])
        except SystemExit as error:
            errors[run["name"]] = str(error.code)
        except Exception:
            errors[run["name"]] = traceback.format_exc()
    if rank == 0:
        results.put(errors)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def main(plan: Path) -> None:
    context = multiprocessing.get_context("fork")
    errors: dict[str, str] = {}
    for launch in json.loads(plan.read_text()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        results = context.SimpleQueue()
        ranks = [
            context.Process(target=work, args=(rank, launch, port, results))
            for rank in range(launch["processes"])
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
            assert rank.exitcode == 0, f"a rank of {[run['name'] for run in launch['runs']]} died"
        errors |= results.get()
    plan.with_suffix(".done.json").write_text(json.dumps(errors))


main(Path(sys.argv[1]))
