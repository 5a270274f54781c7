"""Which batch comes at which step: stages of growing length, each a pure function of the step.

Letters: B sequences, T tokens per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ic_train.data.passkey import KEY_DIGITS, passkey_batch
from ic_train.data.positions import skipped_positions


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of a curriculum.

    Args:
        name: for logs and errors.
        steps: optimiser steps.
        tokens_per_sequence: T.
        sequences_per_step: B per process.
        min_needles: fewest pass keys per sequence; the number is drawn per step.
        max_needles: most pass keys per sequence.
        max_questions: questions per sequence, never more than needles.
        window_tokens: positions are skipped up to this length; 0 skips none.
        text_weight: weight of the text's mean loss beside the answers' mean loss, which counts 1.
        min_answer_accuracy: the run stops with an error where the last steps of the stage answer a smaller
            share of the pass keys; 0 never stops. A model that missed a short stage never learns a long one.
        learning_rate_start: factor on the run's learning rate at the stage's first step.
        learning_rate_end: the same at its last step; linear in between.
    """

    name: str
    steps: int
    tokens_per_sequence: int
    sequences_per_step: int
    min_needles: int
    max_needles: int
    max_questions: int
    window_tokens: int = 0
    text_weight: float = 0.5
    min_answer_accuracy: float = 0.0
    learning_rate_start: float = 1.0
    learning_rate_end: float = 1.0

    def __post_init__(self) -> None:
        """Validate."""
        for name in ("steps", "tokens_per_sequence", "sequences_per_step", "min_needles", "max_questions"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"stage {self.name!r}: {name} is {getattr(self, name)}; it must be at least 1"
                )
        if self.max_needles < self.min_needles:
            raise ValueError(
                f"stage {self.name!r}: max_needles is {self.max_needles}; it must be at least min_needles "
                f"({self.min_needles})"
            )
        if not 0 <= self.min_answer_accuracy <= 1:
            raise ValueError(
                f"stage {self.name!r}: min_answer_accuracy is {self.min_answer_accuracy}; it must be from 0 to 1"
            )


@dataclass(frozen=True, slots=True)
class Curriculum:
    """Stages in order."""

    stages: tuple[Stage, ...]

    @classmethod
    def from_recipe(cls, stages: list[dict[str, Any]]) -> Curriculum:
        """Build from a recipe's list.

        Raises:
            ValueError: the list is empty, or a stage has an unknown or missing key, or a bad value.
        """
        if not stages:
            raise ValueError("stages is empty; a curriculum needs at least one stage")
        known = {field.name for field in fields(Stage)}
        for number, stage in enumerate(stages):
            unknown = sorted(set(stage) - known)
            if unknown:
                raise ValueError(f"stages[{number}] has unknown keys {unknown}; accepted: {sorted(known)}")
        try:
            return cls(tuple(Stage(**stage) for stage in stages))
        except TypeError as error:
            raise ValueError(f"stages: {error}; each stage is a mapping of {sorted(known)}") from None

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        """The stage of a step, counted from 0."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise IndexError(f"step is past the curriculum's {self.total_steps} steps")

    def learning_rate_factor(self, step: int) -> float:
        """Factor on the run's learning rate at a step, counted from 0; 0 once all steps are done."""
        for stage in self.stages:
            if step < stage.steps:
                progress = step / max(stage.steps - 1, 1)
                return stage.learning_rate_start + progress * (
                    stage.learning_rate_end - stage.learning_rate_start
                )
            step -= stage.steps
        return 0.0

    def stage_ending_at(self, finished_steps: int) -> Stage | None:
        """The stage whose last step was the `finished_steps`-th, or None in mid-stage."""
        end = 0
        for stage in self.stages:
            end += stage.steps
            if end == finished_steps:
                return stage
        return None


class CurriculumBatches(Dataset[dict[str, torch.Tensor]]):
    """Whole batches by number: item `step * processes + process` is what that process trains on.

    An item depends on the seed and its number only, so that a resumed run continues with exactly the data
    that an uninterrupted run would have seen.

    Args:
        curriculum: the stages.
        corpus: `[bytes]` uint8.
        seed: of all randomness.
        processes: data-parallel processes.
    """

    def __init__(self, curriculum: Curriculum, corpus: np.ndarray, *, seed: int, processes: int = 1) -> None:
        self.curriculum = curriculum
        self.corpus = corpus
        self.seed = seed
        self.processes = processes

    def __len__(self) -> int:
        return self.curriculum.total_steps * self.processes

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """The batch: `input_ids`, `position_ids`, `labels` `[B, T]`, `loss_weights [T]`, `answer_index`.

        Labels are already shifted: `labels[:, t]` follows `input_ids[:, t]`. The weights are shared by the
        batch and sum to (1 + text_weight) / B over T: half of an answer's weight lies on its first digit,
        because only that one has to be looked up by the key, and the others follow from the digit before.
        """
        stage = self.curriculum.stage_at(number // self.processes)
        rng = np.random.default_rng([self.seed, number])
        needles = int(rng.integers(stage.min_needles, stage.max_needles + 1))
        batch = passkey_batch(
            rng,
            self.corpus,
            num_sequences=stage.sequences_per_step,
            tokens_per_sequence=stage.tokens_per_sequence,
            num_needles=needles,
            num_questions=min(needles, stage.max_questions),
        )
        positions = skipped_positions(
            rng,
            batch.boundaries,
            tokens_per_sequence=stage.tokens_per_sequence,
            window_tokens=stage.window_tokens,
        )
        answers = torch.from_numpy(batch.answer_index)
        text_tokens = stage.tokens_per_sequence - len(answers)
        weights = torch.full((stage.tokens_per_sequence,), stage.text_weight / text_tokens)
        digits = answers.unflatten(0, (-1, KEY_DIGITS))
        weights[digits[:, 0]] = 0.5 / len(digits)
        weights[digits[:, 1:]] = 0.5 / digits[:, 1:].numel()
        tokens = torch.from_numpy(batch.tokens.astype(np.int64))
        return {
            "input_ids": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "position_ids": torch.from_numpy(positions),
            "loss_weights": weights / stage.sequences_per_step,
            "answer_index": answers,
        }


def single_batch(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Collator for a data set whose items are whole batches already."""
    (item,) = items
    return item
