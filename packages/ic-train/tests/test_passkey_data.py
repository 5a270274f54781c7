"""The vectorised batches are what a reader would write by hand, and answers can be told from the text alone."""

import re

import numpy as np
import pytest

from ic_train.data.passkey import (
    ANSWER,
    KEY_DIGITS,
    NEEDLE,
    NEEDLE_TOKENS,
    QUESTION,
    QUESTION_TOKENS,
    hide_pass_keys,
    parse_answer,
    passkey_batch,
    random_digits,
    random_key,
)

TEXT = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 300, np.uint8)


def batch(seed: int = 0, **changes: int):
    layout = {"num_sequences": 16, "tokens_per_sequence": 900, "num_needles": 7, "num_questions": 4}
    return passkey_batch(np.random.default_rng(seed), TEXT, **(layout | changes))


def test_lengths_are_those_of_the_sentences() -> None:
    assert len(NEEDLE.format(key="abcdef", digits="01234")) == NEEDLE_TOKENS
    assert len((QUESTION + ANSWER).format(key="abcdef", digits="01234")) == QUESTION_TOKENS


def test_every_question_is_answered_by_the_needle_of_its_key() -> None:
    for tokens in batch().tokens:
        text = tokens.tobytes().decode()
        needles = dict(re.findall(r"\nThe pass key for (\w{6}) is (\d{5})\.\n", text))
        asked = re.findall(
            r"\nQuestion: pass key for (\w{6})\? Answer: The pass key for (\w{6}) is (\d{5})\.\n", text
        )
        assert len(needles) == 7
        assert len({key for key, _, _ in asked}) == 4
        assert all(key == repeated and needles[key] == digits for key, repeated, digits in asked)
        assert all(key.isupper() or key.islower() for key in needles)


def test_answer_index_points_at_the_digits_among_the_labels() -> None:
    made = batch()
    labels = made.tokens[:, 1:]
    for row in labels:
        digits = row[made.answer_index].tobytes().decode()
        text = row.tobytes().decode()
        assert digits == "".join(re.findall(r"Answer: The pass key for \w{6} is (\d{5})", text))


def test_boundaries_are_where_needles_and_questions_start() -> None:
    made = batch()
    for tokens, boundaries in zip(made.tokens, made.boundaries, strict=True):
        text = tokens.tobytes().decode()
        starts = [match.start() for match in re.finditer(r"\nThe pass key for \w{6} is \d{5}\.\n", text)]
        assert boundaries[:-1].tolist() == starts
        assert text[boundaries[-1] :].startswith("\nQuestion: ")


def test_same_seed_same_batch_and_another_seed_another() -> None:
    assert np.array_equal(batch(3).tokens, batch(3).tokens)
    assert not np.array_equal(batch(3).tokens, batch(4).tokens)


def test_needles_fill_the_whole_depth() -> None:
    starts = np.concatenate([batch(seed, num_sequences=64).boundaries[:, :-1].ravel() for seed in range(8)])
    body = 901 - 4 * QUESTION_TOKENS
    shares = np.histogram(starts / (body - NEEDLE_TOKENS), bins=4, range=(0, 1))[0] / len(starts)
    assert shares == pytest.approx([0.25] * 4, abs=0.05)


def test_needles_that_exactly_fit_are_accepted_and_one_more_is_not() -> None:
    exact = 7 * NEEDLE_TOKENS + 4 * QUESTION_TOKENS
    made = batch(tokens_per_sequence=exact - 1)
    assert made.tokens.shape == (16, exact)
    with pytest.raises(ValueError, match=rf"tokens_per_sequence is {exact - 2}; 7 needles and 4 questions"):
        batch(tokens_per_sequence=exact - 2)


def test_more_questions_than_needles_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_questions is 8; it must be between 1 and num_needles \(7\)"):
        batch(num_questions=8)


def test_a_corpus_shorter_than_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="the corpus has 13500 bytes"):
        batch(tokens_per_sequence=20_000)


def test_hidden_keys_stand_in_order_between_lines_and_the_text_survives() -> None:
    text = "".join(f"line {number}\n" for number in range(500))
    hidden, keys = hide_pass_keys(text, 20, seed=5)
    assert re.sub(r"\nThe pass key for \w{6} is \d{5}\.\n", "", hidden) == text
    assert [key.depth for key in keys] == sorted(key.depth for key in keys)
    for part, key in enumerate(keys):
        assert part / 20 <= key.depth <= (part + 1) / 20
        assert hidden.count(key.needle) == 1
    # a needle starts where a line ends
    assert all(before == "" or re.fullmatch(r"line \d+", before) for before in _lines_before(hidden))


def _lines_before(hidden: str) -> list[str]:
    lines = hidden.split("\n")
    return [lines[number - 1] for number, line in enumerate(lines) if line.startswith("The pass key")]


def test_a_text_of_one_long_line_takes_its_keys_too() -> None:
    hidden, keys = hide_pass_keys("x" * 1000, 4, seed=0)
    assert len(keys) == 4
    assert all(key.needle in hidden for key in keys)


@pytest.mark.parametrize("count", [0, 11])
def test_an_impossible_number_of_keys_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"count is {count}; it must be between 1 and"):
        hide_pass_keys("0123456789", count, seed=0)


def test_random_keys_and_digits_have_the_written_form() -> None:
    rng = np.random.default_rng(0)
    assert re.fullmatch(r"[A-Z]{6}|[a-z]{6}", random_key(rng))
    assert re.fullmatch(rf"\d{{{KEY_DIGITS}}}", random_digits(rng))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" 01234.\n", "01234"),
        ("01234", "01234"),
        (" 012345", None),
        (" 0123", None),
        ("", None),
        (" the 01234", None),
        ("\n98765 and more", "98765"),
    ],
)
def test_parse_answer(answer: str, expected: str | None) -> None:
    assert parse_answer(answer) == expected
