"""The chart's memory check is ic_model.sizing's arithmetic, to the token."""

import re

import pytest
from chart_tools import HelmError, one, render
from ic_model import sizing
from ic_model.presets import preset, preset_names

GIB = sizing.GIB


def fits(name, tokens, *, memory_gib, utilization=0.9, kv_dtype="bf16"):
    size = sizing.size(preset(name), context_tokens=tokens, kv_dtype=kv_dtype)
    return size.weight_bytes + size.kv_bytes + size.workspace_bytes <= int(memory_gib * utilization * GIB)


def accepted(**values):
    try:
        render(set=values)
    except HelmError as error:
        assert "engine.maxModelLen is" in str(error), error
        return False
    return True


def longest(name, **card):
    """Longest context that `sizing` finds to fit, by bisection."""
    low, high = 0, preset(name).max_position_embeddings
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(name, middle, **card) else (low, middle - 1)
    return low


@pytest.mark.parametrize(
    ("name", "memory_gib", "kv_dtype"),
    [
        ("ic-nano", 3, "bf16"),
        ("ic-1b", 8, "bf16"),
        ("ic-1b", 8, "fp8"),
        ("ic-1b", 4, "bf16"),
        ("ic-135m", 1.5, "bf16"),
    ],
)
def test_the_chart_accepts_what_fits_and_refuses_one_token_more(name, memory_gib, kv_dtype):
    tokens = longest(name, memory_gib=memory_gib, kv_dtype=kv_dtype)
    assert 0 < tokens < preset(name).max_position_embeddings, "the case should lie inside the range"
    values = {"model.preset": name, "gpu.memoryGib": memory_gib, "gpu.enabled": True}
    values["engine.kvCacheDtype"] = "fp8" if kv_dtype == "fp8" else "auto"
    assert accepted(**values, **{"engine.maxModelLen": tokens})
    assert not accepted(**values, **{"engine.maxModelLen": tokens + 1})


def test_the_remedy_in_the_message_is_the_longest_that_fits():
    with pytest.raises(HelmError) as refusal:
        render(set={"model.preset": "ic-1b", "gpu.memoryGib": 8})
    message = str(refusal.value)
    assert "engine.maxModelLen is 0, the model's own 1048576 tokens," in message
    (tokens,) = re.findall(r"set engine.maxModelLen to at most (\d+)", message)
    assert int(tokens) == longest("ic-1b", memory_gib=8)


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
