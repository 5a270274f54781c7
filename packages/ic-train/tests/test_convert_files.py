"""What a conversion writes is what it measured; interrupted, refused and failing ones leave nothing half-done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from converted_models import SIZES, converted, qwen3_folder, source_folder, text_file, token_ids
from ic_model import ICConfig, ICForCausalLM
from ic_model.testing import compare
from ic_model.weights import export_deepseek_v3, tensor_shapes
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM

from ic_train import cli
from ic_train.convert import checkpoint
from ic_train.convert.calibration import WindowSizes, choose_windows
from ic_train.convert.forward import Block
from ic_train.convert.memory import conversion_needs
from ic_train.convert.source import open_source
from ic_train.convert.table import measured_perplexity


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything but the record, which has times in it, and its plot."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.stem != "conversion"}


def evaluation_windows(source: Path) -> torch.Tensor:
    return choose_windows(open_source(source).tokenizer, [text_file()], [], SIZES).evaluation


@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [
        ("llama, grouped", {"rank": 24, "rope": 12}, ["source", "partial_rope", "low_rank"]),
        ("qwen2", {"rank": 24, "rope": 8}, ["source", "partial_rope", "low_rank"]),
        (
            "llama, grouped",
            {"rank": 56, "rope": 8, "q_lora_rank": 20},
            ["source", "partial_rope", "query_rank"],
        ),
        (
            "llama, multi-head, tied",
            {"rank": 40, "rope": 8, "q_lora_rank": 30, "latent_norm": True, "frequencies": "standard"},
            ["source", "partial_rope", "low_rank", "query_rank", "latent_norm"],
        ),
    ],
)
def test_the_checkpoint_has_the_perplexity_that_the_record_says(
    name: str, options: dict[str, Any], steps: list[str], tmp_path: Path
) -> None:
    source = source_folder(tmp_path / "source", name)
    record = converted(source, tmp_path / "out", **options)
    assert list(record["perplexity"]) == steps
    assert record == json.loads((tmp_path / "out" / "conversion.json").read_text())
    measured = measured_perplexity(tmp_path / "out", evaluation_windows(source), "cpu")
    assert measured == pytest.approx(record["perplexity"][steps[-1]], rel=1e-4)
    # each lossy step changed something
    values = list(record["perplexity"].values())
    assert all(abs(after / before - 1) > 1e-4 for before, after in zip(values, values[1:], strict=False))
    assert len(record["energy_kept_per_layer"]) == 3
    assert (tmp_path / "out" / "conversion.png").stat().st_size > 10_000
    numbers = record["kv_numbers_per_token"]
    assert numbers["after"] == 3 * (options["rank"] + options["rope"])
    assert not (tmp_path / "out.partial").exists()


def test_a_higher_rank_loses_less(tmp_path: Path) -> None:
    source = source_folder(tmp_path / "source")
    energies = []
    for rank in (8, 24, 40):
        record = converted(source, tmp_path / str(rank), rank=rank, rope=16)
        energies.append(record["energy_kept_per_layer"])
    assert all(a < b < c for a, b, c in zip(*energies, strict=True))


def test_export_to_deepseek_v3_keeps_the_logits_with_norms_and_standard_angles(tmp_path: Path) -> None:
    source = source_folder(tmp_path / "source", "llama, multi-head, tied")
    converted(source, tmp_path / "out", rank=40, rope=16, latent_norm=True, frequencies="standard")
    exported = export_deepseek_v3(tmp_path / "out", tmp_path / "deepseek")
    ids = token_ids(2, 60)
    with torch.no_grad():
        own = ICForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()(ids).logits
        other = DeepseekV3ForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()(ids).logits
    assert compare(other, own).relative_norm < 1e-5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama, grouped", {}, "kv_latent_norm is False"),
        ("llama, grouped", {"latent_norm": True}, "rope_parameters.*'explicit'.*--frequencies standard"),
        ("qwen2", {"latent_norm": True, "frequencies": "standard"}, "attention_bias is True"),
    ],
)
def test_export_to_deepseek_v3_is_refused_where_it_would_compute_something_else(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    converted(source_folder(tmp_path / "source", name), tmp_path / "out", rank=40, rope=8, **options)
    with pytest.raises(ValueError, match=message):
        export_deepseek_v3(tmp_path / "out", tmp_path / "deepseek")


@pytest.mark.parametrize("blocks", [2, 11, 20])
def test_an_interrupted_conversion_continues_to_the_same_bits(
    blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_folder(tmp_path / "source")
    converted(source, tmp_path / "whole", rank=20, rope=16)
    left, run = blocks, Block.__call__

    def interrupted(self: Block, *arguments: Any) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return run(self, *arguments)

    monkeypatch.setattr(Block, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        converted(source, tmp_path / "out", rank=20, rope=16)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
    ran = blocks
    left = 10_000
    converted(source, tmp_path / "out", rank=20, rope=16)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    # it did continue: of 3 layers, whatever was on disk was not computed again
    again, left = 10_000 - left, 10_000
    converted(source, tmp_path / "third", rank=20, rope=16)
    whole = 10_000 - left
    assert again < whole and again + ran <= whole + 8


def test_what_is_left_of_other_options_is_not_continued(tmp_path: Path) -> None:
    source = source_folder(tmp_path / "source")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "settings.json").write_text("{}")
    (tmp_path / "out.partial" / "measured.json").write_text('{"loss": 0.0}')
    assert converted(source, tmp_path / "out", rank=20, rope=16)["perplexity"]["source"] > 1.5


def test_shards_hold_every_tensor_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_folder(tmp_path / "source")
    converted(source, tmp_path / "whole", rank=20, rope=16)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 60_000)
    converted(source, tmp_path / "out", rank=20, rope=16)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    names = [name for shard in shards for name in load_file(shard)]
    assert sorted(names) == sorted(tensor_shapes(ICConfig.from_pretrained(tmp_path / "out")))
    ids = token_ids(1, 30)
    models = [ICForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("out", "whole")]
    with torch.no_grad():
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from ic_train import cli
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("limit", [20_000, 150_000])
def test_a_disk_that_takes_no_more_leaves_no_half_checkpoint(limit: int, tmp_path: Path) -> None:
    """A limit on file sizes fails writes in the middle, as a full disk does: before and after the first layers."""
    source = source_folder(tmp_path / "source")
    command = [
        *("convert", str(source), str(tmp_path / "out"), "--kv-lora-rank", "20", "--qk-rope-head-dim", "16")
    ]
    command += ["--calibration", text_file(), "--calibration-samples", "24", "--calibration-tokens", "64"]
    command += ["--evaluation-samples", "4", "--evaluation-tokens", "96", "--seed", "3", "--device", "cpu"]
    failed = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *command],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert failed.returncode == 2, failed.stderr[-2000:]
    assert "out.partial cannot be written" in failed.stderr and "it continues" in failed.stderr
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").rglob("*.tmp"))
    assert cli.main(command) == 0
    converted(source, tmp_path / "whole", rank=20, rope=16)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def damaged(source: Path, damage: str) -> Path:
    weights = source / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "no tokenizer":
        for path in source.glob("tokenizer*"):
            path.unlink()
    elif damage == "missing tensor":
        tensors = load_file(weights)
        del tensors["model.layers.1.self_attn.k_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif damage == "unknown tensor":
        tensors = load_file(weights) | {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}
        save_file(tensors, weights, metadata={"format": "pt"})
    elif damage == "no weights":
        weights.unlink()
    else:
        config = json.loads((source / "config.json").read_text())
        config |= json.loads(damage)
        (source / "config.json").write_text(json.dumps(config))
    return source


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "model.safetensors is truncated or damaged"),
        ("no tokenizer", "has no tokenizer; it needs one of tokenizer.json"),
        ("missing tensor", "it lacks model.layers.1.self_attn.k_proj.weight"),
        ("unknown tensor", "it has the unknown model.layers.0.self_attn.q_norm.weight"),
        ("no weights", "has no weights; accepted: safetensors"),
        ('{"model_type": "gpt2"}', "model_type of .* is 'gpt2'; accepted: llama, mistral, qwen2"),
        ('{"model_type": "nobodys"}', "has no configuration that transformers reads"),
        ('{"hidden_act": "gelu"}', "hidden_act of .* is 'gelu'; accepted: 'silu'"),
        ('{"mlp_bias": true}', "mlp_bias of .* is True"),
        ('{"hidden_size": 64}', r"is \(264, 48\); its configuration says \(264, 64\)"),
        ('{"num_hidden_layers": 4}', "it lacks model.layers.3."),
    ],
)
def test_bad_sources_are_refused(damage: str, message: str, tmp_path: Path) -> None:
    source = damaged(source_folder(tmp_path / "source"), damage)
    with pytest.raises(ValueError, match=message):
        converted(source, tmp_path / "out", rank=20, rope=16)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_qwen3_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="is 'qwen3', which cannot be converted: it norms queries and keys per head"
    ):
        converted(qwen3_folder(tmp_path / "source"), tmp_path / "out", rank=20, rope=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 20, "rope": 15}, "qk_rope_head_dim is 15; it must be even and from 2 to 32"),
        ({"rank": 20, "rope": 34}, "qk_rope_head_dim is 34; it must be even and from 2 to 32"),
        ({"rank": 49, "rope": 16}, "kv_lora_rank is 49; with qk_rope_head_dim 16 it must be from 1 to 48"),
        ({"rank": 0, "rope": 16}, "kv_lora_rank is 0"),
        ({"rank": 8, "rope": 16, "q_lora_rank": 49}, "q_lora_rank is 49; it must be from 1 to 48"),
        (
            {"rank": 8, "rope": 12, "frequencies": "standard"},
            r"frequencies is 'standard' with .* 12; .* \(16\)",
        ),
        ({"rank": 8, "rope": 16, "frequencies": "any"}, "frequencies is 'any'; accepted: explicit, standard"),
    ],
)
def test_sizes_that_the_source_does_not_have_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        converted(source_folder(tmp_path / "source"), tmp_path / "out", **options)


def test_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    source = open_source(source_folder(tmp_path / "source"))
    (tmp_path / "short.txt").write_text("short " * 100)
    with pytest.raises(
        ValueError, match=r"the calibration text is too short: it has 540 tokens .* need 32768"
    ):
        choose_windows(source.tokenizer, [str(tmp_path / "short.txt")], [], WindowSizes())
    with pytest.raises(ValueError, match="evaluation_tokens is 1; it must be at least 2"):
        WindowSizes(evaluation_tokens=1)


def test_a_target_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ValueError, match="out exists and is not an empty folder"):
        converted(source_folder(tmp_path / "source"), tmp_path / "out", rank=20, rope=16)
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "mine").touch()
    with pytest.raises(ValueError, match=r"new\.partial is in the way"):
        converted(tmp_path / "source", tmp_path / "new", rank=20, rope=16)
    assert (tmp_path / "new.partial" / "mine").exists()


def test_a_dry_run_says_what_it_takes_and_writes_nothing(tmp_path: Path, capsys, caplog) -> None:
    source = source_folder(tmp_path / "source", "mistral", sliding_window=128)
    command = [
        "convert",
        str(source),
        str(tmp_path / "out"),
        "--kv-lora-rank",
        "48",
        "--qk-rope-head-dim",
        "16",
    ]
    assert cli.main([*command, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "192 numbers before, 192 after: 0.0% less than the source, 50.0% less" in printed
    assert "memory" in printed and "disk, result" in printed
    assert "the source caches 64 per token and layer: nothing is saved" in caplog.text
    assert "a window of 128 tokens" in caplog.text
    assert not list(tmp_path.glob("out*"))
    assert cli.main([*command[:4], "49", *command[5:], "--dry-run"]) == 2
    assert "error: kv_lora_rank is 49" in capsys.readouterr().err


def test_memory_for_a_source_of_eight_billion_is_far_below_its_weights() -> None:
    # the shape of Llama 3.1 8B at C 512, R 64
    config = ICConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        q_lora_rank=None, kv_lora_rank=512, qk_rope_head_dim=64, tie_word_embeddings=False, kv_latent_norm=False,
    )  # fmt: skip
    needs = conversion_needs(config, kv_heads=8, sizes=WindowSizes(), dtype_bytes=2)
    assert needs.checkpoint_bytes > 15e9
    assert needs.memory_bytes < 0.8 * needs.checkpoint_bytes
