"""Hard retrieval sets: what contexts hold, what is asked, what counts as right, for bytes and for chat models."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from ic_model import checkpoint_path
from ic_model.byte_tokenizer import build_byte_tokenizer
from openai_server import ScriptedServer, reader
from preference_pairs import stated
from smollm2_tokenizer import smollm2_tokenizer
from transformers import PreTrainedTokenizerBase

from ic_train import cli
from ic_train.evaluation.hard_sets import FAMILY, KINDS, HardContext, build_context, short_context
from ic_train.evaluation.haystack import load_haystack
from ic_train.evaluation.records import read_records
from ic_train.evaluation.tasks import TASKS, Plan, contexts, only_states_absence
from ic_train.evaluation.wordings import DIALECT, PLAIN, is_held_out, near_duplicate, wording_for

BYTES = build_byte_tokenizer()
HARD = ("distractors", "corrections", "absent")
TOKENIZERS = {"bytes": lambda: BYTES, "smollm2": smollm2_tokenizer}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return TOKENIZERS[request.param]()


def build(tokenizer: PreTrainedTokenizerBase, kind: str, number: int = 0, **fields) -> HardContext:
    chosen = {"context_tokens": 3000, "count": 6, "seed": 5, "held_out": True, **fields}
    if kind == "single":
        chosen["count"] = 1
    wording = wording_for(tokenizer)
    return build_context(kind, load_haystack("jargon"), tokenizer, wording, number=number, **chosen)


def edit(one: str, other: str) -> str | None:
    """How two names differ, if by little."""
    (word, _, number), (other_word, _, other_number) = one.partition(" "), other.partition(" ")
    if number != other_number:
        return "number" if word == other_word else None
    if sum(a != b for a, b in zip(word, other_word, strict=True)) == 1:
        return "letter"
    syllables = [sorted(re.findall("..", name.lower())) for name in (word, other_word)]
    return "syllables" if syllables[0] == syllables[1] else None


def test_near_duplicates_differ_by_a_letter_by_syllables_or_by_the_number() -> None:
    rng = np.random.default_rng(0)
    for wording in (DIALECT, PLAIN):
        kinds = set()
        for _ in range(400):
            name = wording.new_name(rng)
            near = near_duplicate(name, rng)
            if near != name:
                assert (name.istitle(), name.isupper()) == (near.istitle(), near.isupper())
                kinds.add(edit(name, near))
        assert kinds == ({"letter", "syllables"} if wording is DIALECT else {"letter", "syllables", "number"})


def test_a_models_answer_is_over_where_right_answers_are() -> None:
    assert DIALECT.first_answer(" 12345.\n\ndef size(") == " 12345.\n"
    assert DIALECT.first_answer(" 12345") == " 12345"
    assert PLAIN.first_answer("It is 1.\nNo, 2.\n\nThe pass key for") == "It is 1.\nNo, 2."
    assert PLAIN.first_answer("It is 1.") == "It is 1."


def test_half_of_the_names_are_held_out_and_training_never_draws_them() -> None:
    sides: dict[bool, set[str]] = {True: set(), False: set()}
    for held_out, names in sides.items():
        for number in range(6):
            for kind in KINDS:
                for asked in build(BYTES, kind, number, held_out=held_out, context_tokens=1500).asked:
                    names |= {asked.key, *(fact.key for fact in asked.facts)}
    assert all(map(is_held_out, sides[True]))
    assert not any(map(is_held_out, sides[False]))
    assert min(map(len, sides.values())) > 150
    drawn = [is_held_out(DIALECT.new_name(rng)) for rng in [np.random.default_rng(1)] for _ in range(2000)]
    assert 0.46 < sum(drawn) / 2000 < 0.54


def test_training_has_values_that_start_with_0_and_evaluation_none() -> None:
    # ic-nano learnt from pairs without them that such a number is not in the document
    for held_out in (True, False):
        facts = [
            fact
            for number in range(20)
            for fact in build(BYTES, "multi", number, held_out=held_out, context_tokens=1500).facts
        ]
        share = sum(fact.value[0] == "0" for fact in facts) / len(facts)
        assert share == 0 if held_out else 0.03 < share < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_says_what_its_questions_are_about(tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    for number in range(3):
        made = build(tokenizer, kind, number)
        # words that a tokenizer joins over a needle's ends may leave a few tokens
        assert 3000 - 12 <= len(made.token_ids) <= 3000
        text = tokenizer.decode(made.token_ids)
        assert len(made.asked) == (1 if kind == "single" else 6)
        assert len({asked.key for asked in made.asked}) == len(made.asked)
        assert len({fact.value for fact in made.facts}) == len(made.facts)
        assert {fact for asked in made.asked for fact in asked.facts} <= set(made.facts)
        for asked in made.asked:
            for fact in asked.facts:
                assert text.count(fact.sentence.strip()) == 1
                place = text.index(fact.sentence.strip()) / len(text)
                assert made.depths[fact.slot] == pytest.approx(place, abs=0.12)
            if kind == "absent":
                assert asked.fact is None and made.depth(asked) is None
                assert asked.key not in text
                assert len(asked.others) == FAMILY
                assert edit(asked.others[0].key, asked.key)
            else:
                assert stated(text, asked.key)[-1] == asked.fact.value
                assert len(stated(text, asked.key)) == (2 if kind == "corrections" else 1)
                assert made.depth(asked) == round(made.depths[asked.fact.slot], 4)
            if kind == "corrections":
                assert stated(text, asked.key)[0] == asked.outdated.value
            if kind == "distractors":
                assert len(asked.others) == FAMILY - 1
                family = [asked.key, *(other.key for other in asked.others)]
                assert any(all(edit(first, near) for near in family if near != first) for first in family)


def test_another_number_gives_another_context_and_the_same_gives_the_same() -> None:
    first, again, other = (build(BYTES, "distractors", number) for number in (4, 4, 5))
    assert first == again
    assert not {one.key for one in first.asked} & {one.key for one in other.asked}
    assert first.token_ids[:100] != other.token_ids[:100]


def test_a_single_fact_goes_through_all_depths() -> None:
    depths = [made.depth(made.asked[0]) for made in (build(BYTES, "single", number) for number in range(20))]
    assert sorted(int(depth * 10) for depth in depths) == sorted([*range(10), *range(10)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_short_context_holds_what_matters_in_the_same_order(
    tokenizer: PreTrainedTokenizerBase, kind: str
) -> None:
    made = build(tokenizer, kind)
    asked = made.asked[0]
    haystack, wording = load_haystack("jargon"), wording_for(tokenizer)
    ids = short_context(asked, haystack, tokenizer, wording, context_tokens=600, seed=2)
    assert 588 <= len(ids) <= 600
    text, whole = tokenizer.decode(ids), tokenizer.decode(made.token_ids)
    sentences = [fact.sentence.strip() for fact in asked.facts]
    assert sentences == sorted(sentences, key=text.index) == sorted(sentences, key=whole.index)
    assert stated(text, asked.key) == stated(whole, asked.key)
    with pytest.raises(
        ValueError, match=r"context_tokens is 20; what is hidden there alone needs \d+ tokens"
    ):
        short_context(asked, haystack, tokenizer, wording, context_tokens=20, seed=2)


def test_control_tokens_that_a_text_spells_out_stay_text(tokenizer: PreTrainedTokenizerBase) -> None:
    end = tokenizer.eos_token
    haystack = f"Every document ends with {end} and the next one begins.\n" * 50
    made = build_context(
        "multi",
        haystack,
        tokenizer,
        DIALECT,
        context_tokens=900,
        count=3,
        seed=0,
        number=0,
        held_out=True,
    )
    assert tokenizer.eos_token_id not in made.token_ids
    assert tokenizer.decode(made.token_ids).count(end) > 5
    assert 890 <= len(made.token_ids) <= 900


@pytest.mark.parametrize("task", HARD)
def test_a_chat_models_prompt_is_what_its_template_makes(task: str) -> None:
    tokenizer = smollm2_tokenizer()
    plan = Plan(
        haystack=load_haystack("jargon"), tokenizer=tokenizer, num_questions=5, keys_per_context=4, seed=3
    )
    made = list(contexts(TASKS[task], plan, 2048, lambda name: True))
    assert [len(context.questions) for context in made] == [4, 1]
    for context in made:
        for question in context.questions:
            ids = context.token_ids + tokenizer(question.text, add_special_tokens=False)["input_ids"]
            assert 2048 - 160 <= len(ids) + question.max_tokens <= 2048
            prompt = tokenizer.decode(ids)
            message = re.findall(
                r"<\|im_start\|>user\n(.*)<\|im_end\|>\n<\|im_start\|>assistant\n$", prompt, re.S
            )
            shown = tokenizer.apply_chat_template(
                [{"role": "user", "content": message[0]}], tokenize=False, add_generation_prompt=True
            )
            assert shown == prompt
            # the template's marks are single tokens: system, user, assistant
            assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" not in the document.\n", True),
        ("The document does not mention that name.", True),
        ("There is no pass key for Kelora Seven in it.", True),
        ("It isn't there.", True),
        ("It isn\u2019t there.", True),
        ("I cannot find it", True),
        ("Unknown.", True),
        (" 12345.\n", False),
        ("It is not 12345.", False),
        ("Not stated; the nearest is 12345.", False),
        ("I know nothing of knots", True),
        ("A knot, noted", False),
        ("", False),
    ],
)
def test_absence_is_stated_in_words_and_without_a_number(answer: str, right: bool) -> None:
    assert only_states_absence(answer, ("not in the document.",)) == right


def careful(body) -> str:
    """Answers as a model that takes the last value and sees what is not there."""
    document, _, asked = bytes(body["prompt"]).decode().rpartition("\nQuestion: ")
    values = stated(document, re.findall(r"for (\w+)\?", asked)[0])
    return f" {values[-1]}.\n" if values else " not in the document.\n"


def test_an_evaluation_tells_a_careful_reader_from_one_who_takes_the_first_match(tmp_path: Path) -> None:
    found = {}
    for name, answers in (("careful", careful), ("careless", reader)):
        with ScriptedServer(answers, max_model_len=8192) as server:
            words = ["evaluate", "--server", server.url, "--tokenizer", str(checkpoint_path("ic-nano"))]
            words += ["--suite", ",".join(HARD), "--lengths", "2k", "--questions", "12"]
            words += ["--keys-per-context", "6", "--out", str(tmp_path / name)]
            assert cli.main(words) == 0
            prompts = [tuple(body["prompt"]) for body in server.requests]
        assert len(set(prompts)) == len(prompts) == 36
        # two contexts a task
        assert len({prompt[:1800] for prompt in prompts}) == 6
        assert max(map(len, prompts)) <= 2048
        rows = json.loads((tmp_path / name / "report.json").read_text())["rows"]
        found[name] = {row["task"]: row["correct"] for row in rows}
    assert found["careful"] == {"distractors": 12, "corrections": 12, "absent": 12}
    # the first of two values, and an empty answer
    assert found["careless"] == {"distractors": 12, "corrections": 0, "absent": 0}
    absent = [
        record
        for record in read_records(tmp_path / "careful" / "answers.jsonl").values()
        if record["task"] == "absent"
    ]
    assert all(record["reference"] == "not in the document." and record["depth"] is None for record in absent)
    assert all(record["quote"].count("The pass key for ") == FAMILY for record in absent)
