"""The byte-level tokenizer of ic-nano: one byte is one token, and the token id is the byte's value.

python -m ic_model.byte_tokenizer FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
RESERVED = tuple(f"<|reserved_{number}|>" for number in range(6))


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 256 bytes and 8 special tokens that adds nothing to a text.

    Ids 0 to 255 are the bytes of the text in UTF-8, 256 is `<|endoftext|>` (end of text), 257 `<|pad|>`, 258
    to 263 are reserved. Any text comes back as it was from `decode(encode(text))`; ids that are not valid
    UTF-8, such as half of a character, are decoded to U+FFFD.

    A special token that is spelled out in a text becomes that token, as with every tokenizer of transformers;
    for text that may not contain control tokens pass `split_special_tokens=True`, and it becomes bytes.
    """
    tokenizer = Tokenizer(models.BPE(vocab=byte_vocabulary(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # without merges the split changes no token; it bounds the pieces, so that no release can be slow
            pre_tokenizers.Split(Regex(r"[\s\S]{1,64}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT, PADDING, *RESERVED])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=1_048_576,
        clean_up_tokenization_spaces=False,
    )


def byte_vocabulary() -> dict[str, int]:
    """ByteLevel's printable stand-in of every byte, mapped to the byte's value.

    Printable Latin-1 bytes stand for themselves, the others for the code points from 256 on, in order
    (the convention of GPT-2's tokenizer).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    vocabulary, shifted = {}, 256
    for byte in range(256):
        if byte in printable:
            vocabulary[chr(byte)] = byte
        else:
            vocabulary[chr(shifted)] = byte
            shifted += 1
    return vocabulary


def main(arguments: list[str] | None = None) -> None:
    """Command line: write the tokenizer's files into a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m ic_model.byte_tokenizer", description="Write the byte tokenizer's files."
    )
    parser.add_argument("folder", type=Path, help="where to; made if it is not there")
    build_byte_tokenizer().save_pretrained(parser.parse_args(arguments).folder)


if __name__ == "__main__":
    main()
