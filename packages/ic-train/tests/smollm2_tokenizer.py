"""The tokenizer of SmolLM2-135M-Instruct, with its chat template: BPE of 49,152 tokens that splits numbers."""

import functools

from smollm2 import gguf
from transformers import AutoTokenizer, PreTrainedTokenizerBase


@functools.cache
def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """Read once per process."""
    return AutoTokenizer.from_pretrained(gguf().parent, gguf_file=gguf().name)
