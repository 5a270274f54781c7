"""The document of the demo: where it comes from, how long it is, and what is hidden in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ic_model.sizing import load_config
from ic_train.data.passkey import NEEDLE_TOKENS, PassKey, hide_pass_keys
from ic_train.evaluation.haystack import load_haystack
from tokenizers import Tokenizer

SHIPPED = "The Jargon File 4.4.7 (public domain)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A text to ask about.

    Args:
        title: what to call it.
        text: all of it, pass keys included.
        tokens: its length with the model's tokenizer.
        pass_keys: those hidden in it, by depth.
    """

    title: str
    text: str
    tokens: int
    pass_keys: list[PassKey] = field(default_factory=list)


class Checkpoint:
    """A checkpoint folder: its configuration and its tokenizer.

    Args:
        folder: has config.json and tokenizer.json.

    Raises:
        ValueError: one of them is missing.
    """

    def __init__(self, folder: Path) -> None:
        for name in ("config.json", "tokenizer.json"):
            if not (folder / name).is_file():
                raise ValueError(
                    f"the model is {folder}, which has no {name}; it must be a checkpoint folder"
                )
        self.folder = folder.resolve()
        self.config = load_config(str(self.folder))
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def context_tokens(self) -> int:
        """The longest context that the model is meant for, in tokens."""
        return self.config.max_position_embeddings

    def count_tokens(self, text: str) -> int:
        """The text's length in tokens."""
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def cut(self, text: str, tokens: int) -> str:
        """The start of a text, of at most so many tokens, up to the end of a line."""
        # no tokenizer of ours has tokens longer than 16 characters on average
        encoding = self._tokenizer.encode(text[: 16 * tokens], add_special_tokens=False)
        if len(encoding) <= tokens:
            return text[: 16 * tokens]
        start = text[: encoding.offsets[tokens][0]]
        return start[: start.rfind("\n") + 1] or start


def shipped_document(checkpoint: Checkpoint, *, tokens: int, keys: int, seed: int) -> Document:
    """The start of the shipped document, with pass keys hidden in it.

    Args:
        checkpoint: whose tokens count.
        tokens: length of the result at most, pass keys included.
        keys: pass keys to hide; 0 for none.
        seed: of the keys and their places.

    Raises:
        ValueError: the model or the document has not so many tokens, or the keys leave no room for it.
    """
    if tokens > checkpoint.context_tokens:
        raise ValueError(
            f"--tokens is {tokens}; {checkpoint.name}'s context is {checkpoint.context_tokens} tokens, of which "
            "question and answer take some"
        )
    text = load_haystack("jargon")
    room = tokens - keys * NEEDLE_TOKENS
    if room < tokens // 2:
        raise ValueError(
            f"--keys is {keys}, whose sentences alone take {keys * NEEDLE_TOKENS} tokens; with --tokens {tokens} "
            f"at most {tokens // 2 // NEEDLE_TOKENS} are accepted, so that half of the text is document"
        )
    whole = checkpoint.count_tokens(text)
    if room > whole:
        raise ValueError(
            f"--tokens is {tokens}; {SHIPPED} has {whole}, so it must be at most {whole + tokens - room}"
        )
    return _hide(SHIPPED, checkpoint.cut(text, room), checkpoint, keys=keys, seed=seed)


def own_document(path: Path, checkpoint: Checkpoint, *, keys: int, seed: int) -> Document:
    """The user's own text, whole.

    Args:
        path: UTF-8 text.
        checkpoint: whose tokens count.
        keys: pass keys to hide; 0 for none.
        seed: of the keys and their places.

    Raises:
        ValueError: the file cannot be read, is empty, is not UTF-8 text, or is too short for the keys.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"--document is {path}, which cannot be read: {error.strerror}") from None
    try:
        # tolerates the mark that some editors put in front
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--document is {path}, which is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}); "
            "convert it first, for example with iconv or pdftotext"
        ) from None
    if "\0" in text:
        raise ValueError(f"--document is {path}, which has zero bytes: a binary file, not UTF-8 text")
    if not text.strip():
        raise ValueError(f"--document is {path}, which is empty; it must have some text")
    if len(text) < keys:
        raise ValueError(
            f"--keys is {keys}; {path} has {len(text)} characters and takes no more keys than that"
        )
    return _hide(path.name, text, checkpoint, keys=keys, seed=seed)


def check_fits(document: Document, question_tokens: int, context_tokens: int, whose: str) -> None:
    """Refuse a document that is too long: nothing is ever cut away from anyone's text.

    Args:
        document: the document.
        question_tokens: of the longest question and its answer together.
        context_tokens: what is accepted.
        whose: whose limit that is, for the message.

    Raises:
        ValueError: it does not fit.
    """
    longest = context_tokens - question_tokens
    if document.tokens > longest:
        raise ValueError(
            f"{document.title} has {document.tokens:,} tokens; at most {longest:,} are accepted "
            f"({whose} is {context_tokens:,} tokens, of which question and answer take {question_tokens:,})"
        )


def _hide(title: str, text: str, checkpoint: Checkpoint, *, keys: int, seed: int) -> Document:
    pass_keys: list[PassKey] = []
    if keys:
        text, pass_keys = hide_pass_keys(text, keys, seed)
    return Document(title=title, text=text, tokens=checkpoint.count_tokens(text), pass_keys=pass_keys)
