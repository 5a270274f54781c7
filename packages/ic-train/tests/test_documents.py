"""Packed documents: nothing lost, masks and positions right, long ones more often, the same on every resume."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ic_model.byte_tokenizer import build_byte_tokenizer

from ic_train.context_parallel import local_tokens
from ic_train.data.text import TokenCorpus, load_token_corpus, write_corpus
from ic_train.long_context.documents import PackedDocuments, Packing, open_corpora
from ic_train.trainers.linear_loss import IGNORED

END = 0


def corpus_of(lengths: list[int], first: int = 1) -> TokenCorpus:
    """Documents whose tokens are all the document's own number, then the end token."""
    tokens = np.concatenate(
        [[first + number] * (length - 1) + [END] for number, length in enumerate(lengths)]
    )
    return TokenCorpus(tokens=tokens.astype(np.uint16), record={"eos_token_id": END, "vocab_size": 1000})


LENGTHS = [3, 40, 9, 17, 2, 90, 5, 33, 21, 64] * 5


def data_of(packing: Packing, num_sequences: int = 200, **options: object) -> PackedDocuments:
    return PackedDocuments([corpus_of(LENGTHS)], packing, num_sequences=num_sequences, **options)


def test_a_pass_has_every_document_once_in_another_order() -> None:
    data = data_of(Packing(tokens_per_sequence=32, seed=1))
    passes = []
    per_pass = (sum(LENGTHS) - 1) // 32 - 1
    for first in (0, per_pass):
        sequences = [data.sequence(number)["input_ids"] for number in range(first, first + per_pass)]
        tokens = torch.cat(sequences)
        runs = torch.unique_consecutive(tokens)
        documents = runs[runs != END].tolist()
        # whole documents follow each other; only the first and the last are cut
        assert len(set(documents)) == len(documents)
        counts = {number: int((tokens == number).sum()) for number in documents[1:-1]}
        assert counts == {number: LENGTHS[number - 1] - 1 for number in counts}
        passes.append(documents)
    assert passes[0] != passes[1] and len(passes[0]) > 40


def test_labels_follow_their_tokens_and_masks_hide_what_cannot_be_known() -> None:
    joined = data_of(Packing(tokens_per_sequence=64, seed=1))
    apart = data_of(Packing(tokens_per_sequence=64, seed=1, cross_document_attention=False))
    hidden = 0
    for number in range(30):
        one, other = joined.sequence(number), apart.sequence(number)
        assert one["document_starts"] is None
        assert torch.equal(one["labels"][:-1], one["input_ids"][1:])
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert one["position_ids"].tolist() == list(range(64))
        starts = other["document_starts"]
        ends = (one["input_ids"] == END).nonzero().flatten()
        assert starts == [0, *(end + 1 for end in ends.tolist() if end + 1 < 64)]
        # an end token's label would be the next document's first token
        assert (other["labels"] == IGNORED).nonzero().flatten().tolist() == ends.tolist()
        hidden += len(ends)
        kept = other["labels"] != IGNORED
        assert torch.equal(other["labels"][kept], one["labels"][kept])
        for start, end in zip(starts, [*starts[1:], 64], strict=True):
            assert other["position_ids"][start:end].tolist() == list(range(end - start))
    assert hidden > 50


def test_long_documents_come_as_often_as_asked() -> None:
    packing = Packing(tokens_per_sequence=32, long_document_share=0.75, long_document_tokens=60, seed=3)
    data = data_of(packing)
    assert [stream["share"] for stream in data.streams] == [0.75, 0.25]
    long = sum(
        all(
            LENGTHS[one - 1] >= 60
            for one in data.sequence(number)["input_ids"].unique().tolist()
            if one != END
        )
        for number in range(200)
    )
    assert 145 <= long <= 155
    naturally = data_of(Packing(tokens_per_sequence=32, seed=3)).streams
    assert naturally[0]["tokens"] == sum(LENGTHS)


def test_corpora_come_by_their_weights() -> None:
    corpora = [corpus_of(LENGTHS), corpus_of(LENGTHS, first=500)]
    packing = Packing(tokens_per_sequence=32)
    data = PackedDocuments(corpora, packing, num_sequences=400, weights=[3, 1])
    second = sum(int(data.sequence(number)["input_ids"].max()) >= 500 for number in range(400))
    assert 95 <= second <= 105


def test_positions_jump_ahead_and_stay_in_order() -> None:
    packing = Packing(tokens_per_sequence=64, skipped_window_tokens=4096, seed=2)
    data = data_of(packing)
    reached = []
    for number in range(100):
        positions = data.sequence(number)["position_ids"]
        assert positions[0] >= 0 and (positions.diff() >= 1).all() and positions[-1] < 4096
        reached.append(int(positions[-1]))
    assert max(reached) > 3500
    apart = data_of(
        Packing(tokens_per_sequence=64, skipped_window_tokens=4096, cross_document_attention=False)
    )
    for number in range(20):
        item = apart.sequence(number)
        assert (item["position_ids"][item["document_starts"]] == 0).all()


def test_the_parts_of_a_sequence_follow_each_other() -> None:
    packing = Packing(tokens_per_sequence=64, seed=5)
    whole, parts = data_of(packing, 6), data_of(packing, 6, parts=2)
    assert len(parts) == 12
    for number in range(6):
        for part in range(2):
            item = parts[2 * number + part]
            for name in ("input_ids", "labels", "position_ids"):
                assert torch.equal(item[name], whole[number][name][local_tokens(64, 2, part)])


def test_items_do_not_depend_on_what_was_read_before() -> None:
    packing = Packing(tokens_per_sequence=32, seed=9, skipped_window_tokens=100)
    forward, backward = data_of(packing), data_of(packing)
    late = [backward.sequence(number) for number in reversed(range(120))][::-1]
    for number, item in enumerate(late):
        for name in ("input_ids", "position_ids"):
            assert torch.equal(forward.sequence(number)[name], item[name])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens_per_sequence": 1}, "tokens_per_sequence is 1; it must be at least 2"),
        ({"tokens_per_sequence": 32, "long_document_share": 1.5}, "long_document_share is 1.5; it must be"),
        (
            {"tokens_per_sequence": 32, "skipped_window_tokens": 32},
            "pose_window_tokens is 32; it must be more",
        ),
    ],
)
def test_bad_packings_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Packing(**fields)


def test_too_little_text_and_wrong_weights_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"corpus 0: 1420 tokens; tokens_per_sequence 512 needs at least 1536"
    ):
        data_of(Packing(tokens_per_sequence=512))
    with pytest.raises(ValueError, match=r"documents of at least 1000 tokens: 0 tokens"):
        data_of(Packing(tokens_per_sequence=32, long_document_share=0.5, long_document_tokens=1000))
    with pytest.raises(ValueError, match=r"corpus_weights is \[1, 0\]; it must have a number above 0"):
        data_of(Packing(tokens_per_sequence=32), weights=[1, 0])


def test_a_share_that_would_never_come_is_refused() -> None:
    corpora = [corpus_of(LENGTHS), corpus_of(LENGTHS)]
    with pytest.raises(
        ValueError, match=r"corpus 1 .* has a share of 0.0001 of the sequences, of which none"
    ):
        PackedDocuments(corpora, Packing(tokens_per_sequence=32), num_sequences=1, weights=[0.9999, 0.0001])
    long = Packing(tokens_per_sequence=32, long_document_share=0.99995, long_document_tokens=60)
    with pytest.raises(ValueError, match=r"documents under 60 tokens .* has a share of 5e-05"):
        data_of(long)
    data = PackedDocuments(
        corpora, Packing(tokens_per_sequence=32), num_sequences=1, weights=[0.9995, 0.0005]
    )
    assert len(data) == 1


def test_damaged_corpora_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words " * 200)
    folder = tmp_path / "corpus"
    write_corpus(folder, [(str(tmp_path / "text.txt"), "x")], build_byte_tokenizer(), tokenizer_name="bytes")
    with pytest.raises(ValueError, match=r"made with a tokenizer of 264 tokens; the model has 100"):
        open_corpora([str(folder)], 100)
    with pytest.raises(ValueError, match="corpora is empty"):
        open_corpora([], 264)
    tokens = np.fromfile(folder / "tokens.bin", "<u2")
    tokens[100] = 999
    tokens.tofile(folder / "tokens.bin")
    packing = Packing(tokens_per_sequence=256)
    with pytest.raises(
        ValueError, match=r"corpus/tokens.bin is damaged: what follows byte 0 is not what was"
    ):
        PackedDocuments([load_token_corpus(folder)], packing, num_sequences=1)
    # of before there were checksums
    record = json.loads((folder / "corpus.json").read_text())
    del record["block_crc32"]
    (folder / "corpus.json").write_text(json.dumps(record))
    data = PackedDocuments([load_token_corpus(folder)], packing, num_sequences=1)
    with pytest.raises(ValueError, match=r"corpus 0 has token 999; its record says 264 .* is damaged"):
        for number in range(8):
            data.sequence(number)
    with (folder / "tokens.bin").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=r"tokens.bin has 1000 bytes; its record says"):
        open_corpora([str(folder)], 264)
