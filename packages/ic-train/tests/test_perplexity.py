"""Perplexity by position: the losses are the model's own, and texts that repeat are said to."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ic_model import ICForCausalLM
from ic_model.byte_tokenizer import build_byte_tokenizer
from ic_model.presets import preset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ic_train import cli
from ic_train.evaluation import perplexity
from ic_train.evaluation.haystack import load_haystack
from ic_train.evaluation.perplexity import (
    Stretch,
    perplexity_rows,
    place_texts,
    repetition,
    repetition_note,
    token_losses,
)

TOKENIZER = build_byte_tokenizer()
SEED = 1000


def small_model(kind: str = "infinite-context") -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "llama":
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=264, **sizes)).eval()
    config = preset("ic-nano")
    config.num_hidden_layers = 1
    return ICForCausalLM(config).eval()


@pytest.mark.parametrize("chunk_tokens", [0, 300])
@pytest.mark.parametrize("kind", ["infinite-context", "llama"])
def test_token_losses_are_the_models_own(kind: str, chunk_tokens: int) -> None:
    model = small_model(kind)
    ids = torch.randint(0, 256, (1300,))
    losses = token_losses(model, ids, chunk_tokens=chunk_tokens)
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1]
    assert losses.shape == (1299,)
    whole = torch.nn.functional.cross_entropy(logits.float(), ids[1:], reduction="none")
    torch.testing.assert_close(losses, whole, rtol=1e-4, atol=1e-4)


def test_rows_weigh_texts_by_their_tokens() -> None:
    bins = [
        {"from_tokens": 0, "to_tokens": 512, "tokens": n, "nll": nll, "block_nlls": [nll, nll + 0.1]}
        for n, nll in ((100, 1.0), (300, 2.0))
    ]
    (row,) = perplexity_rows([{"context_tokens": 512, "bins": [one]} for one in bins])
    assert row["perplexity"] == pytest.approx(2.718281828**1.75)
    assert row["low"] < row["perplexity"] < row["high"]
    # records that do not say where their texts stood
    assert "times_read" not in row
    assert repetition_note(row) is None


def test_texts_that_do_not_overlap_stay_at_their_random_places() -> None:
    haystack = load_haystack("jargon")
    texts = place_texts(haystack, TOKENIZER, context_tokens=4096, texts=4, seed=SEED)
    drawn = [int(np.random.default_rng(SEED + number).integers(len(haystack))) for number in range(4)]
    assert [text.start for text in texts] == drawn
    assert repetition(texts, len(haystack))["times_read"] == 1


@pytest.mark.parametrize("texts", [5, 10])
def test_texts_do_not_overlap_while_the_haystack_has_room(texts: int) -> None:
    # characters of one byte and of three: texts of as many tokens have other numbers of characters
    haystack = "plain text " * 500 + "漢字" * 1000
    tokens = len(haystack.encode()) // 10
    placed = place_texts(haystack, TOKENIZER, context_tokens=tokens, texts=texts, seed=SEED)
    assert len(placed) == texts
    read = [place % len(haystack) for one in placed for place in range(one.start, one.start + one.characters)]
    assert len(set(read)) == len(read)


def test_how_often_texts_are_read() -> None:
    def of(*texts: tuple[int, int]) -> tuple[float, float]:
        found = repetition([Stretch(start=start, characters=count) for start, count in texts], 100)
        return found["haystack_share"], found["times_read"]

    assert of((0, 50), (50, 50)) == (0.5, 1)
    assert of((0, 50), (25, 50)) == (0.5, 1.333)
    # over the haystack's end
    assert of((80, 40), (10, 20)) == (0.4, 1.2)
    assert of((30, 250)) == (2.5, 2.5)
    row = {"context_tokens": 512, "texts": 2, "haystack_share": 0.5}
    assert repetition_note({**row, "times_read": 1}) is None
    assert "2 texts overlap" in str(repetition_note({**row, "times_read": 1.2}))


def test_a_haystack_that_is_too_short_is_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = []
    losses = token_losses

    def spy(model: PreTrainedModel, token_ids: torch.Tensor, *, chunk_tokens: int) -> torch.Tensor:
        chunks.append(chunk_tokens)
        return losses(model, token_ids, chunk_tokens=chunk_tokens)

    monkeypatch.setattr(perplexity, "token_losses", spy)
    small_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "short.txt").write_text("A short text.\n" * 50)
    words = ["evaluate", str(tmp_path / "model"), "--suite", "perplexity", "--lengths", "512,1k"]
    words += ["--texts", "2", "--haystack", str(tmp_path / "short.txt"), "--dtype", "float32"]
    assert cli.main([*words, "--chunk-tokens", "256", "--out", str(tmp_path / "out")]) == 0
    assert chunks == [256] * 4
    shown = capsys.readouterr()
    overlap = "perplexity at 512 tokens: 2 texts overlap, and what they read is read 1.463 times."
    copies = "perplexity at 1,024 tokens: a text is 1.463 times the haystack."
    for note in (overlap, copies):
        assert shown.err.count(f"warning: {note}") == 1
        assert shown.out.count(note) == 1
        assert (tmp_path / "out" / "report.md").read_text().count(note) == 1
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert [(row["context_tokens"], row["haystack_share"], row["times_read"]) for row in rows] == [
        (512, 0.731, 1.463),
        (1024, 1.463, 2.926),
    ]
