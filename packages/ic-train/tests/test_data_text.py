"""`ic-train data text`: what goes into a corpus, in every format, and what is refused; packing."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ic_model.byte_tokenizer import build_byte_tokenizer

from ic_train import cli
from ic_train.data import text
from ic_train.data.packing import PackedText
from ic_train.data.text import TokenCorpus, load_token_corpus, read_documents, text_files, write_corpus

END = 256


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """One document per format; together they spell the alphabet."""
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    (folder / "a.txt").write_text("é")
    with gzip.open(folder / "b.md.gz", "wt") as file:
        file.write("bb")
    (folder / "below" / "c.jsonl").write_text('{"text": "c1"}\n\n{"text": ""}\n{"text": "c2"}\n')
    with gzip.open(folder / "d.jsonl.gz", "wt") as file:
        file.write('{"text": "dd"}\n')
    pq.write_table(pa.table({"text": ["e1", "e2"], "other": [1, 2]}), folder / "e.parquet")
    (folder / "ignored.png").write_bytes(b"\x89PNG")
    return folder


def test_every_format_is_read_in_a_fixed_order_with_end_tokens(
    texts: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = tmp_path / "more.txt"
    more.write_text("last")
    command = ["data", "text", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    assert cli.main([*command, "--from", str(texts), "CC0-1.0", "--from", str(more), "public-domain"]) == 0
    corpus = load_token_corpus(tmp_path / "out")
    assert corpus.tokens.dtype == np.uint16 and isinstance(corpus.tokens, np.memmap)
    documents = ["é", "bb", "c1", "c2", "dd", "e1", "e2", "last"]
    expected = [token for one in documents for token in [*one.encode(), END]]
    assert corpus.tokens.tolist() == expected
    first, second = corpus.record["sources"]
    assert (first["licence"], first["documents"], first["files"]) == ("CC0-1.0", 7, 5)
    assert (second["licence"], second["tokens"]) == ("public-domain", 5)
    assert corpus.record["tokens"] == len(expected)
    assert "CC0-1.0" in capsys.readouterr().out
    assert not (tmp_path / "out.partial").exists()


def test_a_cut_source_ends_with_an_end_token_and_says_so(
    texts: Path, tokenizer: Path, tmp_path: Path
) -> None:
    command = ["data", "text", str(tmp_path / "out"), "--tokenizer", str(tokenizer), "--max-tokens", "8"]
    assert cli.main([*command, "--from", str(texts), "CC0-1.0"]) == 0
    corpus = load_token_corpus(tmp_path / "out")
    assert corpus.tokens.tolist() == [*"é".encode(), END, *b"bb", END, *b"c", END]
    assert corpus.record["max_tokens_per_source"] == 8


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"\xff\xfe", "x.txt is not UTF-8 text"),
        ("x.jsonl", b'{"text": "a"}\n{"text": 3}\n', "x.jsonl, line 2, has no text in 'text'"),
        ("x.jsonl", b'{"text": "a"}\n{"te', "x.jsonl, line 2, is not JSON"),
        ("x.txt.gz", gzip.compress(b"hello" * 100)[:-12], "x.txt.gz cannot be read"),
        ("x.txt.gz", b"plain", "x.txt.gz cannot be read"),
        ("x.parquet", b"no parquet at all", "x.parquet is no parquet file"),
        ("x.docx", b"PK", "x.docx is of no known kind; accepted: .txt"),
        ("x.txt", b" \n", "x.txt holds no text: every document in it is empty"),
    ],
)
def test_bad_files_are_refused_and_leave_no_corpus(
    name: str,
    content: bytes,
    message: str,
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).write_bytes(content)
    command = ["data", "text", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    assert cli.main([*command, "--from", str(tmp_path / name), "CC0-1.0"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_refusals(texts: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        text_files(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no column 'body'; it has text, other"):
        list(read_documents(texts / "e.parquet", text_field="body"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no text file"):
        text_files(tmp_path / "empty")
    endless = build_byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="'bytes' has no end token"):
        write_corpus(tmp_path / "out", [(str(texts), "CC0-1.0")], endless, tokenizer_name="bytes")
    write_corpus(tmp_path / "out", [(str(texts), "CC0-1.0")], build_byte_tokenizer(), tokenizer_name="bytes")
    with pytest.raises(ValueError, match="out exists and is not an empty folder"):
        write_corpus(
            tmp_path / "out", [(str(texts), "CC0-1.0")], build_byte_tokenizer(), tokenizer_name="bytes"
        )
    tokens = tmp_path / "out" / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-1])
    with pytest.raises(ValueError, match="it is not whole"):
        load_token_corpus(tmp_path / "out")


def zeros_after_a_bad_copy(file: Path) -> None:
    file.write_bytes(b"\0" * file.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"out/tokens.bin cannot be read: .*No such file"),
        (
            lambda file: file.with_name("corpus.json").write_text("{"),
            r"out/corpus.json cannot be read: Expecting",
        ),
        (
            lambda file: change_record(file, dtype="<f4"),
            r"dtype in .*corpus.json is '<f4'; accepted: <u2, <u4",
        ),
        (
            lambda file: change_record(file, vocab_size=None),
            r"vocab_size in .*corpus.json is None; it must be",
        ),
        (
            lambda file: change_record(file, block_crc32=[]),
            r"block_crc32 in .*corpus.json must have 1 checksums",
        ),
        (zeros_after_a_bad_copy, r"out/tokens.bin is damaged: what follows byte 0 is not what was written"),
    ],
)
def test_a_damaged_corpus_is_refused_by_its_files_name(
    texts: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    tokenizer = build_byte_tokenizer()
    write_corpus(tmp_path / "out", [(str(texts), "CC0-1.0")], tokenizer, tokenizer_name="bytes")
    damage(tmp_path / "out" / "tokens.bin")
    with pytest.raises(ValueError, match=message):
        PackedText([load_token_corpus(tmp_path / "out")], tokens_per_sequence=4, seed=0)[0]


def change_record(tokens: Path, **changes: object) -> None:
    file = tokens.with_name("corpus.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_blocks_are_checked_where_they_are_read(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", 8)
    tokenizer = build_byte_tokenizer()
    corpus = write_corpus(tmp_path / "out", [(str(texts), "CC0-1.0")], tokenizer, tokenizer_name="bytes")
    assert len(corpus.record["block_crc32"]) == -(-2 * len(corpus.tokens) // 8)
    assert (corpus.read(0, len(corpus.tokens)) == corpus.tokens).all()
    with (tmp_path / "out" / "tokens.bin").open("r+b") as file:
        file.seek(9)
        file.write(b"\7")
    damaged = load_token_corpus(tmp_path / "out")
    assert damaged.read(0, 4).tolist() == corpus.tokens[:4].tolist()
    with pytest.raises(ValueError, match="what follows byte 8 is not what was written"):
        damaged.read(3, 5)
    # the record of a run is for people
    assert "block_crc32" not in PackedText([corpus], tokens_per_sequence=4, seed=0).records[0]


def test_a_share_that_would_never_come_is_refused() -> None:
    corpora = [corpus_of(0, 1000), corpus_of(10_000, 1000)]
    with pytest.raises(
        ValueError, match=r"corpus 1 .* has a share of 0.0001 of the sequences, of which none"
    ):
        PackedText(corpora, tokens_per_sequence=16, seed=3, weights=[0.9999, 0.0001])
    PackedText(corpora, tokens_per_sequence=16, seed=3, weights=[0.9995, 0.0005])


def corpus_of(start: int, tokens: int) -> TokenCorpus:
    record = json.loads('{"vocab_size": 60000}')
    return TokenCorpus(tokens=np.arange(start, start + tokens, dtype=np.uint16), record=record)


def test_a_pass_over_a_corpus_has_every_sequence_once() -> None:
    packed = PackedText([corpus_of(0, 1000)], tokens_per_sequence=16, seed=3)
    rows = [packed[number]["input_ids"].tolist() for number in range(len(packed))]
    assert len(packed) == 1000 // 16 - 1
    assert all(row == list(range(row[0], row[0] + 16)) for row in rows)
    starts = sorted(row[0] for row in rows)
    assert starts == list(range(starts[0], starts[0] + 16 * len(rows), 16))
    assert [row[0] for row in rows] != starts


def test_sequences_depend_on_seed_and_number_only() -> None:
    corpora = [corpus_of(0, 3000), corpus_of(10_000, 6000)]
    packed = PackedText(corpora, tokens_per_sequence=16, seed=3, num_sequences=12_000)
    again = PackedText(corpora, tokens_per_sequence=16, seed=3, num_sequences=12_000)
    for number in (11_999, 5, 4096, 700):
        assert packed[number]["input_ids"].tolist() == again[number]["input_ids"].tolist()
    other = PackedText(corpora, tokens_per_sequence=16, seed=4, num_sequences=12_000)
    assert any(
        packed[number]["input_ids"].tolist() != other[number]["input_ids"].tolist() for number in range(5)
    )


@pytest.mark.parametrize(("weights", "share"), [((), 1 / 3), ((3.0, 1.0), 0.75)])
def test_corpora_come_by_their_shares_and_passes_repeat_none(
    weights: tuple[float, ...], share: float
) -> None:
    corpora = [corpus_of(0, 16 * 101), corpus_of(10_000, 16 * 201)]
    packed = PackedText(corpora, tokens_per_sequence=16, seed=1, num_sequences=9000, weights=weights)
    starts = [int(packed[number]["input_ids"][0]) for number in range(9000)]
    first = [start for start in starts if start < 10_000]
    assert len(first) / 9000 == pytest.approx(share, abs=0.01)
    # across a block's end, too: each hundred is one pass, without a sequence twice
    for begin in range(0, len(first) - 100, 100):
        assert len(set(first[begin : begin + 100])) == 100
