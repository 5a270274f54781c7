"""YaRN as an extension of a model: DeepSeek-V3's frequencies and temperature, and the same for given angles."""

from __future__ import annotations

import math

import pytest
import torch
from ic_model import ICForCausalLM
from ic_model.rope import inverse_frequencies, softmax_scale, yarn_mscale
from ic_model.testing import assert_close
from training_runs import toy_config
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ic_train.long_context.extension import extend_context, stretch

EXTENSION = {"context_tokens": 16384, "factor": 32.0, "original_context_tokens": 512}


def test_the_frequencies_are_deepseeks() -> None:
    model = ICForCausalLM(toy_config())
    extend_context(model, model.config, **EXTENSION)
    peer = DeepseekV3Config(
        head_dim=16,
        qk_rope_head_dim=16,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 32.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 32,
            "beta_slow": 1,
        },
    )
    expected, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](peer, device="cpu")
    assert_close(inverse_frequencies(model.config), expected, "fp32_peer")
    assert attention_factor == 1.0
    assert model.config.max_position_embeddings == 16384


def test_the_attention_takes_the_temperature_at_once() -> None:
    model = ICForCausalLM(toy_config())
    before = model.model.layers[0].self_attn.scaling
    extend_context(model, model.config, **EXTENSION)
    scaling = model.model.layers[0].self_attn.scaling
    assert scaling == softmax_scale(model.config) == pytest.approx(before * yarn_mscale(32, 1.0) ** 2)
    # what a checkpoint that is loaded again would have
    again = ICForCausalLM(model.config)
    assert again.model.layers[1].self_attn.scaling == scaling


def test_a_second_extension_starts_from_the_original_frequencies() -> None:
    twice, once = ICForCausalLM(toy_config()), ICForCausalLM(toy_config())
    extend_context(twice, twice.config, context_tokens=2048, factor=4.0, original_context_tokens=512)
    extend_context(twice, twice.config, **EXTENSION)
    extend_context(once, once.config, **EXTENSION)
    assert twice.config.rope_parameters == once.config.rope_parameters
    with pytest.raises(
        ValueError, match="original_context_tokens is 1024; the model was extended before, from 512"
    ):
        extend_context(twice, twice.config, context_tokens=65536, factor=64.0, original_context_tokens=1024)


def test_given_angles_get_the_same_ramp_and_temperature() -> None:
    angles = (1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)).tolist()
    rope = {"rope_type": "explicit", "inverse_frequencies": angles}
    torch.manual_seed(0)
    model = ICForCausalLM(toy_config(rope_parameters=rope))
    before = model.model.layers[0].self_attn.q_b_proj.weight.clone()
    extend_context(model, model.config, **EXTENSION)
    stretched = torch.tensor(model.config.rope_parameters["inverse_frequencies"])
    rotations = 512 * torch.tensor(angles) / (2 * math.pi)
    fast, slow = rotations >= 32, rotations <= 1
    assert torch.allclose(stretched[fast], torch.tensor(angles)[fast])
    assert torch.allclose(stretched[slow], torch.tensor(angles)[slow] / 32)
    assert slow.any() and (stretched[~slow] > torch.tensor(angles)[~slow] / 32).all()
    factor = yarn_mscale(32, 1.0) ** 2
    assert torch.equal(model.model.layers[0].self_attn.q_b_proj.weight, before * factor)
    assert model.model.layers[0].self_attn.scaling == softmax_scale(toy_config(rope_parameters=rope))
    assert stretch(torch.tensor([0.0]), 8, 512).item() == 0
    with pytest.raises(ValueError, match=r"angles are for 16384 tokens .* do not say what they were"):
        extend_context(model, model.config, **EXTENSION)


def test_factor_one_only_raises_the_limit() -> None:
    model = ICForCausalLM(toy_config())
    rope = dict(model.config.rope_parameters)
    extend_context(model, model.config, context_tokens=4096, factor=1.0, original_context_tokens=0)
    assert model.config.rope_parameters == rope and model.config.max_position_embeddings == 4096


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 0.5}, "yarn_factor is 0.5; it must be a number of at least 1"),
        ({"original_context_tokens": 0}, "original_context_tokens is 0; with yarn_factor 32.0 it must say"),
        ({"context_tokens": 0}, "context_tokens is 0; it must be at least 1"),
        ({"factor": 4.0}, r"yarn_factor is 4.0; 512 tokens times that are fewer .* give at least 32"),
    ],
)
def test_bad_extensions_are_refused(changes: dict[str, float], message: str) -> None:
    model = ICForCausalLM(toy_config())
    with pytest.raises(ValueError, match=message):
        extend_context(model, model.config, **{**EXTENSION, **changes})
