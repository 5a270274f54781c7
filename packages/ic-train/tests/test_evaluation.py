"""Retrieval is measured on documents of the right length, and the cache is left as it was."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from ic_model import ICForCausalLM, checkpoint_path
from ic_model.byte_tokenizer import build_byte_tokenizer
from ic_model.presets import preset
from transformers import AutoTokenizer

from ic_train import cli
from ic_train.evaluation import passkey_command
from ic_train.evaluation.generation import CachedContext
from ic_train.evaluation.haystack import HAYSTACKS, load_haystack
from ic_train.evaluation.passkey import evaluate_passkey, make_document, wilson_interval

TOKENIZER = build_byte_tokenizer()


@pytest.fixture(scope="module")
def model() -> ICForCausalLM:
    torch.manual_seed(0)
    return ICForCausalLM(preset("ic-nano")).eval()


def test_the_shipped_haystack_is_long_enough_for_a_million_bytes() -> None:
    text = load_haystack("jargon")
    assert len(text.encode()) > 1_048_576
    assert "Jargon File" in text
    assert set(HAYSTACKS) == {"jargon"}


def test_a_users_own_haystack_is_read_and_a_bad_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert load_haystack(str(tmp_path / "mine.txt")) == "mine"
    (tmp_path / "picture").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        load_haystack(str(tmp_path / "picture"))
    with pytest.raises(ValueError, match=r"haystack 'nope' is neither a file nor one of \['jargon'\]"):
        load_haystack("nope")


@pytest.mark.parametrize("haystack", ["short text\n", "äöü 漢字\n" * 50])
def test_documents_have_the_length_asked_for(haystack: str) -> None:
    document = make_document(haystack, TOKENIZER, context_tokens=5000, num_keys=7, seed=3)
    # a cut may fall into a character of up to three bytes
    assert 4996 <= len(document.token_ids) <= 5000
    text = TOKENIZER.decode(document.token_ids)
    assert all(text.count(key.needle) == 1 for key in document.pass_keys)


def test_documents_depend_on_their_seed() -> None:
    haystack = load_haystack("jargon")
    same, again, other = (
        make_document(haystack, TOKENIZER, context_tokens=2000, num_keys=3, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(same.token_ids, again.token_ids)
    assert not torch.equal(same.token_ids, other.token_ids)


def test_keys_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="context_tokens is 100; 3 pass keys alone need 105 tokens"):
        make_document("text", TOKENIZER, context_tokens=100, num_keys=3, seed=0)


@pytest.mark.parametrize("chunk_tokens", [0, 64])
def test_answers_equal_generate_and_leave_the_context_untouched(
    model: ICForCausalLM, chunk_tokens: int
) -> None:
    context, question = (torch.from_numpy(np.random.default_rng(0).integers(0, 256, n)) for n in (200, 20))
    whole = torch.cat([context, question])[None]
    expected = model.generate(whole, max_new_tokens=7, do_sample=False, eos_token_id=None)[0, -7:]
    cached = CachedContext(model, context, spare_tokens=32, chunk_tokens=chunk_tokens)
    first, second = cached.greedy(question, 7), cached.greedy(question, 7)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert cached.cache.get_seq_length() == 200


class Oracle(ICForCausalLM):
    """Finds every key by reading: proves that the measurement can reach 100 % and notices what is wrong."""

    wrong_keys = 0

    def forward(self, input_ids, past_key_values, **kwargs):  # type: ignore[no-untyped-def, override]
        self.seen = getattr(self, "seen", [])[: past_key_values.get_seq_length()] + input_ids[0].tolist()
        blank = torch.zeros(1, 1, input_ids.shape[1], 1)
        past_key_values.update(blank, blank, 0)
        text = bytes(self.seen).decode()
        logits = torch.zeros(1, 1, 264)
        logits[0, 0, self._next_byte(text)] = 1
        return type("Output", (), {"logits": logits})()

    def _next_byte(self, text: str) -> int:
        document, _, asked = text.rpartition("\nQuestion: ")
        if not document:
            return 0
        key = asked.removeprefix("pass key for ")[:6]
        digits = document.split(f"The pass key for {key} is ")[1][:5]
        answer = f" {digits}.\n" if key[0] > "c" else " 00000.\n"
        return ord(answer[len(asked.split(f"The pass key for {key} is")[1])])


def test_right_and_wrong_answers_are_counted() -> None:
    oracle = Oracle(preset("ic-nano")).eval()
    samples = list(
        evaluate_passkey(
            oracle,
            TOKENIZER,
            load_haystack("jargon"),
            context_tokens=3000,
            num_contexts=2,
            keys_per_context=12,
            seed=0,
        )
    )
    assert len(samples) == 24
    assert [sample["context"] for sample in samples] == [0] * 12 + [1] * 12
    for sample in samples:
        assert sample["correct"] == (sample["key"][0] > "c"), sample
    assert 0 < sum(sample["correct"] for sample in samples) < 24


def test_the_embedded_checkpoint_finds_its_keys() -> None:
    nano = ICForCausalLM.from_pretrained(checkpoint_path("ic-nano"), dtype=torch.float32).eval()
    samples = list(
        evaluate_passkey(
            nano,
            AutoTokenizer.from_pretrained(checkpoint_path("ic-nano")),
            load_haystack("jargon"),
            context_tokens=4096,
            num_contexts=1,
            keys_per_context=16,
            seed=7,
        )
    )
    assert [sample["answer"] for sample in samples] == [f" {sample['expected']}.\n" for sample in samples]


def test_wilson_interval_is_right_near_one() -> None:
    low, high = wilson_interval(200, 200)
    assert low == pytest.approx(0.9812, abs=1e-4)
    assert high == pytest.approx(1.0)
    assert wilson_interval(90, 100) == pytest.approx((0.8256, 0.9448), abs=1e-4)


def test_the_command_writes_result_and_plot(
    model: ICForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    arguments = [
        "evaluate",
        "passkey",
        "--model",
        str(tmp_path / "model"),
        "--results",
        str(tmp_path / "results"),
    ]
    assert (
        cli.main([*arguments, "--context-tokens", "600", "900", "--contexts", "1", "--keys-per-context", "3"])
        == 0
    )
    # a percentage is claimed from 200 questions on
    assert re.search(r"900 tokens: \d of 3 pass keys \(95 % interval", capsys.readouterr().out)
    (folder,) = (tmp_path / "results").iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert [(row["context_tokens"], row["total"], row["task"]) for row in result["rows"]] == [
        (600, 3, "passkey"),
        (900, 3, "passkey"),
    ]
    assert {"command", "commit", "dirty", "gpu", "driver", "versions", "seed"} <= set(result)
    assert (folder / "passkey.png").read_bytes().startswith(b"\x89PNG")


def test_enough_questions_give_a_percentage(capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(dtype="float32", haystack="jargon")
    for total in (199, 200):
        passkey_command._row(options, "model", 4096, [{"correct": True}] * total)
    few, enough = capsys.readouterr().out.splitlines()
    assert "4,096 tokens: 199 of 199 pass keys (95 % interval 98.1% to 100.0%)" in few
    assert "4,096 tokens: 200 of 200 pass keys (100.0%, 95 % interval 98.1% to 100.0%)" in enough


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context-tokens", "2000000"], "--context-tokens is 2000000; "),
        (["--contexts", "0"], "--contexts is 0; it must be at least 1"),
        (["--model", "ic-tiny"], "checkpoint 'ic-tiny' is not one of ic-nano"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str],
    message: str,
    model: ICForCausalLM,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    assert cli.main(["evaluate", "passkey", "--model", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
