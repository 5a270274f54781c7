"""The same weights give the same logits and gradients in transformers' DeepSeek-V3."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import YARN, random_ids, tiny_config, tiny_model
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ic_model import ICForCausalLM
from ic_model.rope import cos_sin_scale, inverse_frequencies, softmax_scale, yarn_mscale
from ic_model.testing import assert_close
from ic_model.weights import tensor_shapes, to_deepseek_config

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "yarn": YARN,
    "yarn-unequal-mscales": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.707},
    "yarn-no-mscale": {name: value for name, value in YARN.items() if not name.startswith("mscale")},
    "yarn-factor-1": {**YARN, "factor": 1.0},
    "yarn-odd-ramp": {**YARN, "beta_fast": 4, "beta_slow": 2, "original_max_position_embeddings": 37},
}


def deepseek_twin(model: ICForCausalLM, **fields: Any) -> DeepseekV3ForCausalLM:
    """transformers' dense DeepSeek-V3 with the weights of a model of ours."""
    config = to_deepseek_config(model.config)
    for field, value in fields.items():
        setattr(config, field, value)
    twin = DeepseekV3ForCausalLM(config).eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"].clone())
    twin.load_state_dict(weights)
    return twin


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("q_lora_rank", [None, 12])
@pytest.mark.parametrize("rope", ROPES)
def test_logits_equal_deepseek_v3(rope: str, q_lora_rank: int | None, attention: str) -> None:
    model = tiny_model(rope_parameters=ROPES[rope], q_lora_rank=q_lora_rank, attn_implementation=attention)
    twin = deepseek_twin(model)
    twin.set_attn_implementation(attention)
    ids = random_ids(2, 301)
    with torch.no_grad():
        assert_close(model(ids).logits, twin(ids).logits, "fp32_peer", what="logits")


def test_logits_equal_deepseek_v3_with_padding_and_cache() -> None:
    model = tiny_model(rope_parameters=YARN, q_lora_rank=12)
    twin = deepseek_twin(model)
    ids = random_ids(2, 23)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    kept = mask[:, :, None].bool()
    with torch.no_grad():
        ours = model(ids, attention_mask=mask, position_ids=positions).logits
        theirs = twin(ids, attention_mask=mask, position_ids=positions).logits
        assert_close(ours * kept, theirs * kept, "fp32_peer", what="logits with left padding")
        caches = [net(ids[1:, :20], use_cache=True).past_key_values for net in (model, twin)]
        steps = [
            net(ids[1:, 20:], past_key_values=cache).logits
            for net, cache in zip((model, twin), caches, strict=True)
        ]
    assert_close(steps[0], steps[1], "fp32_peer", what="logits of 3 tokens after a cache of 20")


def test_gradients_equal_deepseek_v3() -> None:
    model = tiny_model(rope_parameters=YARN, q_lora_rank=12, tie_word_embeddings=False).train()
    twin = deepseek_twin(model).train()
    ids = random_ids(2, 33)
    losses = [net(ids, labels=ids).loss for net in (model, twin)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for loss in losses:
        loss.backward()
    expected = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and expected[name].grad is not None, name
        assert_close(parameter.grad, expected[name].grad, "fp32_gradient", what=name)


@pytest.mark.parametrize(("mscale", "mscale_all_dim"), [(0.707, None), (None, 1.0), (2.0, 0.0)])
def test_mscale_alone_follows_deepseeks_release(mscale: float | None, mscale_all_dim: float | None) -> None:
    """Ours is DeepSeek's own formula, with its defaults mscale = 1 and mscale_all_dim = 0.

    transformers divides the two mscales only if both are given and not 0, and otherwise scales cos and sin by
    m(factor, 1), whatever the one that is given says. So the logits differ there, and the export refuses.
    """
    rope = {**YARN, "mscale": mscale, "mscale_all_dim": mscale_all_dim}
    config = tiny_config(rope_parameters={name: value for name, value in rope.items() if value is not None})
    expected = yarn_mscale(16.0, 1.0 if mscale is None else mscale) / yarn_mscale(16.0, mscale_all_dim or 0.0)
    assert cos_sin_scale(config) == pytest.approx(expected)
    assert softmax_scale(config) == pytest.approx(22**-0.5 * yarn_mscale(16.0, mscale_all_dim or 0.0) ** 2)
    with pytest.raises(ValueError, match="mscale"):
        to_deepseek_config(config)


@pytest.mark.parametrize("rope_dim", [2, 32, 64])
@pytest.mark.parametrize(
    "fields",
    [
        # DeepSeek-V3's own, then shapes whose ramp starts or ends outside of the pairs
        {"factor": 40.0, "original_max_position_embeddings": 4096},
        {"factor": 128.0, "original_max_position_embeddings": 8192, "rope_theta": 130000.0},
        {"factor": 3.5, "original_max_position_embeddings": 100, "rope_theta": 1e7},
        {"factor": 8.0, "original_max_position_embeddings": 131072, "beta_fast": 64, "beta_slow": 4},
        {"factor": 8.0, "original_max_position_embeddings": 10, "rope_theta": 50.0},
    ],
)
def test_yarn_frequencies_equal_transformers(fields: dict[str, Any], rope_dim: int) -> None:
    config = tiny_config(rope_parameters={**YARN, **fields}, qk_rope_head_dim=rope_dim)
    expected, scale = ROPE_INIT_FUNCTIONS["yarn"](to_deepseek_config(config), torch.device("cpu"))
    assert_close(inverse_frequencies(config), expected, "exact", what="frequencies")
    assert cos_sin_scale(config) == scale


def test_mscale_formula() -> None:
    assert yarn_mscale(40.0, 1.0) == pytest.approx(0.1 * math.log(40) + 1)
    assert yarn_mscale(1.0, 1.0) == yarn_mscale(0.5, 1.0) == 1.0
    assert yarn_mscale(40.0, 0.0) == 1.0


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"q_lora_rank": 12},
        {"q_lora_rank": 12, "q_latent_norm": False, "kv_latent_norm": False},
        {"tie_word_embeddings": False},
    ],
)
def test_tensor_shapes_are_the_models(fields: dict[str, Any]) -> None:
    model = tiny_model(**fields)
    stored = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del stored["lm_head.weight"]
    assert tensor_shapes(model.config) == stored


def test_tensor_shapes_are_deepseeks() -> None:
    config = tiny_config(q_lora_rank=12, tie_word_embeddings=False)
    twin = DeepseekV3ForCausalLM(to_deepseek_config(config))
    assert tensor_shapes(config) == {name: tuple(tensor.shape) for name, tensor in twin.state_dict().items()}


def test_deepseeks_latent_norms_ignore_the_configured_epsilon() -> None:
    """Why the export accepts one rms_norm_eps only; when this fails, transformers has changed that."""
    config = DeepseekV3Config(
        **to_deepseek_config(tiny_config(q_lora_rank=12)).to_dict() | {"rms_norm_eps": 1e-3}
    )
    attention = DeepseekV3ForCausalLM(config).model.layers[0].self_attn
    assert attention.kv_a_layernorm.variance_epsilon == attention.q_a_layernorm.variance_epsilon == 1e-6
