"""RULER's tasks (Hsieh et al., arXiv 2404.06654) out of lm-eval: its generators make prompts, its functions score.

The only file that touches lm-eval. Three things are done otherwise than its own loop does them, because that loop
reads from the network and sizes contexts in quadratic time: the sentence splitter's parameters and the haystack
are files, a context's size is found by two short measurements and a straight line, and each sample has a seed of
its own, so that an interrupted run makes only what is missing. `tests/test_ruler.py` holds every prompt to what
lm-eval's own loop makes of the same random numbers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

RULER = "ruler"
LM_EVAL_VERSION = "0.4.13"
_PACKAGE = "lm_eval.tasks.ruler"
_PUNKT = Path(__file__).with_name("punkt")
# with fewer, a token is a byte or a letter: such a tokenizer is not one of a model of language
_FEWEST_TOKENS = 1024
_VT_EXAMPLE_TOKENS = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What a model reads, `answered` being the start of the answer, and what its answer is to hold."""

    text: str
    answered: str
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RulerTask:
    """A task of RULER under lm-eval's name.

    Args:
        name: lm-eval's.
        build: a prompt of so many units for a sample of a length in tokens.
        least: units that are needed at least.
        most: units that there are; None for any number.
        answer_tokens: of the answer.
        delimiter: between the question and the start of the answer.
        data: option whose file it needs, "squad" or "hotpot"; None for none.
        part: whether lm-eval scores by `process_results_part`.
    """

    name: str
    build: Callable[[RulerPlan, int, int, int], Prompt]
    least: int
    most: Callable[[RulerPlan], int | None]
    answer_tokens: int
    delimiter: str = " "
    data: str | None = None
    part: bool = False

    def score(self, answer: str, expected: tuple[str, ...]) -> bool | float:
        """lm-eval's score: whether the only expected text is found, or the share of several."""
        common = library().common_utils
        doc = {"max_length": "here", "outputs": list(expected)}
        process = common.process_results_part if self.part else common.process_results
        share = process(doc, [answer])["here"]
        return bool(share) if len(expected) == 1 else float(share)


@dataclass(kw_only=True)
class RulerPlan:
    """How RULER's prompts are made.

    Args:
        haystack: text, for the tasks that lm-eval fills with essays.
        haystack_name: for reports.
        tokenizer: the model's.
        num_questions: per task and length.
        seed: of all samples.
        special_tokens: whether prompts start as the tokenizer starts a text; as lm-eval does it.
        data: files of SQuAD and HotpotQA by "squad" and "hotpot".
    """

    haystack: str
    haystack_name: str
    tokenizer: PreTrainedTokenizerBase
    num_questions: int
    seed: int
    special_tokens: bool = True
    data: dict[str, Path] = field(default_factory=dict)
    _questions: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.tokenizer) < _FEWEST_TOKENS:
            raise ValueError(
                f"--suite has {RULER}, and the model's tokenizer has {len(self.tokenizer)} tokens: RULER asks in "
                f"English and needs a model of language with at least {_FEWEST_TOKENS}. ic-nano knows bytes, and "
                "the words of niah only"
            )

    def ids(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        # a haystack about language models spells out their end of text, which stays text
        ids = self.tokenizer(
            text, add_special_tokens=self.special_tokens, split_special_tokens=True, verbose=False
        )
        return ids["input_ids"]

    @functools.cached_property
    def words(self) -> list[str]:
        """The haystack's words, as lm-eval cuts them."""
        return re.sub(r"\s+", " ", self.haystack).split(" ")

    @functools.cached_property
    def vt_example(self) -> str:
        """The solved example that stands before every question of `ruler_vt`."""
        vt = library().vt_utils
        # it prints its search
        with seeded(f"{self.seed}/ruler_vt"), contextlib.redirect_stdout(io.StringIO()):
            (example,) = vt.sys_vartrack_w_noise_random(
                tokenizer=self.tokenizer, num_samples=1, max_seq_length=_VT_EXAMPLE_TOKENS, incremental=5
            )
        return f"{example['input']} {' '.join(example['outputs'])}\n\n"

    def questions(self, name: str) -> tuple[list[dict[str, Any]], list[str]]:
        """Questions and documents of SQuAD or HotpotQA, read by lm-eval."""
        if name in self._questions:
            return self._questions[name]
        qa, path = library().qa_utils, self.data[name]
        read = qa.read_squad if name == "squad" else qa.read_hotpotqa
        fetch = qa.download_json
        # it knows addresses only
        qa.download_json = lambda url: json.loads(Path(url).read_text())
        try:
            found = read(str(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--{name} is {str(path)!r}, which lm-eval cannot read: {error!r}") from None
        finally:
            qa.download_json = fetch
        if not found[0]:
            raise ValueError(f"--{name} is {str(path)!r}, which has no question with an answer")
        self._questions[name] = found
        return found


def ruler_settings(plan: RulerPlan) -> dict[str, Any]:
    """What decides RULER's prompts and is not in the settings of a run already.

    Raises:
        ValueError: lm-eval is not there, or is another release.
    """
    return {
        "lm_eval": LM_EVAL_VERSION,
        "sentences": library().sentences,
        "special_tokens": plan.special_tokens,
    }


def _niah(
    haystack: str, keys: str = "words", values: str = "numbers", *, k: int = 1, v: int = 1, q: int = 1
) -> dict[str, Any]:
    """A task of the needle family: lm-eval's arguments of it."""

    def build(plan: RulerPlan, context_tokens: int, units: int, number: int) -> Prompt:
        niah = library().prepare_niah
        text: Any = niah.get_haystack(haystack) if haystack != "essay" else plan.words
        if haystack == "essay" and units > len(text):
            text = text * math.ceil(units / len(text))
        made, outputs, query = niah.generate_input_output(
            units,
            text,
            type_haystack=haystack,
            num_needle_k=max(k, q),
            type_needle_k=keys,
            num_needle_v=v,
            type_needle_v=values,
            template=library().niah_utils.TEMPLATE,
            num_needle_q=q,
        )
        one = q * v == 1
        answered = (
            f"The special magic {values[:-1] if one else values} for {query} mentioned in the provided text "
            f"{'is' if one else 'are'}"
        )
        return Prompt(text=made, answered=answered, outputs=tuple(outputs))

    # a needle goes between two units; a text of essays is cut into sentences first
    least = 40 if haystack == "essay" else max(k, q) * v
    return {"build": build, "least": least, "most": lambda plan: None, "answer_tokens": 128}


def _vt(plan: RulerPlan, context_tokens: int, units: int, number: int) -> Prompt:
    vt = library().vt_utils
    text, outputs = vt.generate_input_output(units, 1, 4, is_icl=False)
    text = f"{vt.randomize_icl(plan.vt_example)}\n\n{text}"
    start = text.rfind(" Answer: According to the chain(s) of variable assignment")
    return Prompt(text=text[:start], answered=text[start:].strip(), outputs=tuple(outputs))


def _cwe(plan: RulerPlan, context_tokens: int, units: int, number: int) -> Prompt:
    cwe = library().cwe_utils
    _, text, outputs = cwe.generate_input_output(units, context_tokens)
    start = cwe.CONFIG["answer_prefix"]
    return Prompt(text=text[: text.rfind(start)].strip(), answered=start.strip(), outputs=tuple(outputs))


def _fwe(plan: RulerPlan, context_tokens: int, units: int, number: int) -> Prompt:
    fwe = library().fwe_utils
    text, outputs, _ = fwe.generate_input_output(
        sys.maxsize, plan.tokenizer, num_words=units, vocab_size=context_tokens // 50
    )
    start = fwe.CONFIG["answer_prefix"]
    return Prompt(text=text[: text.rfind(start)].strip(), answered=start.strip(), outputs=tuple(outputs))


def _qa(name: str) -> Callable[[RulerPlan, int, int, int], Prompt]:
    def build(plan: RulerPlan, context_tokens: int, units: int, number: int) -> Prompt:
        questions, documents = plan.questions(name)
        # the documents that hold the answer are never left out
        units = max(units, len(questions[number]["context"]))
        text, outputs = library().qa_utils.generate_input_output(number, units, questions, documents)
        return Prompt(text=text, answered="Answer:", outputs=tuple(outputs))

    return build


def _qa_task(name: str, option: str) -> RulerTask:
    return RulerTask(
        name=name,
        build=_qa(option),
        least=1,
        most=lambda plan: len(plan.questions(option)[1]),
        answer_tokens=32,
        data=option,
        part=True,
    )


RULER_FILES = {
    "squad": "SQuAD 2.0, dev-v2.0.json",
    "hotpot": "HotpotQA, hotpot_dev_distractor_v1.json",
}
RULER_TASKS = {
    task.name: task
    for task in (
        RulerTask(name="niah_single_1", **_niah("repeat")),
        RulerTask(name="niah_single_2", **_niah("essay")),
        RulerTask(name="niah_single_3", **_niah("essay", values="uuids")),
        RulerTask(name="niah_multikey_1", **_niah("essay", k=4)),
        RulerTask(name="niah_multikey_2", **_niah("needle")),
        RulerTask(name="niah_multikey_3", **_niah("needle", "uuids", "uuids")),
        RulerTask(name="niah_multiquery", **_niah("essay", q=4)),
        RulerTask(name="niah_multivalue", **_niah("essay", v=4)),
        RulerTask(name="ruler_vt", build=_vt, least=10, most=lambda plan: None, answer_tokens=30),
        RulerTask(
            name="ruler_cwe",
            build=_cwe,
            least=20,
            most=lambda plan: len(library().cwe_utils.WORDS),
            answer_tokens=120,
            delimiter="\n\n",
        ),
        RulerTask(name="ruler_fwe", build=_fwe, least=50, most=lambda plan: None, answer_tokens=50),
        _qa_task("ruler_qa_squad", "squad"),
        _qa_task("ruler_qa_hotpot", "hotpot"),
    )
}


@contextlib.contextmanager
def seeded(seed: str) -> Iterator[None]:
    """The generators that lm-eval draws from, which are global, start at a seed, and are as before afterwards."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4])
    cwe = library().cwe_utils.RNG
    states = random.getstate(), np.random.get_state(), cwe.getstate()
    random.seed(number)
    np.random.seed(number)
    cwe.seed(number)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        cwe.setstate(states[2])


@functools.cache
def library() -> SimpleNamespace:
    """lm-eval's modules of RULER by name, and as `sentences` how texts are cut into sentences.

    Raises:
        ValueError: it is not there, or another release, whose generators this file was not held to.
    """
    try:
        version = metadata.version("lm_eval")
        nltk = import_module("nltk")
    except (metadata.PackageNotFoundError, ImportError):
        raise ValueError(f"--suite has {RULER}, which needs lm-eval: pip install 'ic-train[ruler]'") from None
    if version != LM_EVAL_VERSION:
        raise ValueError(
            f"lm_eval is {version}; {RULER} is held to {LM_EVAL_VERSION}: pip install 'ic-train[ruler]'"
        )
    try:
        nltk.data.find("tokenizers/punkt_tab/english")
        sentences = "punkt"
    except LookupError:
        # lm-eval downloads what it does not find when it is imported
        nltk.data.path.append(str(_PUNKT))
        sentences = "punkt without parameters"
    names = ("common_utils", "prepare_niah", "niah_utils", "vt_utils", "cwe_utils", "fwe_utils", "qa_utils")
    modules = {name: import_module(f"{_PACKAGE}.{name}") for name in names}
    return SimpleNamespace(sentences=sentences, **modules)
