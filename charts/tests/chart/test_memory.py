"""The chart's memory check is the arithmetic of `ic-vllm-plugin check`, to the page."""

import json
import re

import generate
import pytest
from chart_tools import HelmError, one, render
from ic_model import sizing, sizing_serving
from ic_model.presets import preset, preset_names
from ic_vllm_plugin import cli

GIB = sizing.GIB
# values beside the model's and the card's, and the flags of `ic-vllm-plugin check` that say the same
CASES = [
    ("ic-nano", 3, {}, []),
    ("ic-1b", 8, {}, []),
    ("ic-1b", 8, {"engine.kvCacheDtype": "fp8"}, ["--kv-cache-dtype", "fp8"]),
    ("ic-1b", 4, {}, []),
    ("ic-1b", 7.6, {"engine.gpuMemoryUtilization": 0.85}, ["--gpu-memory-utilization", "0.85"]),
    ("ic-1b", 4, {"engine.tensorParallelSize": 2}, ["--tensor-parallel-size", "2"]),
    (
        "ic-1b",
        4,
        {"engine.maxNumBatchedTokens": 512, "engine.maxNumSeqs": 4},
        ["--max-num-batched-tokens", "512", "--max-num-seqs", "4"],
    ),
    (
        "ic-1b",
        6,
        {"engine.maxNumBatchedTokens": 8192, "engine.maxNumSeqs": 512},
        ["--max-num-batched-tokens", "8192", "--max-num-seqs", "512"],
    ),
    ("ic-135m", 1.55, {}, []),
]


def check(name, memory_gib, flags, capsys):
    """What `ic-vllm-plugin check` says, with vLLM's defaults for a card below 70 GiB where no flag says else."""
    step = ["--max-num-batched-tokens", "2048", "--max-num-seqs", "256", "--kv-cache-dtype", "auto"]
    cli.main(["check", name, "--gpu-memory-gib", str(memory_gib), *step, *flags, "--json"])
    return json.loads(capsys.readouterr().out)


def values_of(name, memory_gib, further):
    return {"model.preset": name, "model.path": "/models/own", "gpu.memoryGib": memory_gib, **further}


def accepted(**values):
    try:
        render(set=values)
    except HelmError as error:
        assert "engine.maxModelLen is" in str(error), error
        return False
    return True


@pytest.mark.parametrize(("name", "memory_gib", "further", "flags"), CASES)
def test_the_chart_accepts_what_fits_and_refuses_one_token_more(name, memory_gib, further, flags, capsys):
    tokens = check(name, memory_gib, flags, capsys)["longest_tokens"]
    assert 0 < tokens < preset(name).max_position_embeddings, "the case should lie inside the range"
    values = values_of(name, memory_gib, further)
    assert accepted(**values, **{"engine.maxModelLen": tokens})
    assert not accepted(**values, **{"engine.maxModelLen": tokens + 1})


@pytest.mark.parametrize(("name", "memory_gib", "further", "flags"), CASES)
def test_the_message_has_the_numbers_of_the_check_and_the_longest_that_fits(
    name, memory_gib, further, flags, capsys
):
    limit = preset(name).max_position_embeddings
    plan = check(name, memory_gib, [*flags, "--max-model-len", str(limit)], capsys)
    with pytest.raises(HelmError) as refusal:
        render(set=values_of(name, memory_gib, further))
    message = str(refusal.value)
    assert f"engine.maxModelLen is 0, the model's own {limit} tokens," in message
    memory = plan["memory"]
    shares = [memory["weights"], memory["kv_cache"]]
    parts = [*shares, sum(memory.values()) - sum(shares)]
    numbers = [f"{part / GIB:.2f}" for part in (sum(memory.values()), *parts, plan["usable_bytes"])]
    found = re.search(
        r"needs (\S+) GiB on each GPU \(weights (\S+), KV cache (\S+), workspace (\S+)\).* gives (\S+) GiB",
        message,
    )
    assert list(found.groups()) == numbers
    assert re.findall(r"set engine.maxModelLen to at most (\d+)", message) == [str(plan["longest_tokens"])]
    assert ("fp8 halves" in message) == (plan["kv_dtype"] != "fp8")


def test_what_vllm_takes_by_itself_is_what_the_check_counts(monkeypatch):
    from vllm.engine import arg_utils
    from vllm.usage.usage_lib import UsageContext

    table = json.loads((generate.CHART / "files" / "sizing.json").read_text())["vllmDefaults"]

    class Platform:
        def __init__(self, gib):
            self.gib = gib

        def get_device_total_memory(self):
            return self.gib * GIB

        def get_device_name(self):
            return "NVIDIA H100 80GB HBM3"

        def __getattr__(self, name):
            return lambda *_: False

    for row, below in zip(table, [*table[1:], None], strict=True):
        for gib in (row["fromGib"], below["fromGib"] - 1 if below else 288):
            monkeypatch.setattr(arg_utils, "current_platform", Platform(gib))
            tokens, sequences = arg_utils.EngineArgs.get_batch_defaults(1)
            server = UsageContext.OPENAI_API_SERVER
            assert (tokens[server], sequences[server]) == (row["tokens"], row["sequences"]), gib


def test_a_large_cards_larger_steps_are_counted():
    def fits(permille, **step):
        usable = 80 * permille / 1000 * GIB
        memory = sizing_serving.server_memory(
            preset("ic-1b"), usable_bytes=usable, context_tokens=1048576, **step
        )
        return memory.total <= usable

    large = {"step_tokens": 8192, "sequences": 1024}
    least = next(permille for permille in range(100, 900) if fits(permille, **large))
    assert fits(least - 1, step_tokens=2048, sequences=256), "else this shows nothing"
    values = values_of("ic-1b", 80, {})
    assert accepted(**values, **{"engine.gpuMemoryUtilization": least / 1000})
    assert not accepted(**values, **{"engine.gpuMemoryUtilization": (least - 1) / 1000})


def test_stages_of_a_pipeline_have_whole_layers():
    # 18 layers on 4 GPUs: one has 5 of them
    values = values_of("ic-1b", 4, {"engine.pipelineParallelSize": 4})
    with pytest.raises(HelmError) as refusal:
        render(set=values)
    (cache,) = re.findall(r"KV cache (\S+),", str(refusal.value))
    assert cache == f"{(1048576 + 64) * 5 * 320 * 2 / GIB:.2f}"


def test_float32_needs_more_than_half_precision():
    values = values_of("ic-1b", 8, {"engine.maxModelLen": 131072})
    assert accepted(**values)
    assert not accepted(**values, **{"engine.dtype": "float32"})


def test_no_remedy_is_promised_where_nothing_fits():
    with pytest.raises(HelmError, match="no context fits: use a larger GPU"):
        render(set={"model.preset": "ic-1b", "gpu.memoryGib": 2, "engine.maxModelLen": 1024})


@pytest.mark.parametrize("name", preset_names())
def test_more_than_the_model_can_is_refused(name):
    limit = preset(name).max_position_embeddings
    with pytest.raises(HelmError, match=f"engine.maxModelLen is {limit + 1}; accepted: up to {limit}"):
        render(set={"model.preset": name, "engine.maxModelLen": limit + 1, "gpu.memoryGib": 80})


def test_the_numbers_of_a_custom_model_count_like_a_presets():
    size = sizing.size(preset("ic-1b"), context_tokens=1048576)
    values = {
        "model.preset": "custom",
        "model.path": "/models/own",
        "model.size.weightBytes": size.weight_bytes,
        "model.size.kvBytesPerToken": size.kv_bytes_per_token,
        "model.size.maxContextTokens": size.max_context_tokens,
        "model.size.workspaceBytes": size.workspace_bytes,
        "gpu.memoryGib": 80,
    }
    args = one(render(set=values), "Deployment")["spec"]["template"]["spec"]["containers"][0]["args"]
    assert args[args.index("--max-model-len") + 1] == "1048576"
    assert not accepted(**(values | {"gpu.memoryGib": 8}))


def test_on_a_cpu_the_plugins_pages_are_counted():
    from ic_vllm_plugin import compat
    from ic_vllm_plugin.cpu_defaults import plan_cpu_memory

    per_token = sizing.size(preset("ic-nano"), context_tokens=1).kv_bytes_per_token
    plan = plan_cpu_memory(
        available_bytes=64 * GIB,
        weight_bytes=0,
        kv_bytes_per_token=per_token,
        context_tokens=1048576,
        page_tokens=compat.CPU_PAGE_TOKENS,
        kv_cache_bytes=GIB,
    )
    values = {"gpu.enabled": False, "cpu.kvCacheGib": 1}
    assert accepted(**values, **{"engine.maxModelLen": plan.context_tokens})
    assert not accepted(**values, **{"engine.maxModelLen": plan.context_tokens + 1})


def test_on_a_cpu_the_pods_limit_has_to_hold_cache_weights_and_processes():
    with pytest.raises(HelmError, match=r"serving.resources.limits.memory is 3Gi.*take 4\.02 GiB"):
        render(["cpu"], set={"serving.resources.limits.memory": "3Gi"})
