"""FLOP are counted the way MFU counts them, and devices' peaks are found by name."""

import torch
from ic_model import ICConfig, ICForCausalLM
from ic_model.presets import preset
from torch.utils.flop_counter import FlopCounterMode

from ic_train.metrics import peak_tflops, training_flop_per_token


def small(**changes: int | None) -> ICConfig:
    return ICConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        **changes,
    )


def test_flop_agree_with_what_pytorch_counts() -> None:
    for q_lora_rank in (None, 24):
        config = small(q_lora_rank=q_lora_rank)
        config._attn_implementation = "eager"
        model, tokens = ICForCausalLM(config), 128
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False).logits.sum().backward()
        counted = training_flop_per_token(config, tokens) * tokens
        # PyTorch counts the whole score matrix, MFU what a causal mask leaves of it
        heads_dims = config.qk_head_dim + config.v_head_dim
        masked_half = (
            3 * config.num_hidden_layers * config.num_attention_heads * tokens * (tokens - 1) * heads_dims
        )
        assert counter.get_total_flops() == counted + masked_half


def test_flop_grow_with_the_length() -> None:
    nano = preset("ic-nano")
    difference = training_flop_per_token(nano, 2048) - training_flop_per_token(nano, 1024)
    assert difference == 3 * 4 * 4 * 1024 * (192 + 128)


def test_peaks_are_known_by_name_and_unknown_devices_have_none() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3") == peak_tflops("NVIDIA H200") == 989.0
    assert peak_tflops("NVIDIA GeForce RTX 2070 SUPER") is None
