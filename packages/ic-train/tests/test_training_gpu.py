"""On a GPU: kernels against the formulas that the CPU trains with, and a recipe's losses under both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ic_model import ICForCausalLM
from ic_model.testing import compare
from training_runs import PACKAGE, Run, flags_of, make_toys, steps_of, toy_config, values

from ic_train.context_parallel.blocks import _formula_backward, block_backward, block_forward
from ic_train.trainers.feed_forward import fuse_feed_forward
from ic_train.trainers.linear_loss import IGNORED, LossHead

pytestmark = pytest.mark.gpu
# a gradient passes several products whose inputs are rounded to bfloat16
BFLOAT16_GRADIENT = 2e-2


@pytest.mark.parametrize(
    ("queries", "lengths"), [(1000, ()), (130, ()), (1700, ()), (1000, (1000,)), (1000, (300, 1, 699))]
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_blocks_kernels_are_the_formulas(
    queries: int, lengths: tuple[int, ...], deterministic: bool
) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(rows, 8, 192, device="cuda", dtype=torch.bfloat16) for rows in (queries, 1000))
    # as the ring has them: a slice of what the up-projection gave, and of a longer sequence
    v = torch.randn(1100, 8, 256, device="cuda", dtype=torch.bfloat16)[100:, :, 128:]
    out, lse = block_forward(q, k, v, softmax_scale=0.072, lengths=lengths)
    d_out = torch.randn_like(out)
    # as if other blocks had more keys
    inputs = (d_out, q, k, v, out, lse + 0.3)
    # where the order of sums need not be the same, a Hopper GPU has a kernel of its own
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = block_backward(*inputs, softmax_scale=0.072, lengths=lengths)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = _formula_backward(*inputs, 0.072, lengths)
    for one, other in zip(found, expected, strict=True):
        assert compare(one.float(), other).relative_norm < BFLOAT16_GRADIENT


@pytest.mark.parametrize("kind", ["liger", "chunked"])
def test_fused_losses_are_the_plain_one(kind: str) -> None:
    torch.manual_seed(0)
    head = LossHead(256, 49152, bias=False, device="cuda", dtype=torch.bfloat16)
    states = torch.randn(3000, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(49152, (3000,), device="cuda")
    labels[::7] = IGNORED
    found = {}
    for name in (kind, "full"):
        head.kind = name
        loss = head(states, labels) / 3000
        found[name] = [loss, *torch.autograd.grad(loss, (states, head.weight))]
    assert found[kind][0].item() == pytest.approx(found["full"][0].item(), rel=1e-3)
    for one, other in zip(found[kind][1:], found["full"][1:], strict=True):
        assert compare(one.float(), other.float()).relative_norm < BFLOAT16_GRADIENT


def test_the_fused_feed_forward_is_the_plain_one() -> None:
    torch.manual_seed(0)
    # an odd width, and rows as a batch has them
    model = ICForCausalLM(toy_config(intermediate_size=1000, hidden_size=256)).to("cuda", torch.bfloat16)
    ids = torch.randint(256, (2, 400), device="cuda")
    found = {}
    for kind in ("plain", "liger"):
        fuse_feed_forward(model, kind)
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        found[kind] = [loss.detach(), *(weight.grad.clone() for weight in model.parameters())]
    assert found["liger"][0].item() == pytest.approx(found["plain"][0].item(), rel=1e-3)
    for one, other in zip(found["liger"][1:], found["plain"][1:], strict=True):
        assert compare(one.float(), other.float()).relative_norm < BFLOAT16_GRADIENT


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_toys(tmp_path_factory.mktemp("gpu"))


def train(toys: dict[str, Path], name: str, *flags: str) -> Path:
    run = Run(name, [*flags, "--use_cpu", "false", "--bf16", "true"])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(PACKAGE / "accelerate" / "one-gpu.yaml"), "-m", "ic_train.sft"]
    finished = subprocess.run(
        [*command, *flags_of(toys, run)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return toys["runs"] / name


@pytest.mark.parametrize("apart", ["true", "false"])
def test_reference_and_kernels_train_alike(toys: dict[str, Path], apart: str) -> None:
    documents = ("--cross_document_attention", apart)
    plain = train(
        toys,
        f"reference-{apart}",
        *documents,
        *("--attn_implementation", "mla_prefill_reference"),
        *("--linear_loss", "full", "--feed_forward", "plain"),
    )
    fused = train(toys, f"kernels-{apart}", *documents)
    assert values(fused, "loss") == pytest.approx(values(plain, "loss"), rel=5e-3)
    assert values(fused, "grad_norm") == pytest.approx(values(plain, "grad_norm"), rel=5e-2)
    assert all(step["peak_gib"] > 0 for step in steps_of(fused))


def test_activations_on_the_host_change_nothing(toys: dict[str, Path]) -> None:
    checkpointed = ("--gradient_checkpointing", "true")
    here = train(toys, "checkpointed", *checkpointed)
    kept = ("--gradient_checkpointing_kwargs", '{"offload": true}')
    there = train(toys, "offloaded", *checkpointed, *kept)
    assert values(there, "loss") == pytest.approx(values(here, "loss"), rel=1e-4)


def test_a_resumed_run_on_a_gpu_repeats_the_uninterrupted_one(toys: dict[str, Path]) -> None:
    whole = train(toys, "whole")
    rest = train(toys, "rest", "--resume", str(whole / "checkpoint-3"))
    assert values(rest, "loss") == pytest.approx(values(whole, "loss")[3:], rel=1e-4)
