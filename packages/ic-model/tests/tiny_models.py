"""Small random models for the tests of ic-model."""

from __future__ import annotations

from typing import Any

import torch

from ic_model import ICConfig, ICForCausalLM

# odd sizes wherever a size may be odd, and no two alike, so that a swapped dimension cannot go unnoticed
TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "q_lora_rank": None,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.15,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def tiny_config(**fields: Any) -> ICConfig:
    """A configuration of a few thousand parameters."""
    return ICConfig(**{**TINY, **fields})


def tiny_model(seed: int = 0, **fields: Any) -> ICForCausalLM:
    """A model with random weights, float32, in eval mode."""
    torch.manual_seed(seed)
    model = ICForCausalLM(tiny_config(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # they start as ones: a norm that is left out or swapped would not show
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    """Token ids that are neither padding nor end."""
    return torch.randint(2, TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))
