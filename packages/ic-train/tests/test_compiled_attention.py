"""A compiled layer is one graph where our attention kernels run, gives the same numbers, and copies nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ic_model import ICConfig
from ic_model.modeling import ICDecoderLayer
from ic_model.rope import rope_tables
from ic_model.testing import assert_close
from torch._dynamo.testing import CompileCounterWithBackend

from ic_train.context_parallel import SequenceLayout, register_attention

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
# batches with as many sequences, and other documents
DOCUMENTS = ([[0, 5, 30], [0]], [[0], [0]], [[0, 1, 2, 3], [0, 9]])


def make_layer(name: str, device: str = "cpu", **fields: Any) -> ICDecoderLayer:
    shape = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "vocab_size": 64, **fields,
    }  # fmt: skip
    config = ICConfig(**shape)
    config._attn_implementation = name
    torch.manual_seed(0)
    layer = ICDecoderLayer(config, 0)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(0, weight.shape[-1] ** -0.5) if weight.ndim > 1 else weight.uniform_(0.5, 1.5)
    return layer.to(device)


def step(layer: ICDecoderLayer, call: Any, x: torch.Tensor, **keywords: Any) -> dict[str, torch.Tensor]:
    """Output and all gradients."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    tables = rope_tables(layer.self_attn.config, torch.arange(x.shape[1], device=x.device)[None])
    with torch.autocast("cuda", torch.bfloat16, enabled=x.device.type == "cuda"):
        out = call(x, position_embeddings=tables, **keywords)
    out.backward(torch.cos(3 * out.detach()))
    assert x.grad is not None
    found = {"out": out.detach(), "x": x.grad}
    return found | {name: weight.grad.clone() for name, weight in layer.named_parameters()}


def check(
    layer: ICDecoderLayer, compiled: Any, layout: SequenceLayout | None, x: torch.Tensor, kind: str
) -> None:
    expected = step(layer, layer, x, layout=layout)
    for name, part in step(layer, compiled, x, layout=layout).items():
        assert_close(part, expected[name], kind, what=name)


def one_graph() -> None:
    """What the interpreted tests run in their process: `mla_prefill` is the Triton kernels there."""
    register_attention()
    layer, x = make_layer("mla_prefill"), torch.randn(2, 48, 64)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    check(layer, compiled, None, x, "fp32_gradient")
    assert counter.frame_count == 1
    for starts in DOCUMENTS:
        check(layer, compiled, SequenceLayout(48, starts).on(x.device), x, "fp32_gradient")
        # no other graph for other documents
        assert counter.frame_count == 2
    print("one graph")


def checkpointed() -> None:
    """Likewise, with activations that are computed again."""
    register_attention()
    layer, x = make_layer("mla_prefill"), torch.randn(2, 48, 64)
    expected = step(layer, layer, x)
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = lambda function, *arguments: torch.utils.checkpoint.checkpoint(
        function, *arguments, use_reentrant=False
    )
    layer.train()
    layer.compile(backend="aot_eager", fullgraph=True)
    for name, part in step(layer, layer, x).items():
        assert_close(part, expected[name], "fp32_gradient", what=name)
    print("checkpointed")


def test_with_interpreted_kernels() -> None:
    # Triton decides when it is imported whether it interprets
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
    )
    program = "import test_compiled_attention as here; here.one_graph(); here.checkpointed()"
    command = [sys.executable, "-c", program]
    finished = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert finished.stdout == "one graph\ncheckpointed\n", finished.stderr[-2000:]


@pytest.mark.parametrize("name", ["mla_prefill", "mla_prefill_reference"])
def test_other_kernels_end_the_graph(name: str) -> None:
    register_attention()
    layer, x = make_layer(name), torch.randn(2, 48, 64)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter)
    for layout in (None, *(SequenceLayout(48, starts).on(x.device) for starts in DOCUMENTS)):
        check(layer, compiled, layout, x, "fp32_gradient")
    assert counter.frame_count > 1


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="it is for compute capability 9.0")
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("name", ["mla_prefill", "mla_prefill_gluon", "mla_prefill_triton"])
def test_on_hopper(name: str, packed: bool) -> None:
    register_attention()
    shape = {"hidden_size": 512, "num_attention_heads": 4, "q_lora_rank": 256, "kv_lora_rank": 256}
    layer, x = make_layer(name, "cuda", **shape), torch.randn(2, 1024, 512, device="cuda")
    layout = SequenceLayout(1024, [[0, 5, 300], [0, 700]]).on(x.device) if packed else None
    compiled = torch.compile(layer, fullgraph=True)
    check(layer, compiled, layout, x, "bf16_model")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        step(layer, compiled, x, layout=layout)
    smallest = x.shape[0] * x.shape[1] * 4 * 64
    for event in profile.events():
        # the gradients of weights, which `step` keeps, are smaller
        if event.name in ("aten::copy_", "aten::clone", "aten::contiguous") and event.input_shapes[0]:
            assert torch.Size(event.input_shapes[0]).numel() < smallest, (event.name, event.input_shapes)
