"""Checkpoint folders to DeepSeek-V3 and back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import YARN, random_ids, tiny_config, tiny_model
from transformers import AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM

from ic_model import ICForCausalLM
from ic_model.byte_tokenizer import build_byte_tokenizer
from ic_model.testing import assert_close
from ic_model.weights import (
    VLLM_MERGED,
    export_deepseek_v3,
    from_deepseek_config,
    import_deepseek_v3,
    main,
    tensor_shapes,
    to_deepseek_config,
)

NO_MSCALE_PAIR = {**YARN, "mscale": 0.5, "mscale_all_dim": 0.0}


def deepseek_folder(folder: Path, **fields: Any) -> Path:
    """A dense DeepSeek-V3 of transformers with random weights."""
    config = to_deepseek_config(tiny_config(q_lora_rank=12, rope_parameters=YARN))
    for name, value in fields.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("max_shard_size", ["50KB", "1GB"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fields", [{}, {"q_lora_rank": 12, "rope_parameters": YARN}])
def test_export_and_import_keep_the_logits(
    tmp_path: Path, fields: dict[str, Any], tied: bool, max_shard_size: str
) -> None:
    model = tiny_model(**fields, tie_word_embeddings=tied)
    model.generation_config.max_new_tokens = 5
    model.save_pretrained(tmp_path / "ours", max_shard_size=max_shard_size)
    build_byte_tokenizer().save_pretrained(tmp_path / "ours")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1 or max_shard_size == "1GB"

    exported = export_deepseek_v3(tmp_path / "ours", tmp_path / "deepseek")
    twin, report = DeepseekV3ForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert twin.config.eos_token_id == 1 and twin.config.bos_token_id is None
    assert twin.generation_config.max_new_tokens == 5
    assert AutoTokenizer.from_pretrained(exported)("é").input_ids == [0xC3, 0xA9]

    imported = import_deepseek_v3(exported, tmp_path / "again")
    again, report = ICForCausalLM.from_pretrained(imported, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = random_ids(2, 33)
    with torch.no_grad():
        logits = model(ids).logits
        assert_close(twin.eval()(ids).logits, logits, "fp32_peer", what="exported logits")
        assert_close(again.eval()(ids).logits, logits, "exact", what="logits after the round trip")
    assert again.config.rope_parameters == model.config.rope_parameters
    differing = {
        name
        for name, value in model.config.to_dict().items()
        if again.config.to_dict().get(name) != value and name != "_name_or_path"
    }
    # vLLM's DeepSeek-V3 knows no tied embeddings, so the export unties them
    assert differing == ({"tie_word_embeddings"} if tied else set())


def test_import_of_a_checkpoint_that_transformers_wrote(tmp_path: Path) -> None:
    folder = deepseek_folder(tmp_path / "deepseek")
    # DeepSeek's own releases use the older names of the RoPE fields
    raw = json.loads((folder / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": rope.pop("rope_type"), **rope}}
    (folder / "config.json").write_text(json.dumps(raw))
    twin = DeepseekV3ForCausalLM.from_pretrained(folder).eval()
    model = ICForCausalLM.from_pretrained(import_deepseek_v3(folder, tmp_path / "ours")).eval()
    assert model.config.rope_parameters["rope_type"] == "yarn"
    ids = random_ids(1, 300)
    with torch.no_grad():
        assert_close(model(ids).logits, twin(ids).logits, "fp32_peer", what="logits")


def test_bits_and_dtype_are_kept(tmp_path: Path) -> None:
    model = tiny_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "ours")
    export_deepseek_v3(tmp_path / "ours", tmp_path / "deepseek")
    assert DeepseekV3Config.from_pretrained(tmp_path / "deepseek").dtype == torch.bfloat16
    stored: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "deepseek").glob("*.safetensors"):
        stored |= load_file(path)
    for name, tensor in load_file(tmp_path / "ours" / "model.safetensors").items():
        assert stored[name].dtype == torch.bfloat16 and torch.equal(stored[name], tensor), name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_latent_norm": False}, r"kv_latent_norm is False.*accepted: True"),
        ({"q_lora_rank": 12, "q_latent_norm": False}, r"q_latent_norm is False.*accepted: True"),
        ({"rms_norm_eps": 1e-5}, r"rms_norm_eps is 1e-05; accepted: 1e-06"),
        ({"rope_parameters": NO_MSCALE_PAIR}, r"mscale 0\.5 and mscale_all_dim 0\.0"),
    ],
)
def test_export_refuses_what_deepseek_cannot_express(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    tiny_model(**fields).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        export_deepseek_v3(tmp_path / "ours", tmp_path / "deepseek")
    assert not (tmp_path / "deepseek").exists()


def test_a_query_norm_that_does_not_exist_is_no_obstacle() -> None:
    assert to_deepseek_config(tiny_config(q_lora_rank=None, q_latent_norm=False)).q_lora_rank is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"first_k_dense_replace": 1},
            r"first_k_dense_replace is 1 with num_hidden_layers 3.*mixture-of-experts",
        ),
        ({"attention_bias": True}, r"attention_bias is True; accepted: False"),
        ({"rope_interleave": False}, r"rope_interleave is False; accepted: True"),
        ({"attention_dropout": 0.1}, r"attention_dropout is 0\.1; accepted: 0"),
        ({"rms_norm_eps": 1e-5}, r"rms_norm_eps is 1e-05; accepted: 1e-06"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'; only 'silu'"),
        ({"num_key_value_heads": 1}, r"num_key_value_heads is 1"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config is set"),
        ({"rope_parameters": {**YARN, "attention_factor": 1.5}}, r"unknown keys \['attention_factor'\]"),
        ({"rope_parameters": {**YARN, "rope_type": "linear"}}, r"'linear'; accepted: default, yarn"),
        ({"rope_parameters": NO_MSCALE_PAIR}, r"mscale 0\.5 and mscale_all_dim 0\.0"),
    ],
)
def test_import_refuses_what_we_cannot_express(fields: dict[str, Any], message: str) -> None:
    config = to_deepseek_config(tiny_config(q_lora_rank=12))
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        from_deepseek_config(config)


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, r"missing tensors: model\.norm\.weight"),
        ({"model.layers.3.eh_proj.weight": torch.ones(2)}, r"unexpected tensors: model\.layers\.3\.eh_proj"),
        ({"model.norm.weight": torch.ones(7)}, r"model\.norm\.weight is \[7\] and should be \[48\]"),
        (
            {"model.norm.weight": torch.ones(48).to(torch.float8_e4m3fn)},
            r"model\.norm\.weight has dtype F8_E4M3; accepted: BF16",
        ),
    ],
)
@pytest.mark.parametrize("direction", ["export", "import"])
def test_wrong_tensors_are_named(
    tmp_path: Path, direction: str, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    source = tmp_path / "source"
    if direction == "export":
        tiny_model().save_pretrained(source)
    else:
        deepseek_folder(source)
    rewrite(source, **changes)
    convert = export_deepseek_v3 if direction == "export" else import_deepseek_v3
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_tied_output_stored_twice(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "ours")
    rewrite(tmp_path / "ours", **{"lm_head.weight": model.lm_head.weight.detach().clone()})
    twin = DeepseekV3ForCausalLM.from_pretrained(export_deepseek_v3(tmp_path / "ours", tmp_path / "a")).eval()
    ids = random_ids(1, 9)
    with torch.no_grad():
        assert_close(twin(ids).logits, model(ids).logits, "fp32_peer", what="logits")
    rewrite(tmp_path / "ours", **{"lm_head.weight": torch.zeros_like(model.lm_head.weight)})
    with pytest.raises(ValueError, match=r"tie_word_embeddings is True, but lm_head\.weight .* differs"):
        export_deepseek_v3(tmp_path / "ours", tmp_path / "b")


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    ours, deepseek, empty = tmp_path / "ours", tmp_path / "deepseek", tmp_path / "empty"
    empty.mkdir()
    tiny_model().save_pretrained(ours)
    deepseek_folder(deepseek)
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        export_deepseek_v3(empty, tmp_path / "target")
    with pytest.raises(ValueError, match="is 'deepseek_v3'; accepted: 'infinite_context'"):
        export_deepseek_v3(deepseek, tmp_path / "target")
    with pytest.raises(ValueError, match="is 'infinite_context'; accepted: 'deepseek_v3'"):
        import_deepseek_v3(ours, tmp_path / "target")
    with pytest.raises(ValueError, match="is not an empty folder"):
        export_deepseek_v3(ours, deepseek)
    (ours / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        export_deepseek_v3(ours, tmp_path / "target")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (ours / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names files that are not there: model-00001-of-00002"):
        export_deepseek_v3(ours, tmp_path / "target")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model().save_pretrained(tmp_path / "ours")
    main(["export", str(tmp_path / "ours"), str(tmp_path / "deepseek")])
    main(["import", str(tmp_path / "deepseek"), str(tmp_path / "again")])
    assert ICForCausalLM.from_pretrained(tmp_path / "again").config.num_hidden_layers == 3
    with pytest.raises(SystemExit) as stopped:
        main(["import", str(tmp_path / "ours"), str(tmp_path / "x")])
    assert stopped.value.code == 2
    assert "model_type" in capsys.readouterr().err


def test_vllms_merged_names_cover_stored_tensors() -> None:
    names = tensor_shapes(tiny_config())
    for stored, (merged, part) in VLLM_MERGED.items():
        assert any(stored in name for name in names)
        assert not any(merged in name for name in names)
        assert part in (0, 1)
