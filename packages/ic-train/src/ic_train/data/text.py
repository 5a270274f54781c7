"""Text from local files, and corpora made of it: tokenised, packed, memory-mapped.

A corpus is a folder with `tokens.bin` (little-endian token ids without a header, uint16 or uint32) and
`corpus.json`, which says what they are. Documents follow each other with one end token between them.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

RECORD_FILE, TOKENS_FILE = "corpus.json", "tokens.bin"
FORMAT = "ic-train corpus 1"
DTYPES = ("<u2", "<u4")
# of tokens.bin; each has a checksum in the record
BLOCK_BYTES = 2**24
PLAIN_SUFFIXES = (".txt", ".md", ".rst", ".text")
SUFFIXES = (*PLAIN_SUFFIXES, ".jsonl", ".parquet")
# characters handed to the tokenizer at once: it is parallel over a batch and keeps all of it in memory
_BATCH_CHARACTERS = 4_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One input of a corpus: a file or a folder, under one licence."""

    path: str
    licence: str
    files: int
    documents: int
    tokens: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCorpus:
    """A corpus, mapped into memory.

    Args:
        tokens: `[tokens]` unsigned integers, read from disk as they are used; `read` checks them.
        record: what `corpus.json` says.
        folder: of the corpus, for messages.
    """

    tokens: np.ndarray
    record: dict[str, Any]
    folder: Path = Path()
    _whole_blocks: set[int] = field(default_factory=set, init=False, repr=False, compare=False)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `[stop - start]`; their blocks of the file are checked when this process first reads of them.

        Raises:
            ValueError: a block is not what was written. Corpora of before there were checksums are not checked.
        """
        if sums := self.record.get("block_crc32"):
            size = BLOCK_BYTES // self.tokens.itemsize
            for block in range(start // size, -(-stop // size)):
                if block not in self._whole_blocks:
                    if zlib.crc32(self.tokens[block * size : (block + 1) * size].data) != sums[block]:
                        raise ValueError(
                            f"{self.folder / TOKENS_FILE} is damaged: what follows byte {block * BLOCK_BYTES} is "
                            "not what was written; copy it again, or make the corpus again"
                        )
                    self._whole_blocks.add(block)
        return self.tokens[start:stop]


def text_files(path: str | Path) -> list[Path]:
    """The text files of a path in a fixed order: itself, or all below a folder.

    Raises:
        ValueError: it does not exist, is of no known kind, or holds no text file.
    """
    root = Path(path)
    if root.is_file():
        if _kind(root) is None:
            raise ValueError(f"{root} is of no known kind; accepted: {_accepted()}")
        return [root]
    if not root.is_dir():
        raise ValueError(f"{root} does not exist; give a text file or a folder of them")
    found = sorted(file for file in root.rglob("*") if file.is_file() and _kind(file))
    if not found:
        raise ValueError(f"{root} holds no text file; accepted: {_accepted()}")
    return found


def read_documents(path: Path, *, text_field: str = "text") -> Iterator[str]:
    """The documents of one file: a plain file is one, a row of jsonl or parquet is one.

    Raises:
        ValueError: the file is damaged, is not UTF-8, or a row lacks the text field. The message names the
            file and the line.
    """
    kind = _kind(path)
    try:
        if kind == ".parquet":
            yield from _parquet(path, text_field)
        elif kind == ".jsonl":
            with _open(path) as lines:
                yield from _rows(path, lines, text_field)
        else:
            with _open(path) as file:
                yield file.read().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    except (EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def write_corpus(
    target: str | Path,
    sources: Sequence[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokenizer_name: str,
    text_field: str = "text",
    max_tokens: int = 0,
) -> TokenCorpus:
    """Tokenise files into a corpus; it appears under its name when it is whole.

    Args:
        target: folder to make; it must not exist, or be empty.
        sources: pairs of a path and its licence.
        tokenizer: must have an end token, which separates documents.
        tokenizer_name: for the record.
        text_field: of rows in jsonl and parquet.
        max_tokens: most tokens per source; what is left out is said in the record. 0: all.

    Raises:
        ValueError: a source cannot be read, the tokenizer has no end token, there is no text, the target
            exists, or the disk is full.
    """
    folder = Path(target)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; give a new one")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer_name!r} has no end token, which separates documents")
    listed = [(path, licence, text_files(path)) for path, licence in sources]
    dtype = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    written: list[Source] = []
    try:
        with (partial / TOKENS_FILE).open("wb") as out:
            for path, licence, files in listed:
                written.append(
                    _write_source(out, path, licence, files, tokenizer, dtype, text_field, max_tokens)
                )
            out.flush()
            os.fsync(out.fileno())
        total = sum(source.tokens for source in written)
        record = {
            "format": FORMAT,
            "tokens": total,
            "dtype": dtype.str,
            "tokenizer": tokenizer_name,
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "block_bytes": BLOCK_BYTES,
            "block_crc32": _block_sums(partial / TOKENS_FILE),
            "max_tokens_per_source": max_tokens or None,
            "sources": [asdict(source) for source in written],
        }
        (partial / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n")
        if folder.is_dir():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise ValueError(f"{partial} cannot be written: {error}; {folder} was not made") from None
    return load_token_corpus(folder)


def load_token_corpus(path: str | Path) -> TokenCorpus:
    """Map a corpus into memory.

    Raises:
        ValueError: the folder is no corpus, or is not whole. The message names the file.
    """
    folder = Path(path)
    if not (folder / RECORD_FILE).is_file():
        raise ValueError(f"{folder} is no corpus: it has no {RECORD_FILE}; `ic-train data text` makes one")
    record = _read_record(folder / RECORD_FILE)
    dtype = np.dtype(record["dtype"])
    wanted = record["tokens"] * dtype.itemsize
    try:
        size = (folder / TOKENS_FILE).stat().st_size
        if size == wanted:
            tokens = np.memmap(folder / TOKENS_FILE, dtype=dtype, mode="r")
            return TokenCorpus(tokens=tokens, record=record, folder=folder)
    except OSError as error:
        raise ValueError(f"{folder / TOKENS_FILE} cannot be read: {error}") from None
    raise ValueError(f"{folder / TOKENS_FILE} has {size} bytes; its record says {wanted}: it is not whole")


def _read_record(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    found = record.get("format") if isinstance(record, dict) else record
    if found != FORMAT:
        raise ValueError(f"format in {file} is {found!r}; accepted: {FORMAT!r}")
    for name in ("tokens", "vocab_size", "eos_token_id"):
        if not isinstance(record.get(name), int) or record[name] < 0:
            raise ValueError(f"{name} in {file} is {record.get(name)!r}; it must be a number, at least 0")
    if record.get("dtype") not in DTYPES:
        raise ValueError(f"dtype in {file} is {record.get('dtype')!r}; accepted: {', '.join(DTYPES)}")
    if "block_crc32" in record:
        blocks = -(-record["tokens"] * np.dtype(record["dtype"]).itemsize // BLOCK_BYTES)
        if record.get("block_bytes") != BLOCK_BYTES or len(record["block_crc32"]) != blocks:
            raise ValueError(
                f"block_crc32 in {file} must have {blocks} checksums, each of {BLOCK_BYTES} bytes; make the "
                "corpus again"
            )
    return record


def _block_sums(file: Path) -> list[int]:
    """CRC-32 of every block: it is for bad copies and disks, and several times as fast as SHA-256."""
    with file.open("rb") as blocks:
        return [zlib.crc32(block) for block in iter(lambda: blocks.read(BLOCK_BYTES), b"")]


def _write_source(
    out: IO[bytes],
    path: str,
    licence: str,
    files: list[Path],
    tokenizer: PreTrainedTokenizerBase,
    dtype: np.dtype,
    text_field: str,
    max_tokens: int,
) -> Source:
    digest = hashlib.sha256()
    documents = tokens = 0
    bar = tqdm(files, desc=Path(path).name, unit="file")
    batch: list[str] = []
    end = np.array([tokenizer.eos_token_id], dtype)

    def flush() -> None:
        nonlocal documents, tokens
        if not batch:
            return
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            if max_tokens and tokens >= max_tokens:
                break
            row = np.concatenate((np.asarray(ids, dtype), end))
            # a source that is cut ends with its end token as well
            if max_tokens and tokens + len(row) > max_tokens:
                row = np.concatenate((row[: max_tokens - tokens - 1], end))
            out.write(row.tobytes())
            documents += 1
            tokens += len(row)
        batch.clear()

    characters = 0
    for file in bar:
        for document in read_documents(file, text_field=text_field):
            digest.update(document.encode())
            if document.strip():
                batch.append(document)
                characters += len(document)
            if characters >= _BATCH_CHARACTERS:
                flush()
                characters = 0
                bar.set_postfix(tokens=tokens)
        if max_tokens and tokens >= max_tokens:
            break
    flush()
    if not tokens:
        raise ValueError(f"{path} holds no text: every document in it is empty")
    return Source(
        path=Path(path).name,
        licence=licence,
        files=len(files),
        documents=documents,
        tokens=tokens,
        sha256=digest.hexdigest(),
    )


def _rows(path: Path, lines: IO[bytes], text_field: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
            raise ValueError(f"{path}, line {number}, has no text in {text_field!r}; name another field")
        yield row[text_field]


def _parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise ValueError(
                    f"{path} has no column {text_field!r}; it has {', '.join(file.schema_arrow.names)}"
                )
            for batch in file.iter_batches(columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    if not isinstance(value, str):
                        raise ValueError(f"{path} has {value!r} in {text_field!r}; accepted: text")
                    yield value
    except pa.ArrowException as error:
        raise ValueError(f"{path} is no parquet file: {error}") from None


def _kind(path: Path) -> str | None:
    """The suffix that says how to read a file, `.gz` aside."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in SUFFIXES and (suffix, path.suffix) != (".parquet", ".gz") else None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _accepted() -> str:
    return ", ".join(SUFFIXES) + "; all but parquet also with .gz"
