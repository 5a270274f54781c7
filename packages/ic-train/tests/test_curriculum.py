"""Stages come in order, batches depend on their number alone, weights are right, bad recipes are refused."""

import numpy as np
import pytest
import torch

from ic_train.data.curriculum import Curriculum, CurriculumBatches, Stage, single_batch

CORPUS = np.frombuffer(b"def add(a, b):\n    return a + b\n" * 500, np.uint8)


def stage(name: str = "short", **changes: object) -> Stage:
    fields = {
        "steps": 3,
        "tokens_per_sequence": 400,
        "sequences_per_step": 2,
        "min_needles": 3,
        "max_needles": 5,
        "max_questions": 2,
    }
    return Stage(name=name, **(fields | changes))  # type: ignore[arg-type]


CURRICULUM = Curriculum((stage(), stage("long", steps=2, tokens_per_sequence=800, window_tokens=50_000)))


def test_steps_fall_into_their_stages() -> None:
    assert CURRICULUM.total_steps == 5
    assert [CURRICULUM.stage_at(step).name for step in range(5)] == ["short"] * 3 + ["long"] * 2
    ending = [CURRICULUM.stage_ending_at(step) for step in range(6)]
    assert [found and found.name for found in ending] == [None, None, None, "short", None, "long"]
    with pytest.raises(IndexError, match="past the curriculum's 5 steps"):
        CURRICULUM.stage_at(5)


def test_a_batch_depends_on_its_number_and_the_seed_only() -> None:
    first, again = (CurriculumBatches(CURRICULUM, CORPUS, seed=1) for _ in range(2))
    _ = first[0]  # a different history
    for name, value in first[4].items():
        assert torch.equal(value, again[4][name]), name
    assert not torch.equal(first[3]["input_ids"], first[4]["input_ids"])
    assert not torch.equal(
        first[0]["input_ids"], CurriculumBatches(CURRICULUM, CORPUS, seed=2)[0]["input_ids"]
    )


def test_processes_share_a_step_and_see_different_batches() -> None:
    batches = CurriculumBatches(CURRICULUM, CORPUS, seed=1, processes=2)
    assert len(batches) == 10
    assert batches[5]["input_ids"].shape == batches[4]["input_ids"].shape == (2, 400)
    assert batches[6]["input_ids"].shape == (2, 800)
    assert not torch.equal(batches[4]["input_ids"], batches[5]["input_ids"])


def test_labels_follow_inputs_and_positions_are_skipped_where_the_stage_says_so() -> None:
    batches = CurriculumBatches(CURRICULUM, CORPUS, seed=1)
    for number in (0, 4):
        batch = batches[number]
        assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
    assert torch.equal(batches[0]["position_ids"], torch.arange(400).expand(2, -1))
    assert batches[4]["position_ids"].max() > 800


def test_weights_give_text_its_share_and_half_of_an_answer_to_its_first_digit() -> None:
    batch = CurriculumBatches(Curriculum((stage(text_weight=0.25),)), CORPUS, seed=1)[0]
    weights, digits = batch["loss_weights"] * 2, batch["answer_index"].unflatten(0, (-1, 5))
    assert weights.sum().item() == pytest.approx(1.25)
    assert weights[digits[:, 0]].sum().item() == pytest.approx(0.5)
    assert weights[digits].sum().item() == pytest.approx(1.0)


def test_learning_rate_factor_is_linear_within_a_stage() -> None:
    curriculum = Curriculum((stage(learning_rate_start=1.0, learning_rate_end=0.5), stage(steps=1)))
    assert [curriculum.learning_rate_factor(step) for step in range(5)] == [1.0, 0.75, 0.5, 1.0, 0.0]


def test_the_collator_passes_a_whole_batch_on() -> None:
    batch = {"input_ids": torch.zeros(2, 3)}
    assert single_batch([batch]) is batch


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ([], "stages is empty"),
        ([{"name": "a", "lenght": 3}], r"stages\[0\] has unknown keys \['lenght'\]; accepted: "),
        ([{"name": "a", "steps": 3}], "stages: .*missing.*tokens_per_sequence"),
    ],
)
def test_bad_recipes_are_refused(recipe: list[dict[str, object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curriculum.from_recipe(recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "stage 'short': steps is 0; it must be at least 1"),
        ({"max_needles": 2}, r"max_needles is 2; it must be at least min_needles \(3\)"),
        ({"min_answer_accuracy": 1.5}, "min_answer_accuracy is 1.5; it must be from 0 to 1"),
    ],
)
def test_bad_stages_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage(**changes)
