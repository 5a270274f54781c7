"""What only converted models have: a list of angles, and biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_ids, tiny_config, tiny_model

from ic_model import ICConfig, ICForCausalLM, LatentCache
from ic_model.rope import inverse_frequencies, rope_tables
from ic_model.sizing import parameter_count
from ic_model.testing import assert_close
from ic_model.weights import export_deepseek_v3, tensor_shapes

ANGLES = [1.0, 0.5, 0.5, 0.0]
EXPLICIT: dict[str, Any] = {"rope_type": "explicit", "inverse_frequencies": ANGLES}
CONVERTED = {"kv_latent_norm": False, "attention_bias": True, "rope_parameters": EXPLICIT}


def converted_model(**fields: Any) -> ICForCausalLM:
    model = tiny_model(**CONVERTED, **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    return model


@pytest.mark.parametrize("q_lora_rank", [None, 12])
def test_biases_and_angles_survive_saving_and_decode_as_they_prefill(
    q_lora_rank: int | None, tmp_path: Path
) -> None:
    model = converted_model(q_lora_rank=q_lora_rank)
    names = {name for name, _ in model.named_parameters()}
    assert names == set(tensor_shapes(model.config))
    assert parameter_count(model.config) == model.num_parameters()
    model.save_pretrained(tmp_path)
    again = ICForCausalLM.from_pretrained(tmp_path).eval()
    assert inverse_frequencies(again.config).tolist() == ANGLES
    ids = random_ids(2, 30)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert_close(again(ids, use_cache=False).logits, expected, "exact")
        cache = LatentCache(3)
        steps = [again(ids[:, at : at + 1], past_key_values=cache).logits for at in range(30)]
    assert_close(torch.cat(steps, 1), expected, "fp32_reordered")


def test_every_bias_reaches_the_logits() -> None:
    model, ids = converted_model(), random_ids(1, 20)
    with torch.no_grad():
        expected = model(ids).logits
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                kept = parameter.clone()
                parameter.zero_()
                assert (model(ids).logits - expected).abs().max() > 1e-4, name
                parameter.copy_(kept)


def test_a_list_equal_to_a_theta_gives_the_same_tables() -> None:
    plain = tiny_config()
    listed = tiny_config(
        rope_parameters={"rope_type": "explicit", "inverse_frequencies": inverse_frequencies(plain).tolist()}
    )
    positions = torch.tensor([[0, 7, 1_000_000]])
    for left, right in zip(rope_tables(plain, positions), rope_tables(listed, positions), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"inverse_frequencies": [1.0]}, r"is 1 entries; it must be a list of qk_rope_head_dim / 2 = 4"),
        ({}, r"\['inverse_frequencies'\] is None"),
        ({"inverse_frequencies": [1.0, 1.0, 1.0, -1.0]}, r"4 finite numbers of at least 0"),
        ({"inverse_frequencies": ANGLES, "factor": 2.0}, r"unknown keys \['factor'\]"),
    ],
)
def test_bad_lists_are_refused(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(rope_parameters={"rope_type": "explicit", **rope})


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"attention_bias": True}, "attention_bias is True"), ({"rope_parameters": EXPLICIT}, "is 'explicit'")],
)
def test_deepseek_v3_cannot_express_them(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny_model(**fields).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        export_deepseek_v3(tmp_path / "ours", tmp_path / "deepseek")
    assert ICConfig.from_pretrained(tmp_path / "ours").model_type == "infinite_context"
