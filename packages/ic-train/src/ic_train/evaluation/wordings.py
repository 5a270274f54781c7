"""How facts, questions and answers about them are written: templates, one set per kind of model."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic_train.data.passkey import NEEDLE, QUESTION, random_key

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
# words, since the first whole number of an answer has to be the value
_NUMBERS = ("One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")
# in no tokenizer fewer tokens than a real one
LONGEST_NAME = "Zqxjvw Seven"
_CONTENT = "CONTENT-OF-THE-MESSAGE"


def _word_name(rng: np.random.Generator) -> str:
    """Three syllables and a number, as "Kelora Seven"."""
    letters = [rng.choice(list(part)) for part in (_CONSONANTS, _VOWELS) * 3]
    return f"{''.join(letters).capitalize()} {rng.choice(_NUMBERS)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Wording:
    """Templates; `{key}` is a name, `{digits}` its number, `{quote}` a sentence of the document.

    Args:
        name: for records.
        before: what precedes the document.
        needle: states a value.
        correction: states the value that counts from there on; `{old}` is the one before it.
        question: follows the document directly, and ends where the answer starts.
        answer: right after the question; it starts with the number.
        no_answer: the answer where the document has none.
        answer_tokens: most tokens of an answer without its quote.
        stop: where the answer of a model is over, whatever it goes on with.
        new_name: draws a name.
    """

    name: str
    before: str
    needle: str
    correction: str
    question: str
    answer: str
    no_answer: str
    answer_tokens: int
    stop: str
    new_name: Callable[[np.random.Generator], str]

    def first_answer(self, text: str) -> str:
        """What a model said up to `stop`, ended as a right answer is."""
        said, found, _ = text.partition(self.stop)
        return said + self.answer[len(self.answer.rstrip()) :] if found else text

    def reserved_tokens(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Most tokens of a question and its answer without a quote."""
        question = self.question.format(key=LONGEST_NAME)
        return len(tokenizer(question, add_special_tokens=False)["input_ids"]) + self.answer_tokens


# ic-nano's, which base models can complete as well
DIALECT = Wording(
    name="dialect",
    before="",
    needle=NEEDLE,
    correction="\nCorrection: The pass key for {key} is {digits}.\n",
    question=QUESTION,
    answer=" {digits}.\n{quote}\n",
    no_answer=" not in the document.\n",
    answer_tokens=24,
    stop="\n",
    new_name=random_key,
)
# of models that follow instructions
PLAIN = Wording(
    name="plain",
    before="Read the document. A question about it follows at its end.\n\n",
    needle="\nThe pass key for {key} is {digits}.\n",
    correction="\nCorrection: the pass key for {key} is no longer {old}; it is {digits}.\n",
    question=(
        "\n\nQuestion: what is the pass key for {key}? Where the document corrects it, the last correction "
        "counts. Begin with the pass key itself; if the document does not state it, say that it is not in the "
        "document."
    ),
    answer='{digits}. The document says: "{quote}"',
    no_answer="The pass key for that name is not in the document.",
    answer_tokens=48,
    stop="\n\n",
    new_name=_word_name,
)


def wording_for(tokenizer: PreTrainedTokenizerBase) -> Wording:
    """PLAIN inside of the tokenizer's chat template where it has one, else DIALECT.

    Raises:
        ValueError: the chat template does not show a message's text.
    """
    if not tokenizer.chat_template:
        return DIALECT
    message = [{"role": "user", "content": _CONTENT}]
    shown = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, found, after = str(shown).partition(_CONTENT)
    if not found:
        raise ValueError("the tokenizer's chat template does not show the text of a user's message")
    after = after.replace("{", "{{").replace("}", "}}")
    return replace(
        PLAIN, name="plain, chat template", before=before + PLAIN.before, question=PLAIN.question + after
    )


def near_duplicate(name: str, rng: np.random.Generator) -> str:
    """A name that differs by one letter, by two exchanged syllables, or by its number."""
    word, *number = name.split(" ")
    edit = int(rng.integers(3 if number else 2))
    if edit == 2:
        return f"{word} {rng.choice(_NUMBERS)}"
    letters = list(word)
    if edit == 0:
        place = int(rng.integers(len(letters)))
        pool = string.ascii_lowercase
        if number:
            # words of syllables stay words
            pool = _VOWELS if letters[place] in _VOWELS else _CONSONANTS
        new = str(rng.choice(list(pool)))
        letters[place] = new.upper() if letters[place].isupper() else new
    else:
        first, second = sorted(rng.choice(len(letters) // 2, 2, replace=False))
        syllables = ["".join(letters[start : start + 2]) for start in range(0, len(letters), 2)]
        syllables[first], syllables[second] = syllables[second], syllables[first]
        changed = "".join(syllables)
        letters = list(changed.capitalize() if word.istitle() else changed)
    return " ".join(["".join(letters), *number])


def is_held_out(name: str) -> bool:
    """Whether a name is for evaluation: one half of all names is, and training never sees it."""
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 0
