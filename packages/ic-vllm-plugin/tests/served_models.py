"""Checkpoints for the tests: the embedded one, and random weights written by ic-model itself."""

import os
from pathlib import Path
from typing import Any

import torch
from ic_model import ICConfig, ICForCausalLM, checkpoint_path
from ic_model.byte_tokenizer import build_byte_tokenizer

# small in all but what attention sees; float32, so that two engines agree to the last greedy token
SMALL: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 16.0,
    "original_max_position_embeddings": 512,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}


def write_checkpoint(folder: Path, *, seed: int = 0, **fields: Any) -> Path:
    """Write a model with random weights, its configuration and the byte tokenizer; return the folder."""
    torch.manual_seed(seed)
    config = ICConfig(**{**SMALL, "initializer_range": 0.08, **fields})
    model = ICForCausalLM(config).to(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # all ones after initialisation: a norm that were left out would not be noticed
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    model.save_pretrained(folder)
    build_byte_tokenizer().save_pretrained(folder)
    return folder


def served_checkpoint() -> Path:
    """The checkpoint of the shared server: the embedded one, with its million tokens of context."""
    return checkpoint_path("ic-nano")


def users_environment() -> dict[str, str]:
    """The environment without settings for vLLM: TRL, which other tests import, silences its log by one."""
    return {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}


def prompt_tokens(length: int, seed: int) -> list[int]:
    """Random bytes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()
