"""What FSDP2 computes in bfloat16, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from ic_model import ICForCausalLM
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from training_runs import toy_config

from ic_train.distributed import compile_by_block
from ic_train.trainers.long_context import keep_sums_in_float32


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_blocks_get_their_angles_in_float32_and_compute_in_bfloat16(group: None) -> None:
    half = torch.bfloat16
    # as accelerate makes it
    plugin = SimpleNamespace(mixed_precision_policy=MixedPrecisionPolicy(half, half, half))
    keep_sums_in_float32(SimpleNamespace(fsdp_plugin=plugin))
    model: Any = ICForCausalLM(toy_config())
    options: dict[str, Any] = {
        "mesh": init_device_mesh("cpu", (1,)),
        "mp_policy": plugin.mixed_precision_policy,
    }
    angles, states = [], []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        angles.append(kwargs["position_embeddings"][0].dtype)
        states.append(args[0].dtype)

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
        fully_shard(layer, **options)
    fully_shard(model, **options)
    model(torch.arange(16)[None]).logits.float().sum().backward()
    assert set(angles) == {torch.float32} and set(states) == {half}
    # sums over ranks in float32
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("compiled", [True, False])
def test_accelerate_compiles_by_block_whatever_its_launcher_set(
    monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "False")
    compile_by_block(compiled)
    assert TorchDynamoPlugin(backend=DynamoBackend.INDUCTOR).use_regional_compilation is compiled
