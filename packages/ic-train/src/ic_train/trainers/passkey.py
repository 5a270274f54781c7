"""transformers' Trainer on a curriculum of whole batches, with weighted tokens.

Letters: B sequences, T tokens per sequence, Q questions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ic_train.data.curriculum import Curriculum, CurriculumBatches, single_batch
from ic_train.data.passkey import KEY_DIGITS
from ic_train.metrics import ThroughputMeter
from ic_train.trainers.finite import FiniteLoss

# steps whose mean decides whether a stage was passed
GATE_STEPS = 20


class PasskeyTrainer(FiniteLoss, Trainer):
    """Trains on `CurriculumBatches` and logs the share of pass keys answered right.

    Args:
        model: the causal language model.
        args: training arguments; steps, batch size and workers' order come from the curriculum.
        train_dataset: the batches.
        throughput: measures the speed that is logged.
        optimizer: to train with, or None for the one that `args` names.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: CurriculumBatches,
        throughput: ThroughputMeter,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=single_batch,
            optimizers=(optimizer, None),
            callbacks=[throughput, StageGate(self, train_dataset.curriculum)],
        )
        # the loss is a mean over the batch already, whatever number of tokens it has
        self.model_accepts_loss_kwargs = False
        self.curriculum = train_dataset.curriculum
        self.throughput = throughput
        self._answered: list[torch.Tensor] = []
        self._gate: list[torch.Tensor] = []

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning rate that the stages ask for, after a linear warm-up of `warmup_steps`."""
        if self.lr_scheduler is None:
            warmup_steps = self.args.get_warmup_steps(num_training_steps)

            def factor(step: int) -> float:
                warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
                return warmup * self.curriculum.learning_rate_factor(step)

            chosen = optimizer if optimizer is not None else self.optimizer
            assert chosen is not None, "the trainer creates its optimiser first"
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, factor)
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Weighted cross entropy: the sum over `[B, T]` of loss_weights times the token's loss, in float32."""
        outputs = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False)
        logits, labels = outputs.logits, inputs["labels"]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
        loss = (losses.view_as(labels) * inputs["loss_weights"]).sum()
        self._count_answers(logits.detach(), labels, inputs["answer_index"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log, with the speed and `answer_accuracy`: the share of pass keys right since the last line."""
        if "loss" in logs and self._answered:
            logs["answer_accuracy"] = round(torch.stack(self._answered).mean().item(), 4)
            logs.update(self.throughput.measure(self.state.global_step))
            self._answered.clear()
        super().log(logs, *args, **kwargs)

    def recent_answer_accuracy(self) -> float:
        """Share of pass keys answered right over the last steps."""
        return torch.stack(self._gate[-GATE_STEPS:]).mean().item()

    def _count_answers(self, logits: torch.Tensor, labels: torch.Tensor, answer_index: torch.Tensor) -> None:
        # stays on the device: reading it here would make every step wait for the GPU
        predicted = logits[:, answer_index].argmax(-1)
        right = (predicted == labels[:, answer_index]).unflatten(1, (-1, KEY_DIGITS)).all(-1)
        self._answered.append(right.float().mean())
        self._gate = [*self._gate[-GATE_STEPS + 1 :], self._answered[-1]]


class StageGate(TrainerCallback):
    """Stops a run whose stage ends below the accuracy that its recipe asks for.

    Args:
        trainer: knows the recent accuracy.
        curriculum: knows where stages end.
    """

    def __init__(self, trainer: PasskeyTrainer, curriculum: Curriculum) -> None:
        self.trainer = trainer
        self.curriculum = curriculum

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check at the last step of a stage.

        Raises:
            RuntimeError: the stage was not passed.
        """
        stage = self.curriculum.stage_ending_at(state.global_step)
        if stage is None or stage.min_answer_accuracy == 0:
            return
        reached = self.trainer.recent_answer_accuracy()
        if reached < stage.min_answer_accuracy:
            raise RuntimeError(
                f"stage {stage.name!r} ended at step {state.global_step} with {reached:.1%} of the pass keys "
                f"right; its recipe asks for {stage.min_answer_accuracy:.1%}. Longer stages would learn "
                "nothing from here: give this stage more steps, or try another seed"
            )
