"""FLOP are counted the way MFU counts them, and devices' peaks are found by name."""

import time
from types import SimpleNamespace

import pytest
import torch
from ic_model import ICConfig, ICForCausalLM
from ic_model.presets import preset
from torch.utils.flop_counter import FlopCounterMode

from ic_train import metrics
from ic_train.metrics import UtilisationSampler, peak_tflops, training_flop, training_flop_per_token


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


def test_flop_of_documents_count_the_pairs_that_they_leave():
    config = preset("ic-1b")
    whole = training_flop(config, 8192, 8192 * 8193 // 2)
    assert whole == training_flop_per_token(config, 8192) * 8192
    halves = training_flop(config, 8192, 2 * (4096 * 4097 // 2))
    assert halves == training_flop_per_token(config, 4096) * 8192


def test_utilisation_is_sampled_from_nvml_by_the_gpus_uuid(monkeypatch):
    class Nvml:
        NVMLError = RuntimeError

        def nvmlInit(self):
            pass

        def nvmlDeviceGetHandleByUUID(self, uuid):
            assert uuid == "GPU-1234"
            return "handle"

        def nvmlDeviceGetUtilizationRates(self, handle):
            assert handle == "handle"
            return SimpleNamespace(gpu=80)

    properties = SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(metrics, "import_module", lambda _: Nvml())
    monkeypatch.setattr(metrics.util, "find_spec", lambda _: True)
    sampler = UtilisationSampler(interval_s=0.01)
    sampler.start()
    deadline = time.monotonic() + 10
    while len(sampler.samples) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert sampler.take() == pytest.approx(0.8)
    sampler.stop()
    sampler.take()
    assert sampler.take() is None
