"""Small random sources of every architecture that can be converted, and a conversion of them."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from ic_model.byte_tokenizer import build_byte_tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ic_train.convert.calibration import WindowSizes
from ic_train.convert.options import ConversionOptions
from ic_train.convert.run import convert
from ic_train.evaluation.haystack import load_haystack

BASE: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 257,
    "bos_token_id": None,
    "eos_token_id": 256,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
# name: (configuration class, model class, fields beside BASE)
SOURCES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama, grouped": (LlamaConfig, LlamaForCausalLM, {}),
    "llama, multi-head, tied": (
        LlamaConfig,
        LlamaForCausalLM,
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "llama, one key head, biases": (
        LlamaConfig,
        LlamaForCausalLM,
        {"num_key_value_heads": 1, "attention_bias": True},
    ),
    "llama, llama3 scaling": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "llama, yarn": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": YARN}),
    "llama, linear scaling": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
}
SIZES = WindowSizes(
    calibration_samples=24, calibration_tokens=64, evaluation_samples=4, evaluation_tokens=96, seed=3
)


def source_model(name: str, **fields: Any) -> Any:
    """A model with random weights, float32; norms and biases are not what they start as."""
    config_class, model_class, own = SOURCES[name]
    torch.manual_seed(0)
    model = model_class(config_class(**{**BASE, **own, **fields})).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5)
            elif key.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    return model


def source_folder(folder: Path, name: str = "llama, grouped", **fields: Any) -> Path:
    """The same as a checkpoint with the byte tokenizer, which has a chat template."""
    source_model(name, **fields).save_pretrained(folder)
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def qwen3_folder(folder: Path) -> Path:
    """A source that cannot be converted."""
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**BASE)).save_pretrained(folder)
    build_byte_tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def text_file() -> str:
    """A file with a little of the Jargon File: bytes are tokens here, and all of it takes seconds to encode."""
    path = Path(tempfile.mkdtemp(prefix="ic-train-tests-")) / "jargon.txt"
    path.write_text(load_haystack("jargon")[200_000:230_000])
    return str(path)


def converted(source: Path, target: Path, rank: int, rope: int, **options: Any) -> dict[str, Any]:
    """Convert on a little of the Jargon File; the record."""
    return convert(
        source,
        target,
        ConversionOptions(kv_lora_rank=rank, qk_rope_head_dim=rope, **options),
        calibration=[text_file()],
        sizes=SIZES,
    )


def token_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    """Bytes."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
