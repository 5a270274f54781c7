"""RULER (Hsieh et al., arXiv 2404.06654) out of lm-eval: its generators make the prompts, its functions score.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic_train.evaluation.fitting import fit_units
from ic_train.evaluation.tasks import Context, Question

RULER = "ruler"
LM_EVAL_VERSION = "0.4.13"
_PACKAGE = "lm_eval.tasks.ruler"
_PUNKT = Path(__file__).with_name("punkt")
# with fewer, a token is a byte or a letter: such a tokenizer is not one of a model of language
_FEWEST_TOKENS = 1024
# samples of a length differ by this much, as their keys and values do; the size is found once for all of them
_SLACK_TOKENS = 24
_VT_EXAMPLE_TOKENS = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What a model reads, `answered` being the start of the answer, and what its answer is to hold."""

    text: str
    answered: str
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RulerQuestion(Question):
    """A question whose context is the whole prompt; `asked` is its last sentence, for the record."""

    asked: str


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
        common = _library().common_utils
        doc = {"max_length": "here", "outputs": list(expected)}
        process = common.process_results_part if self.part else common.process_results
        share = process(doc, [answer])["here"]
        return bool(share) if len(expected) == 1 else float(share)


@dataclass(kw_only=True)
class RulerPlan:
    """How RULER's prompts are made.

    Args:
        haystack: text, for the tasks that lm-eval fills with essays.
        tokenizer: the model's.
        num_questions: per task and length.
        seed: of all samples.
        special_tokens: whether prompts start as the tokenizer starts a text; as lm-eval does it.
        data: files of SQuAD and HotpotQA by "squad" and "hotpot".
    """

    haystack: str
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
        vt = _library().vt_utils
        # it prints its search
        with _seeded(f"{self.seed}/ruler_vt"), contextlib.redirect_stdout(io.StringIO()):
            (example,) = vt.sys_vartrack_w_noise_random(
                tokenizer=self.tokenizer, num_samples=1, max_seq_length=_VT_EXAMPLE_TOKENS, incremental=5
            )
        return f"{example['input']} {' '.join(example['outputs'])}\n\n"

    def questions(self, name: str) -> tuple[list[dict[str, Any]], list[str]]:
        """Questions and documents of SQuAD or HotpotQA, read by lm-eval."""
        if name in self._questions:
            return self._questions[name]
        qa, path = _library().qa_utils, self.data[name]
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
    library = _library()
    return {
        "lm_eval": LM_EVAL_VERSION,
        "sentences": library.sentences,
        "special_tokens": plan.special_tokens,
        **{name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in plan.data.items()},
    }


def ruler_suites(names: Sequence[str], data: dict[str, Path]) -> list[str]:
    """Suites with `ruler` replaced by all its tasks for which the data is there.

    Args:
        names: of suites.
        data: files by option.

    Raises:
        ValueError: a task needs a file that was not given, or does not exist.
    """
    for option, path in data.items():
        if not path.is_file():
            raise ValueError(f"--{option} is {str(path)!r}, which does not exist")
    chosen: list[str] = []
    for name in names:
        own = [task.name for task in RULER_TASKS.values() if task.data is None or task.data in data]
        chosen += own if name == RULER else [name]
        task = RULER_TASKS.get(name)
        if task and task.data and task.data not in data:
            raise ValueError(
                f"--suite has {name}; give its data as --{task.data} FILE ({RULER_FILES[task.data]})"
            )
    used = {RULER_TASKS[name].data for name in chosen if name in RULER_TASKS}
    if idle := [option for option in data if option not in used]:
        raise ValueError(f"--{idle[0]} is given; it has no effect without --suite {RULER}")
    return list(dict.fromkeys(chosen))


def left_out(names: Sequence[str], data: dict[str, Path]) -> str:
    """What `ruler` in a list of suites does not ask, and what it needs; empty where nothing is left out."""
    missing = [task for task in RULER_TASKS.values() if task.data and task.data not in data]
    if RULER not in names or not missing:
        return ""
    parts = [f"{task.name} (--{task.data} FILE: {RULER_FILES[task.data or '']})" for task in missing]
    return f"not asked, for want of data: {', '.join(parts)}\n"


def ruler_ids(task: RulerTask, plan: RulerPlan, context_tokens: int) -> list[str]:
    """The ids of a task's samples at a length."""
    return [f"{task.name}-{context_tokens}-{number}" for number in range(plan.num_questions)]


def ruler_contexts(
    task: RulerTask, plan: RulerPlan, context_tokens: int, wanted: Callable[[str], bool]
) -> Iterator[Context]:
    """The wanted samples of a task, made one at a time: a context with one question each.

    Args:
        task: one of RULER_TASKS.
        plan: the run's.
        context_tokens: length of each prompt with its answer.
        wanted: whether the sample of an id is to be asked.

    Raises:
        ValueError: a sample does not fit; `check_ruler` finds lengths that none does.
    """
    units: tuple[int, float] | None = None
    for number, name in enumerate(ruler_ids(task, plan, context_tokens)):
        if not wanted(name):
            continue
        if units is None:
            # by the first sample, whichever is the first that is wanted: an interrupted run goes on with this size
            units = fit_units(
                lambda count: len(_made(task, plan, context_tokens, 0, count)[1]),
                goal_tokens=context_tokens - task.answer_tokens - _SLACK_TOKENS,
                least=task.least,
                most=task.most(plan),
            )
            # it holds the texts of all sizes
            _library().prepare_niah.cached_sent_tokenize.cache_clear()
        yield _sample(task, plan, context_tokens, number, *units)


def check_ruler(plan: RulerPlan, names: Iterable[str], lengths_tokens: Sequence[int]) -> None:
    """Refuse what cannot be asked, before anything is.

    Args:
        plan: the run's.
        names: of suites; those that are not of RULER are passed over.
        lengths_tokens: contexts with their answers.

    Raises:
        ValueError: lm-eval is not there; a length has no room for a task, or a task not enough text for a length;
            there are fewer questions than asked for.
    """
    for task in (RULER_TASKS[name] for name in names if name in RULER_TASKS):
        if task.data and len(plan.questions(task.data)[0]) < plan.num_questions:
            count = len(plan.questions(task.data)[0])
            raise ValueError(f"--questions is {plan.num_questions}; --{task.data} has {count} of them")
        most = task.most(plan)
        for tokens in lengths_tokens:
            around = task.answer_tokens + _SLACK_TOKENS
            shortest = len(_made(task, plan, tokens, 0, task.least)[1]) + around
            longest = len(_made(task, plan, tokens, 0, most)[1]) + around if most else tokens
            if not shortest <= tokens <= longest:
                raise ValueError(
                    f"--lengths has {tokens}; {task.name} with this model takes from {shortest} "
                    f"{f'to {longest}' if most else 'on'}: leave out the length, or the task"
                )


def _made(
    task: RulerTask, plan: RulerPlan, context_tokens: int, number: int, units: int
) -> tuple[Prompt, list[int]]:
    """A sample with so many units, and its token ids."""
    with _seeded(f"{plan.seed}/{task.name}/{context_tokens}/{number}"):
        prompt = task.build(plan, context_tokens, units, number)
    return prompt, plan.ids(prompt.text + task.delimiter + prompt.answered)


def _sample(
    task: RulerTask, plan: RulerPlan, context_tokens: int, number: int, units: int, tokens_per_unit: float
) -> Context:
    """One sample, with fewer units where it is too long."""
    name, limit = ruler_ids(task, plan, context_tokens)[number], context_tokens - task.answer_tokens
    prompt, ids = _made(task, plan, context_tokens, number, units)
    while len(ids) > limit:
        if units <= task.least:
            raise ValueError(
                f"--lengths has {context_tokens}; {name} alone needs {len(ids) + task.answer_tokens}"
            )
        units = max(task.least, units - math.ceil((len(ids) - limit) / tokens_per_unit))
        prompt, ids = _made(task, plan, context_tokens, number, units)
    only = prompt.outputs[0] if len(prompt.outputs) == 1 else None
    asked = RulerQuestion(
        id=name,
        text="",
        asked=f"{prompt.text.rsplit(chr(10), 1)[-1].strip()}{task.delimiter}{prompt.answered}",
        expected=prompt.outputs,
        depth=round(prompt.text.index(only) / len(prompt.text), 4) if only and not task.data else None,
        quote="\n".join(_quotes(prompt)),
        max_tokens=task.answer_tokens,
    )
    return Context(token_ids=ids, questions=[asked])


def _niah(
    haystack: str, keys: str = "words", values: str = "numbers", *, k: int = 1, v: int = 1, q: int = 1
) -> dict[str, Any]:
    """A task of the needle family: lm-eval's arguments of it."""

    def build(plan: RulerPlan, context_tokens: int, units: int, number: int) -> Prompt:
        library = _library()
        text: Any = library.prepare_niah.get_haystack(haystack) if haystack != "essay" else plan.words
        if haystack == "essay" and units > len(text):
            text = text * math.ceil(units / len(text))
        made, outputs, query = library.prepare_niah.generate_input_output(
            units,
            text,
            type_haystack=haystack,
            num_needle_k=max(k, q),
            type_needle_k=keys,
            num_needle_v=v,
            type_needle_v=values,
            template=library.niah_utils.TEMPLATE,
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
    vt = _library().vt_utils
    text, outputs = vt.generate_input_output(units, 1, 4, is_icl=False)
    text = f"{vt.randomize_icl(plan.vt_example)}\n\n{text}"
    start = text.rfind(" Answer: According to the chain(s) of variable assignment")
    return Prompt(text=text[:start], answered=text[start:].strip(), outputs=tuple(outputs))


def _cwe(plan: RulerPlan, context_tokens: int, units: int, number: int) -> Prompt:
    cwe = _library().cwe_utils
    _, text, outputs = cwe.generate_input_output(units, context_tokens)
    start = cwe.CONFIG["answer_prefix"]
    return Prompt(text=text[: text.rfind(start)].strip(), answered=start.strip(), outputs=tuple(outputs))


def _fwe(plan: RulerPlan, context_tokens: int, units: int, number: int) -> Prompt:
    fwe = _library().fwe_utils
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
        text, outputs = _library().qa_utils.generate_input_output(number, units, questions, documents)
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
            most=lambda plan: len(_library().cwe_utils.WORDS),
            answer_tokens=120,
            delimiter="\n\n",
        ),
        RulerTask(name="ruler_fwe", build=_fwe, least=50, most=lambda plan: None, answer_tokens=50),
        _qa_task("ruler_qa_squad", "squad"),
        _qa_task("ruler_qa_hotpot", "hotpot"),
    )
}


def _quotes(prompt: Prompt) -> list[str]:
    """The needles and assignments that hold the answer; tasks that count words, and documents, have none."""
    wanted = "|".join(map(re.escape, prompt.outputs))
    needles = re.findall(rf"One of the special magic \w+ for \S+ is: (?:{wanted})\.", prompt.text)
    return needles or re.findall(rf"VAR (?:{wanted}) = (?:VAR )?\w+", prompt.text)


@contextlib.contextmanager
def _seeded(seed: str) -> Iterator[None]:
    """The generators that lm-eval draws from, which are global, start at a seed; then they are as they were."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4])
    cwe = _library().cwe_utils.RNG
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
def _library() -> SimpleNamespace:
    """lm-eval's modules of RULER.

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
