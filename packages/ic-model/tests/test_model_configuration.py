"""ICConfig's validation and the presets."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import YARN, tiny_config

from ic_model import ICConfig
from ic_model.presets import preset, preset_names


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 0}, r"hidden_size is 0; it must be an integer of at least 1"),
        ({"vocab_size": -3}, r"vocab_size is -3; it must be"),
        ({"kv_lora_rank": "many"}, r"kv_lora_rank is 'many'; it must be"),
        ({"num_hidden_layers": True}, r"num_hidden_layers is True; it must be"),
        ({"v_head_dim": 2.5}, r"v_head_dim is 2\.5; it must be"),
        ({"q_lora_rank": 0}, r"q_lora_rank is 0; .* or None"),
        ({"q_lora_rank": 1.5}, r"q_lora_rank is 1\.5; .* or None"),
        ({"qk_rope_head_dim": 7}, r"qk_rope_head_dim is 7; it must be even"),
        ({"num_key_value_heads": 1}, r"num_key_value_heads is 1; .* num_attention_heads \(3\)"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'; only 'silu'"),
        ({"rms_norm_eps": 0.0}, r"rms_norm_eps is 0\.0; it must be a number above 0"),
        ({"rms_norm_eps": "small"}, r"rms_norm_eps is 'small'; it must be a number above 0"),
        ({"pad_token_id": 97}, r"pad_token_id is 97; .* vocab_size - 1 \(96\)"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
            r"'linear'; accepted: default, yarn",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
            r"\['rope_theta'\] is 0; .* above 0",
        ),
        ({"rope_parameters": {"rope_type": "default"}}, r"\['rope_theta'\] is None; .* above 0"),
        ({"rope_parameters": {"rope_theta": "big"}}, r"\['rope_theta'\] is 'big'; .* above 0"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, r"\['rope_theta'\] is nan; .* above 0"),
        ({"rope_parameters": {"rope_theta": 1e4, "factor": 8.0}}, r"unknown keys \['factor'\]; .* 'default'"),
        ({"rope_parameters": {**YARN, "factor": 0.5}}, r"\['factor'\] is 0\.5; .* at least 1"),
        ({"rope_parameters": {**YARN, "factor": None}}, r"\['factor'\] is None; .* at least 1"),
        (
            {"rope_parameters": {**YARN, "original_max_position_embeddings": None}},
            r"\['original_max_position_embeddings'\] is None",
        ),
        ({"rope_parameters": {**YARN, "mscale": "x"}}, r"\['mscale'\] is 'x'"),
        (
            {"rope_parameters": {**YARN, "attention_factor": 2.0}},
            r"unknown keys \['attention_factor'\]; accepted",
        ),
        # the names that older releases of transformers used are checked, too
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e4}, r"'linear'; accepted"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1e4}, r"original_max_position_emb"),
    ],
)
def test_bad_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def test_older_names_of_rope_fields() -> None:
    new = tiny_config(rope_parameters=YARN)
    scaling = {name: value for name, value in YARN.items() if name not in ("rope_type", "rope_theta")}
    old = tiny_config(rope_scaling={"type": "yarn", **scaling}, rope_theta=YARN["rope_theta"])
    assert old.rope_parameters == new.rope_parameters
    assert tiny_config(rope_theta=500.0).rope_parameters == {"rope_type": "default", "rope_theta": 500.0}


def test_the_callers_dictionary_is_left_alone() -> None:
    rope = {"rope_theta": 1e4}
    assert tiny_config(rope_parameters=rope).rope_parameters == {"rope_type": "default", "rope_theta": 1e4}
    assert rope == {"rope_theta": 1e4}


def test_derived_fields() -> None:
    config = tiny_config()
    assert config.qk_head_dim == 22 and config.latent_dim == 28
    assert config.num_key_value_heads == config.num_attention_heads == 3
    assert ICConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_presets() -> None:
    assert preset_names() == ["ic-135m", "ic-1b", "ic-nano"]
    nano = preset("ic-nano")
    assert (nano.eos_token_id, nano.pad_token_id, nano.vocab_size) == (256, 257, 264)
    assert nano.max_position_embeddings == 1_048_576 and nano.q_lora_rank is None
    assert all(preset(name).latent_dim == 320 for name in preset_names()), "what vLLM's MLA metadata accepts"
    assert preset("ic-nano") is not nano, "a preset that is changed does not change the next one"
    with pytest.raises(ValueError, match="preset 'ic-2b' is not one of ic-135m, ic-1b, ic-nano"):
        preset("ic-2b")
