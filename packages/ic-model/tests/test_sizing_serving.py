"""Memory of a server: the formulas on numbers that can be checked by hand."""

from __future__ import annotations

import pytest

from ic_model.presets import preset
from ic_model.sizing import GIB
from ic_model.sizing_serving import (
    MIB,
    AttentionShape,
    attention_shape,
    longest_context,
    prefill_budget_bytes,
    prefill_peak_bytes,
    prefill_workspace_tokens,
    server_memory,
    stock_workspace_bytes,
)

SHAPE = AttentionShape(heads=32, kv_lora_rank=256, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)


@pytest.mark.parametrize(
    ("memory_gib", "budget_mib"), [(7.2, 230.4), (1, 64), (24, 768), (72, 2048), (140, 2048)]
)
def test_the_workspace_is_a_share_of_the_card_within_bounds(memory_gib: float, budget_mib: float) -> None:
    assert prefill_budget_bytes(memory_gib * GIB) == int(budget_mib * MIB)


def test_rows_of_the_workspace_fit_the_budget() -> None:
    # 320 numbers in two and in four bytes, 32 * (128 + 128 + 128 + 64) numbers of two bytes, eight bytes of place
    per_token = 320 * 6 + 32 * 448 * 2 + 8
    for budget in (64 * MIB, 115 * MIB, GIB):
        rows = prefill_workspace_tokens(SHAPE, budget)
        assert rows * per_token <= budget < 2 * rows * per_token
    assert prefill_workspace_tokens(SHAPE, 1) == 256, "below that launches cost more than they do"


def test_peak_of_prefill_is_the_larger_of_new_tokens_and_context() -> None:
    output = 8192 * 32 * 128
    new = 8192 * 32 * 448 * 2 + 2 * 2 * output + 4 * 8192 * 32
    assert prefill_peak_bytes(SHAPE, step_tokens=8192, workspace_tokens=256) == new
    many = prefill_peak_bytes(SHAPE, step_tokens=8192, workspace_tokens=32768)
    assert many == 32768 * (320 * 6 + 32 * 448 * 2 + 8) + output * 8 + 24 * 8192 * 32


def test_what_vllms_own_attention_takes() -> None:
    found = stock_workspace_bytes(SHAPE, context_tokens=131072, sequences=256, multiprocessors=40)
    assert found == {
        "latent rows": 65536 * 320 * 2,
        "expanded rows": 65536 * 32 * 256 * 2,
        "decode splits": 4 * 256 * 32 * 80 * 257,
    }
    short = stock_workspace_bytes(SHAPE, context_tokens=1024, sequences=4, multiprocessors=40)
    assert short["latent rows"] == 8 * 1024 * 320 * 2
    assert short["decode splits"] == 4 * 4 * 32 * 2 * 257


def test_a_server_of_the_large_preset() -> None:
    config = preset("ic-1b")
    memory = server_memory(
        config, usable_bytes=72 * GIB, context_tokens=1_048_576, step_tokens=8192, sequences=256
    )
    assert memory.kv_cache == (1_048_576 + 64) * 11_520
    assert memory.absorbed == 18 * 32 * 256 * 256 * 2
    assert memory.total < 18 * GIB
    eager = server_memory(
        config, usable_bytes=72 * GIB, context_tokens=1_048_576, step_tokens=8192, sequences=256, graphs=False
    )
    assert memory.total - eager.total == memory.graphs > 0


def test_the_longest_context_is_the_last_that_fits() -> None:
    server = {"step_tokens": 512, "sequences": 4}
    longest = longest_context(preset("ic-1b"), usable_bytes=4 * GIB, kv_dtype="bf16", **server)
    for tokens, fits in ((longest, True), (longest + 64, False)):
        memory = server_memory(preset("ic-1b"), usable_bytes=4 * GIB, context_tokens=tokens, **server)
        assert (memory.total <= 4 * GIB) == fits
    assert longest_context(preset("ic-1b"), usable_bytes=GIB, kv_dtype="bf16", **server) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_tokens": 0}, "max_model_len is 0; accepted"),
        ({"context_tokens": 2_000_000}, "max_model_len is 2000000; accepted: up to"),
        ({"step_tokens": 0}, "max_num_batched_tokens is 0"),
        ({"sequences": -1}, "max_num_seqs is -1"),
        ({"kv_dtype": "int4"}, "kv_dtype is 'int4'"),
        ({"gpus": 3}, "tensor_parallel_size is 3; it must divide num_attention_heads"),
    ],
)
def test_bad_numbers_are_refused(changes: dict, message: str) -> None:
    arguments = {"usable_bytes": GIB, "context_tokens": 1024, "step_tokens": 512, "sequences": 4}
    with pytest.raises(ValueError, match=message):
        server_memory(preset("ic-1b"), **{**arguments, **changes})


def test_heads_are_shared_among_gpus() -> None:
    assert attention_shape(preset("ic-1b"), 4).heads == 8
