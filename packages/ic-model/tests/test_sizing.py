"""Sizing against the real model and against the numbers of the design."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import random_ids, tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from ic_model import ICForCausalLM
from ic_model.presets import preset, preset_names
from ic_model.sizing import CARDS, GIB, Card, fit, linear_flop_per_token, parameter_count, size
from ic_model.sizing_cli import main


@pytest.mark.parametrize("name", preset_names())
def test_parameter_count_is_the_models(name: str) -> None:
    with torch.device("meta"):
        model = ICForCausalLM(preset(name))
    row = size(preset(name), context_tokens=1)
    assert row.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert row.embedding_parameters == model.model.embed_tokens.weight.numel()


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count_without_ties(tied: bool) -> None:
    config = tiny_config(q_lora_rank=12, tie_word_embeddings=tied)
    assert parameter_count(config) == sum(
        parameter.numel() for parameter in ICForCausalLM(config).parameters()
    )


def test_numbers_of_the_design() -> None:
    row = size(preset("ic-1b"), context_tokens=1_048_576)
    assert row.kv_bytes_per_token == 11_520
    assert row.kv_bytes == 11.25 * GIB
    assert round(row.weight_bytes / GIB, 1) == 1.9
    assert round(100 * row.kv_saved_vs_mha, 1) == 96.1
    nano = size(preset("ic-nano"), context_tokens=1_048_576)
    assert nano.kv_bytes_per_token == 2_560
    assert 100 * nano.kv_saved_vs_mha == 68.75


@pytest.mark.parametrize(("kv_dtype", "expected"), [("bf16", 168), ("fp16", 168), ("fp32", 336), ("fp8", 84)])
def test_kv_bytes_are_the_caches(kv_dtype: str, expected: int) -> None:
    row = size(tiny_config(), context_tokens=10, kv_dtype=kv_dtype)
    assert row.kv_bytes_per_token == expected and row.kv_bytes == 10 * expected
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}.get(kv_dtype)
    if dtype is not None:
        model = tiny_model().to(dtype)
        with torch.no_grad():
            assert model(random_ids(1, 10)).past_key_values.cached_bytes == row.kv_bytes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("q_lora_rank", [None, 12])
def test_flop_are_those_of_the_real_operations(q_lora_rank: int | None, tied: bool) -> None:
    """Counted by PyTorch. Prefill through eager attention, which computes the masked half as well."""
    model = tiny_model(q_lora_rank=q_lora_rank, tie_word_embeddings=tied, attn_implementation="eager")
    tokens = 50
    row = size(model.config, context_tokens=tokens)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(random_ids(1, tokens), use_cache=False)
    attention = counter.get_total_flops() - tokens * linear_flop_per_token(model.config)
    assert attention * (tokens + 1) // (2 * tokens) == tokens * row.prefill_attention_flop_per_token
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        cache = model(random_ids(1, tokens - 1)).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(random_ids(1, 1), past_key_values=cache)
    assert counter.get_total_flops() == row.linear_flop_per_token + row.decode_attention_flop_per_token


def test_fit() -> None:
    row = size(tiny_config(), context_tokens=1000, kv_dtype="fp32", workspace_gib=1.0)
    exact = Card(
        name="exact", memory_gib=1 + (row.weight_bytes + row.kv_bytes) / GIB, bandwidth_gb_per_s=100.0
    )
    found = fit(row, exact)
    assert found.fits and found.longest_context_tokens == found.cache_tokens == 1000
    assert found.min_decode_ms_per_token == pytest.approx(1e3 * row.decode_read_bytes / 100e9)
    smaller = fit(row, Card(name="smaller", memory_gib=exact.memory_gib - 1 / GIB, bandwidth_gb_per_s=None))
    assert not smaller.fits and smaller.longest_context_tokens == 999
    assert smaller.min_decode_ms_per_token is None
    assert fit(row, Card(name="tiny", memory_gib=0.5, bandwidth_gb_per_s=1.0)).cache_tokens == 0
    large = fit(row, Card(name="large", memory_gib=80.0, bandwidth_gb_per_s=1.0))
    assert large.longest_context_tokens == 4096 < large.cache_tokens, "not beyond the model's own limit"


def test_decoding_does_not_read_an_untied_embedding() -> None:
    tied, untied = (size(tiny_config(tie_word_embeddings=tied), context_tokens=1) for tied in (True, False))
    assert untied.weight_bytes > tied.weight_bytes
    assert untied.decode_read_bytes == tied.decode_read_bytes


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["ic-1b", "--context", "1048576", "--kv-dtype", "bf16"])
    text = capsys.readouterr().out
    for expected in ("1,037,398,016", "11,520 B", "11.25 GiB", "1.93 GiB", "saved 96.1%"):
        assert expected in text
    for card in CARDS:
        assert card.name in text
    main(["ic-nano", "--memory-gib", "12"])
    assert "?" in capsys.readouterr().out, "no time without a bandwidth"


def test_json_of_a_checkpoint_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model().save_pretrained(tmp_path)
    main([str(tmp_path), "--context", "100", "--json", "--card", "H100", "--card", "h200"])
    report = json.loads(capsys.readouterr().out)
    assert report["size"]["weight_dtype"] == "fp32", "as config.json says"
    assert report["size"]["context_tokens"] == 100
    assert [row["card"] for row in report["cards"]] == ["H100 80GB", "H200 141GB"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ic-2b"], "model is 'ic-2b'; accepted: a preset (ic-135m, ic-1b, ic-nano) or a folder"),
        (["ic-nano", "--context", "0"], "context is 0; accepted: 1 to 1048576 tokens"),
        (["ic-nano", "--context", "1048577"], "context is 1048577; accepted: 1 to 1048576 tokens"),
        (["ic-nano", "--context", "many"], "invalid int value: 'many'"),
        (["ic-nano", "--kv-dtype", "int4"], "invalid choice: 'int4'"),
        (["ic-nano", "--card", "V100"], "card is 'V100'; accepted: part of one of RTX 2070 Super"),
        (["ic-nano", "--card", "H100", "--memory-gib", "8"], "--card and --memory-gib exclude each other"),
        (["ic-nano", "--memory-gib", "-1"], "memory_gib is -1.0; accepted: a number above 0"),
        (["ic-nano", "--memory-gib", "nan"], "memory_gib is nan; accepted: a number above 0"),
        (["ic-nano", "--memory-gib", "8", "--bandwidth-gb-per-s", "0"], "bandwidth_gb_per_s is 0.0"),
        (["ic-nano", "--bandwidth-gb-per-s", "100"], "needs --memory-gib"),
        (["ic-nano", "--workspace-gib", "-1"], "workspace_gib is -1.0; accepted"),
    ],
)
def test_bad_arguments_exit_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_bad_folders_exit_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, message in (
        ("{", "is not JSON"),
        ("[]", "model_type"),
        ('{"model_type": "llama"}', "model_type"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(SystemExit) as stopped:
            main([str(tmp_path)])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_module_runs_as_a_command() -> None:
    command = [sys.executable, "-m", "ic_model.sizing", "ic-2b"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr and "model is 'ic-2b'" in finished.stderr
