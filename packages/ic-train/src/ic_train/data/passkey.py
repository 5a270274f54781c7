"""Pass keys hidden in text: the one place that knows how a needle, a question and an answer are written.

Byte-level: one byte is one token and the token id is the byte's value, so that whole batches are written
with array arithmetic; a Python loop per sample would starve the GPU.

Letters: B sequences, T tokens per sequence, K needles, Q questions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

KEY_LETTERS = 6
KEY_DIGITS = 5
NEEDLE = "\nThe pass key for {key} is {digits}.\n"
# the answer starts in the needle's own words: finding it is then continuing a phrase that was read before
QUESTION = "\nQuestion: pass key for {key}? Answer: The pass key for {key} is"
ANSWER = " {digits}.\n"

_KEY_MARK, _DIGIT_MARK = "k" * KEY_LETTERS, "0" * KEY_DIGITS
_UPPER, _LOWER, _ZERO = (np.frombuffer(mark, np.uint8)[0] for mark in (b"A", b"a", b"0"))


@dataclass(frozen=True, kw_only=True, slots=True)
class PassKey:
    """A pass key hidden in a text.

    Args:
        key: the name to ask for.
        digits: the pass key.
        depth: where it stands, from 0 (start of the text) to 1 (end).
    """

    key: str
    digits: str
    depth: float

    @property
    def needle(self) -> str:
        """The sentence that hides it."""
        return NEEDLE.format(key=self.key, digits=self.digits)

    @property
    def question(self) -> str:
        """The question that ends right before the answer."""
        return QUESTION.format(key=self.key)


@dataclass(frozen=True, kw_only=True, slots=True)
class PasskeyBatch:
    """B sequences of the same layout: text with K needles, then Q questions with their answers.

    Args:
        tokens: `[B, T + 1]` uint8, one more than the sequence so that inputs and labels are two views.
        answer_index: `[Q * 5]` int64, places of the answers' digits among the T labels.
        boundaries: `[B, K + 1]` int64, where each needle starts and where the questions start.
    """

    tokens: np.ndarray
    answer_index: np.ndarray
    boundaries: np.ndarray


class _Template:
    """A sentence with fixed-width blanks, as bytes."""

    def __init__(self, text: str) -> None:
        filled = text.format(key=_KEY_MARK, digits=_DIGIT_MARK)
        self.bytes = np.frombuffer(filled.encode(), np.uint8)
        self.keys_at = [match.start() for match in re.finditer(_KEY_MARK, filled)]
        self.digits_at = filled.index(_DIGIT_MARK)

    def __len__(self) -> int:
        return len(self.bytes)

    def fill(self, keys: np.ndarray, digits: np.ndarray) -> np.ndarray:
        """Sentences `[B, K, len]` from keys `[B, K, 6]` and digits `[B, K, 5]`."""
        out = np.broadcast_to(self.bytes, (*keys.shape[:2], len(self))).copy()
        for key_at in self.keys_at:
            out[..., key_at : key_at + KEY_LETTERS] = keys
        out[..., self.digits_at : self.digits_at + KEY_DIGITS] = digits
        return out


_NEEDLE_TEMPLATE = _Template(NEEDLE)
_QUESTION_TEMPLATE = _Template(QUESTION + ANSWER)
NEEDLE_TOKENS = len(_NEEDLE_TEMPLATE)
QUESTION_TOKENS = len(_QUESTION_TEMPLATE)


def passkey_batch(
    rng: np.random.Generator,
    corpus: np.ndarray,
    *,
    num_sequences: int,
    tokens_per_sequence: int,
    num_needles: int,
    num_questions: int,
) -> PasskeyBatch:
    """Write a batch of training sequences.

    Each sequence is a random stretch of the corpus over which `num_needles` needles are written at random
    places, followed by questions for `num_questions` of them in random order, each with its answer.

    Args:
        rng: source of all randomness; the same state gives the same batch.
        corpus: `[bytes]` uint8, the text.
        num_sequences: B.
        tokens_per_sequence: T.
        num_needles: K.
        num_questions: Q, at most K.

    Raises:
        ValueError: the needles and questions do not fit, there are more questions than needles, or the
            corpus is shorter than a sequence.
    """
    total = tokens_per_sequence + 1
    body = total - num_questions * QUESTION_TOKENS
    _check_layout(body, len(corpus), num_needles, num_questions, tokens_per_sequence)
    keys, digits = _random_keys(rng, num_sequences, num_needles)
    tokens = np.empty((num_sequences, total), np.uint8)
    starts = rng.integers(0, len(corpus) - body + 1, num_sequences)
    tokens[:, :body] = corpus[starts[:, None] + np.arange(body)]
    # sorted random offsets into the text that is left, each moved by the needles before it: no overlap
    free = rng.integers(0, body - num_needles * NEEDLE_TOKENS + 1, (num_sequences, num_needles))
    places = np.sort(free, axis=1) + np.arange(num_needles) * NEEDLE_TOKENS
    index = (places[..., None] + np.arange(NEEDLE_TOKENS)).reshape(num_sequences, -1)
    np.put_along_axis(tokens, index, _NEEDLE_TEMPLATE.fill(keys, digits).reshape(num_sequences, -1), axis=1)
    asked = rng.permuted(np.tile(np.arange(num_needles), (num_sequences, 1)), axis=1)[:, :num_questions, None]
    questions = _QUESTION_TEMPLATE.fill(
        np.take_along_axis(keys, asked, axis=1), np.take_along_axis(digits, asked, axis=1)
    )
    tokens[:, body:] = questions.reshape(num_sequences, -1)
    # labels are one ahead of the tokens
    asked_at = body - 1 + np.arange(num_questions)[:, None] * QUESTION_TOKENS
    return PasskeyBatch(
        tokens=tokens,
        answer_index=(asked_at + _QUESTION_TEMPLATE.digits_at + np.arange(KEY_DIGITS)).ravel(),
        boundaries=np.concatenate([places, np.full((num_sequences, 1), body)], axis=1),
    )


def random_key(rng: np.random.Generator) -> str:
    """Six random letters, all upper or all lower case."""
    keys, _ = _random_keys(rng, 1, 1)
    return keys.tobytes().decode()


def random_digits(rng: np.random.Generator) -> str:
    """Five random digits."""
    _, digits = _random_keys(rng, 1, 1)
    return digits.tobytes().decode()


def hide_pass_keys(text: str, count: int, seed: int) -> tuple[str, list[PassKey]]:
    """Hide pass keys between the lines of a text, spread evenly over its depth.

    Args:
        text: the document.
        count: pass keys to hide; one falls at a random line of each of `count` equal parts.
        seed: makes keys, digits and places reproducible.

    Returns:
        the text with the needles in it, and the pass keys in order of depth.

    Raises:
        ValueError: count is below 1, or the text has not at least one character per pass key.
    """
    if count < 1 or len(text) < count:
        raise ValueError(
            f"count is {count}; it must be between 1 and the text's length ({len(text)} characters)"
        )
    rng = np.random.default_rng(seed)
    pieces, hidden, previous = [], [], 0
    names: set[str] = set()
    for part in range(count):
        wanted = int((part + rng.random()) / count * len(text))
        line_end = text.find("\n", wanted)
        # a text of one long line still takes its needles, in mid-line
        place = wanted if line_end < 0 or line_end > (part + 1) / count * len(text) else line_end
        place = max(place, previous)
        key = random_key(rng)
        while key in names:
            key = random_key(rng)
        names.add(key)
        hidden.append(PassKey(key=key, digits=random_digits(rng), depth=place / len(text)))
        pieces += [text[previous:place], hidden[-1].needle]
        previous = place
    return "".join([*pieces, text[previous:]]), hidden


def parse_answer(text: str) -> str | None:
    """The five digits that an answer starts with, or None where it does not start with five digits."""
    match = re.match(rf"\s*(\d{{{KEY_DIGITS}}})(?!\d)", text)
    return match.group(1) if match else None


def _random_keys(rng: np.random.Generator, num_sequences: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys `[B, K, 6]`, each all upper or all lower case, and digits `[B, K, 5]`, as bytes."""
    case = np.where(rng.random((num_sequences, count, 1)) < 0.5, _UPPER, _LOWER)
    keys = rng.integers(0, 26, (num_sequences, count, KEY_LETTERS)) + case
    digits = rng.integers(0, 10, (num_sequences, count, KEY_DIGITS)) + _ZERO
    return keys.astype(np.uint8), digits.astype(np.uint8)


def _check_layout(body: int, corpus: int, needles: int, questions: int, tokens_per_sequence: int) -> None:
    if not 1 <= questions <= needles:
        raise ValueError(f"num_questions is {questions}; it must be between 1 and num_needles ({needles})")
    if body < needles * NEEDLE_TOKENS:
        wanted = needles * NEEDLE_TOKENS + questions * QUESTION_TOKENS
        raise ValueError(
            f"tokens_per_sequence is {tokens_per_sequence}; {needles} needles and {questions} questions "
            f"need at least {wanted}"
        )
    if corpus < body:
        raise ValueError(f"the corpus has {corpus} bytes; a sequence of {tokens_per_sequence} needs {body}")
