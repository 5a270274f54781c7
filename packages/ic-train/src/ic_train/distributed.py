"""Processes of a training run: how many, on what, and FSDP2 where there is no GPU."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import distributed as dist


def allow_fsdp_on_cpu() -> None:
    """Let accelerate shard on the CPU when its launcher was told to (`distributed_type: FSDP`, `use_cpu: true`).

    accelerate 1.15 takes FSDP for accelerators only and would train data-parallel without a word. FSDP2
    itself runs on gloo; what is changed here is the one condition that keeps accelerate from it, before its
    state is built.
    """
    state = PartialState()
    if state.distributed_type == DistributedType.MULTI_CPU and fsdp_was_asked_for():
        # any kind that accelerate would go on to FSDP from; it sets FSDP itself then
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def fsdp_was_asked_for() -> bool:
    """Whether accelerate's launcher was told to shard."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def compile_by_block(compiled: bool) -> None:
    """Let accelerate compile block by block where torch.compile is on; before the trainer is built.

    As a whole the model would be compiled before FSDP2 gives each block its hooks, which then do not run. The
    variable is accelerate's own, but what a user sets is overwritten by its launcher.
    """
    if compiled:
        os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] = "true"


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def ring_groups(size: int) -> Any:
    """The process group of the `size` consecutive processes that share a sequence, or None for one alone.

    Raises:
        ValueError: the number of processes is no multiple of it.
    """
    processes = world_size()
    if size < 1 or processes % size:
        raise ValueError(
            f"context_parallel_size is {size}; it must divide the number of processes, {processes}"
        )
    if size == 1:
        return None
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, processes, size)]
    return groups[rank() // size]


def cpu_group() -> Any:
    """A process group for tensors on the CPU, whatever the devices are; None where nothing is distributed."""
    return dist.new_group(backend="gloo") if dist.is_initialized() else None


def any_process(value: bool, group: Any) -> bool:
    """Whether the value is true on any process; all must call it."""
    if group is None:
        return value
    flag = torch.tensor(int(value))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    return bool(flag)


def from_first_process(value: Any, group: Any) -> Any:
    """The first process's value; all must call it."""
    if group is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group)
    return values[0]
