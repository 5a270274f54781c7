"""The byte tokenizer: one byte, one token, and the id is the byte's value."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ic_model.byte_tokenizer import END_OF_TEXT, PADDING, RESERVED, build_byte_tokenizer, main
from ic_model.presets import preset

TEXTS = {
    "empty": "",
    "spaces": "  a  b \t\r\n\n c ",
    "punctuation": "Hello , world ! It 's n't . ( x )",
    "control": "".join(map(chr, range(256))),
    "emoji": "🦄👩‍👩‍👧‍👦 é e\u0301 中文 \u2028\u0085\ufeff",
    "not-normalised": "ﬁ Å A\u030a \u00a0",
    "last-planes": "\U0010ffff\ue000\uffff",
    "longer-than-a-piece": "ab é🦄" * 500,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Written to a folder and read again, as users get it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    build_byte_tokenizer().save_pretrained(folder)
    assert (folder / "tokenizer.json").is_file()
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", TEXTS)
def test_ids_are_the_bytes_and_come_back(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    text = TEXTS[name]
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert build_byte_tokenizer()(text).input_ids == ids


def test_every_byte_has_its_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == preset("ic-nano").vocab_size == 264
    assert len({tokenizer.convert_ids_to_tokens(number) for number in range(264)}) == 264
    assert tokenizer.decode([0xF0, 0x9F, 0xA6, 0x84]) == "🦄"
    assert tokenizer.decode([0x61, 0xF0, 0x9F]) == "a\ufffd"


def test_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    names = (END_OF_TEXT, PADDING, *RESERVED)
    assert tokenizer.convert_tokens_to_ids(list(names)) == list(range(256, 264))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        preset("ic-nano").eos_token_id,
        preset("ic-nano").pad_token_id,
    )
    assert tokenizer.bos_token is None and tokenizer.unk_token is None
    assert tokenizer.model_max_length == preset("ic-nano").max_position_embeddings
    assert tokenizer.decode([97, 256, 98], skip_special_tokens=True) == "ab"


def test_special_tokens_in_a_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """They are parsed by default, as everywhere in transformers, and are bytes where the caller says so."""
    assert tokenizer(f"a{END_OF_TEXT}b").input_ids == [97, 256, 98]
    text = f"a {END_OF_TEXT}{PADDING} b"
    assert tokenizer(text, split_special_tokens=True).input_ids == list(text.encode())
    # a lone piece of one is text
    assert tokenizer("<|endoftext|").input_ids == list(b"<|endoftext|")


def test_padding_and_nothing_added(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = tokenizer(["a", "abc"], padding=True)
    assert sorted(map(len, batch["input_ids"])) == [3, 3]
    assert sum(batch["attention_mask"][0]) == 1 and 257 in batch["input_ids"][0]
    assert tokenizer("abc", add_special_tokens=True).input_ids == [97, 98, 99]


@pytest.mark.parametrize(
    "text", ["def f(x):\n    return x  # ünïcödé\n" * 30_000, "a" * 1_000_000, " " * 1_000_000]
)
def test_a_million_characters_take_seconds(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    text = text[:1_000_000]
    start = time.process_time()
    ids = tokenizer(text, verbose=False).input_ids
    seconds = time.process_time() - start
    assert bytes(ids) == text.encode()
    # about one second; a quadratic tokenizer takes minutes
    assert seconds < 15


def test_command_writes_a_folder(tmp_path: Path) -> None:
    main([str(tmp_path / "new")])
    assert AutoTokenizer.from_pretrained(tmp_path / "new")("é").input_ids == [0xC3, 0xA9]
    with pytest.raises(SystemExit):
        main([])
