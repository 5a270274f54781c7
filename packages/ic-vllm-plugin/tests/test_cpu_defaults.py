"""Memory of a machine without a GPU is divided so that a server starts and nothing is hidden."""

import pytest

from ic_vllm_plugin.cpu_backend import absorbed_query_limit
from ic_vllm_plugin.cpu_defaults import GIB, plan_cpu_memory, weight_bits

NANO = {"weight_bytes": 10_000_000, "kv_bytes_per_token": 2560, "page_tokens": 128}


def test_a_million_tokens_fit_into_eight_gib():
    plan = plan_cpu_memory(available_bytes=7 * GIB, context_tokens=1_048_576, **NANO)
    assert plan.context_tokens == 1_048_576
    assert plan.kv_cache_bytes < 3 * GIB


def test_a_context_that_does_not_fit_is_capped_to_what_does():
    plan = plan_cpu_memory(available_bytes=4 * GIB, context_tokens=1_048_576, **NANO)
    assert 200_000 < plan.context_tokens < 1_048_576
    assert (plan.context_tokens + 128) * 2560 <= plan.kv_cache_bytes < GIB


def test_the_users_cache_size_is_kept():
    plan = plan_cpu_memory(available_bytes=64 * GIB, context_tokens=1_048_576, kv_cache_bytes=GIB, **NANO)
    assert plan.kv_cache_bytes == GIB
    assert plan.context_tokens < GIB // 2560


def test_too_little_memory_is_said_with_what_to_change():
    with pytest.raises(ValueError, match=r"2\.0 GiB free.*--kv-cache-memory-bytes and --max-model-len"):
        plan_cpu_memory(available_bytes=2 * GIB, context_tokens=1_048_576, **NANO)


@pytest.mark.parametrize(
    ("dims", "limit"), [((256, 64, 128, 128), 256), ((512, 64, 128, 128), 170), ((64, 64, 64, 64), 2**31 - 1)]
)
def test_short_queries_run_absorbed_where_that_is_less_work(dims, limit):
    assert absorbed_query_limit(*dims) == limit


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ({}, set()),
        ({"quant_method": "fp8"}, set()),
        ({"quant_method": "gptq", "bits": 4}, {4}),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"weights": {"num_bits": 4}}, "b": {"weights": None}},
            },
            {4},
        ),
    ],
)
def test_the_bits_of_weights_are_read_from_each_method_that_writes_them(quantization, bits):
    assert weight_bits(quantization) == bits
