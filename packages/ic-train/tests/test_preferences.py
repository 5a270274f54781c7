"""Preference pairs: which answers are right and wrong in which way, and who gave the wrong ones."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from ic_model.byte_tokenizer import build_byte_tokenizer
from openai_server import ScriptedServer
from preference_pairs import NANO, content, lines_of, make, scripted, stated, words, write_haystack
from smollm2_tokenizer import smollm2_tokenizer
from transformers import PreTrainedTokenizerBase

from ic_train import cli
from ic_train.evaluation.hard_sets import KINDS, Asked, Fact
from ic_train.evaluation.wordings import is_held_out
from ic_train.preferences.answers import FAULTS, fault_of


@pytest.fixture(scope="module")
def haystack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_haystack(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("smollm2")
    smollm2_tokenizer().save_pretrained(folder)
    return {"bytes": NANO, "smollm2": str(folder)}


def first_number(answer: str) -> str | None:
    found = re.search(r"\d+", answer)
    return found[0] if found else None


@pytest.mark.parametrize("name", ["bytes", "smollm2"])
def test_right_answers_are_right_and_wrong_ones_are_wrong_in_their_way(
    tmp_path: Path, haystack: Path, tokenizers: dict[str, str], name: str
) -> None:
    tokenizer: PreTrainedTokenizerBase = {"bytes": build_byte_tokenizer, "smollm2": smollm2_tokenizer}[name]()
    arguments = ["--tokenizer", tokenizers[name], "--lengths", "2k,4k", "--pairs", "13"]
    pairs = make(tmp_path / "out", haystack, *arguments, "--pairs-per-context", "5", "--short-tokens", "900")
    lines = lines_of(tmp_path / "out")
    assert len(pairs) == len(lines) == len(KINDS) * 2 * 13
    assert len({pair.id for pair in pairs}) == len(pairs)
    faults: dict[str, Counter] = {kind: Counter() for kind in KINDS}
    for pair, line in zip(pairs, lines, strict=True):
        long, short = tokenizer.decode(pair.prompt_ids), tokenizer.decode(pair.short_prompt_ids)
        question = line["question"].strip()
        assert long.strip().endswith(question) and short.strip().endswith(question)
        document, summary = long[: long.rindex(question)], short[: short.rindex(question)]
        key = re.findall(r"pass key for ([A-Za-z]+(?: [A-Z][a-z]+)?)\?", question)[-1]
        assert not is_held_out(key)
        longest = max(len(pair.chosen_ids), len(pair.rejected_ids))
        assert pair.context_tokens - 70 <= len(pair.prompt_ids) + longest <= pair.context_tokens
        assert 900 - 70 <= len(pair.short_prompt_ids) + longest <= 900
        assert pair.prompt_ids.dtype == pair.chosen_ids.dtype == np.int64
        for ids, text in ((pair.chosen_ids, line["chosen"]), (pair.rejected_ids, line["rejected"])):
            assert ids[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(ids[:-1]) == text
        chosen, rejected, fault = line["chosen"], line["rejected"], line["fault"]
        values = stated(document, key)
        assert stated(summary, key) == values
        faults[pair.kind][fault] += 1
        assert pair.rejected_source == "made"
        if pair.kind == "absent":
            assert values == [] and key not in document and pair.depth is None
            assert first_number(chosen) is None and "not in the document" in chosen
        else:
            assert first_number(chosen) == values[-1]
            assert len(values) == (2 if pair.kind == "corrections" else 1)
            quote = chosen.strip().split("\n")[-1] if name == "bytes" else chosen.split('"')[1]
            assert document.count(quote) == summary.count(quote) == 1
            assert document.index(quote) / len(document) == pytest.approx(pair.depth, abs=0.15)
        wrong = first_number(rejected)
        known = re.findall(r"pass key for [A-Za-z ]+ is (?:no longer \d+; it is )?(\d+)\.", document)
        if fault == "refused":
            assert wrong is None and "not in the document" in rejected
            continue
        # of the same form as a right one
        assert re.findall(r"\d+", rejected).count(wrong) == 2
        if fault == "truncated":
            assert values[-1].startswith(wrong) and 2 <= len(wrong) < 5
        elif fault == "invented":
            assert len(wrong) == 5 and wrong not in known
        elif fault == "outdated":
            assert wrong == values[0] != values[-1]
            # nothing but the values differs
            assert re.sub(r"\d+", "", rejected) == re.sub(r"\d+", "", chosen)
        else:
            # a near-duplicate's, which stands in the short context, too
            assert wrong in known and wrong not in values and wrong in summary
    # every fault of every kind
    assert {kind: set(counted) for kind, counted in faults.items()} == {
        kind: set(listed) for kind, listed in FAULTS.items()
    }
    record = pairs.record
    assert record["pairs_by_kind"] == dict.fromkeys(sorted(KINDS), 26)
    assert record["pairs_by_length"] == {"2048": 65, "4096": 65}
    assert record["pairs_by_source"] == {"made": 130}
    assert record["licence"] == {"sources.txt": "PSF-2.0"}
    # contexts that are shared are stored once
    assert record["tokens"] < 0.6 * sum(len(pair.prompt_ids) + len(pair.short_prompt_ids) for pair in pairs)
    assert pairs.prompt_tokens.tolist() == [len(pair.prompt_ids) for pair in pairs]
    used = max(
        int(ids.max())
        for pair in pairs
        for ids in (pair.prompt_ids, pair.short_prompt_ids, pair.chosen_ids, pair.rejected_ids)
    )
    assert record["largest_token_id"] == used < len(tokenizer)


def test_single_facts_stand_at_every_depth(tmp_path: Path, haystack: Path) -> None:
    pairs = make(tmp_path, haystack, "--kinds", "single", "--pairs", "10", "--lengths", "2k,4k")
    for tokens in (2048, 4096):
        depths = [pair.depth for pair in pairs if pair.context_tokens == tokens]
        assert sorted(int(depth * 10) for depth in depths) == list(range(10))


def test_a_pair_with_a_context_of_its_own_has_distractors_all_the_same(
    tmp_path: Path, haystack: Path
) -> None:
    make(tmp_path, haystack, "--pairs-per-context", "1", "--pairs", "12")
    lines = lines_of(tmp_path)
    assert len({tuple(line["context"]) for line in lines}) == 60
    assert {line["kind"] for line in lines if line["fault"] == "distractor"} == {*KINDS} - {"single"}


@pytest.mark.parametrize("pairs_per_context", ["1", "2", "3", "8", "9"])
def test_single_facts_have_every_fault_in_turn(
    tmp_path: Path, haystack: Path, pairs_per_context: str
) -> None:
    make(tmp_path, haystack, "--kinds", "single", "--pairs-per-context", pairs_per_context)
    faults = Counter(line["fault"] for line in lines_of(tmp_path))
    assert faults == {"refused": 2, "truncated": 2, "invented": 2}


def test_pairs_have_a_million_tokens(tmp_path: Path, haystack: Path) -> None:
    # one context is built of the shortest length to see whether there is room, which need not be a long one
    pairs = make(tmp_path, haystack, "--lengths", "2k,1M", "--pairs", "1")
    lines = lines_of(tmp_path)
    places = [place for place, line in enumerate(lines) if line["context_tokens"] == 2**20]
    assert [lines[place]["kind"] for place in places] == list(KINDS)
    for place in places:
        pair, line = pairs[place], lines[place]
        longest = max(len(pair.chosen_ids), len(pair.rejected_ids))
        assert 2**20 - 70 <= len(pair.prompt_ids) + longest <= 2**20
        prompt = bytes(pair.prompt_ids.astype(np.uint8)).decode()
        assert prompt.endswith(line["question"])
        document = prompt.removesuffix(line["question"])
        values = stated(document, line["key"])
        if pair.kind == "absent":
            assert values == [] and first_number(line["chosen"]) is None
            continue
        assert first_number(line["chosen"]) == values[-1] != first_number(line["rejected"])
        quote = line["chosen"].strip().split("\n")[-1]
        assert document.count(quote) == 1 and values[-1] in quote
        assert document.index(quote) / len(document) == pytest.approx(pair.depth, abs=0.15)


@pytest.mark.parametrize("name", ["bytes", "smollm2"])
@pytest.mark.parametrize(
    "said",
    [
        # 61 bytes that are no UTF-8, as many as an answer may have
        pytest.param("\ufffd" * 61, id="replaced"),
        pytest.param("\ufffd\U0001f600 " * 150, id="mixed"),
        pytest.param("9" * 400, id="digits"),
    ],
)
def test_a_models_answer_that_is_too_long_is_cut(
    tmp_path: Path, haystack: Path, tokenizers: dict[str, str], name: str, said: str
) -> None:
    tokenizer: PreTrainedTokenizerBase = {"bytes": build_byte_tokenizer, "smollm2": smollm2_tokenizer}[name]()
    arguments = [
        "--tokenizer",
        tokenizers[name],
        "--kinds",
        "single",
        "--pairs",
        "2",
        "--short-tokens",
        "900",
    ]
    with ScriptedServer(lambda body: said, max_model_len=8192) as server:
        pairs = make(tmp_path, haystack, *arguments, "--server", server.url)
    for pair, line in zip(pairs, lines_of(tmp_path), strict=True):
        assert line["rejected_source"] == "model" and line["model_answer"] == said
        # long enough to be what was said
        assert said.startswith(line["rejected"]) and len(pair.rejected_ids) > 40
        assert tokenizer.decode(pair.rejected_ids[:-1]) == line["rejected"]
        assert len(pair.prompt_ids) + len(pair.rejected_ids) <= 2048
        assert len(pair.short_prompt_ids) + len(pair.rejected_ids) <= 900


def test_a_models_own_wrong_answers_are_taken(tmp_path: Path, haystack: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    arguments = ["--model", "ic-nano", "--dtype", "float32", "--device", "cpu", "--pairs", "8"]
    arguments += ["--lengths", "1k", "--short-tokens", "600"]
    pairs = make(tmp_path, haystack, *arguments, "--kinds", "single,corrections,absent")
    torch.set_num_threads(threads)
    sources = {kind: Counter() for kind in ("single", "corrections", "absent")}
    for pair, line in zip(pairs, lines_of(tmp_path), strict=True):
        sources[pair.kind][pair.rejected_source] += 1
        if pair.rejected_source == "model":
            # one line, as answers have in these words
            assert re.fullmatch(r" \d+\.?\n", line["model_answer"])
            # its value in the form of a right answer, with a quote that states it
            wrong = first_number(line["model_answer"])
            assert line["rejected"].count(wrong) == 2
            assert first_number(line["rejected"]) == wrong != first_number(line["chosen"])
            if line["fault"] == "outdated":
                assert re.sub(r"\d+", "", line["rejected"]) == re.sub(r"\d+", "", line["chosen"])
            if line["fault"] == "distractor":
                assert (
                    first_number(line["rejected"]) in bytes(pair.short_prompt_ids.astype(np.uint8)).decode()
                )
    # it finds every key, has no notion of a correction, and knows no absence
    assert sources["single"] == {"made": 8}
    assert sources["corrections"]["model"] >= 1
    assert sources["absent"] == {"model": 8}
    assert pairs.record["model"] == "ic-nano" and len(pairs.record["weights"]) == 64


def test_a_server_that_dies_half_way_is_asked_only_for_the_rest(
    tmp_path: Path, haystack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--kinds",
        "multi,corrections,absent",
        "--pairs",
        "9",
        "--pairs-per-context",
        "3",
        "--retries",
        "0",
    ]
    with ScriptedServer(scripted, max_model_len=8192) as server:
        make(tmp_path / "whole", haystack, *arguments, "--server", server.url)
        assert len(server.requests) == 27
    assert [line["fault"] for line in lines_of(tmp_path / "whole") if line["kind"] != "multi"] == [
        *["outdated"] * 9,
        *["distractor"] * 9,
    ]
    record = json.loads((tmp_path / "whole" / "preferences.json").read_text())
    assert record["pairs_by_source"] == {"made": 9, "model": 18}
    assert all(
        line["model_answer"].count("\n") == 1
        for line in lines_of(tmp_path / "whole")
        if line["kind"] != "multi"
    )
    with ScriptedServer(
        scripted, lambda number: "hang up" if number >= 13 else None, max_model_len=8192
    ) as dying:
        assert cli.main(words(tmp_path / "died", haystack, *arguments, "--server", dying.url)) == 1
    assert "the same command asks for the rest" in capsys.readouterr().err
    # contexts are asked about side by side: no pair of theirs may be whole yet, and every answer is kept
    assert len((tmp_path / "died" / "answers.jsonl").read_text().splitlines()) == 13
    with ScriptedServer(scripted, max_model_len=8192) as server:
        make(tmp_path / "died", haystack, *arguments, "--server", server.url)
        assert len(server.requests) == 27 - 13
    assert content(tmp_path / "died") == content(tmp_path / "whole")


def test_several_contexts_are_asked_about_at_once_and_written_in_order(
    tmp_path: Path, haystack: Path
) -> None:
    arguments = ["--kinds", "multi", "--pairs", "12", "--pairs-per-context", "2"]
    most = {}
    for concurrency in ("1", "3"):
        with ScriptedServer(scripted, together=int(concurrency), max_model_len=8192) as server:
            flags = ["--server", server.url, "--concurrency", concurrency]
            make(tmp_path / concurrency, haystack, *arguments, *flags)
            most[concurrency] = server.most_at_once
    assert most == {"1": 1, "3": 3}
    assert content(tmp_path / "1") == content(tmp_path / "3")


def test_faults_of_a_models_answers() -> None:
    def fact(key: str, value: str, slot: int) -> Fact:
        return Fact(key=key, value=value, sentence=f"\nThe pass key for {key} is {value}.\n", slot=slot)

    old, new, near, far = (
        fact("ab", "11111", 0),
        fact("ab", "22222", 1),
        fact("ac", "33333", 2),
        fact("x", "44444", 3),
    )
    asked = Asked(key="ab", fact=new, outdated=old, others=(near,))
    absent = Asked(key="aq", fact=None, outdated=None, others=(near,))
    elsewhere = {one.value: one for one in (old, new, near, far)}
    found = {
        " 22222.": None,
        "It was 11111; it is 22222.": None,
        " 11111.": "outdated",
        " 33333.": "distractor",
        " 44444.": "distractor",
        " 222.": "truncated",
        " 222222.": "invented",
        " 55555.": "invented",
        "It is not in the document.": "refused",
        "Hello": "no number",
        "": "no number",
    }
    assert {answer: fault_of(answer, asked, elsewhere) for answer in found} == found
    found = {
        "It is not in the document.": None,
        "It is not there, but that of ac is 33333.": None,
        "Hello": None,
        " 33333.": "distractor",
        " 55555.": "invented",
    }
    assert {answer: fault_of(answer, absent, elsewhere) for answer in found} == found
