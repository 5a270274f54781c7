"""transformers' Trainer with a teacher: cross entropy on text, KL on logits, distance of hidden states.

Letters: B sequences, T tokens per sequence, D hidden_size.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from ic_model.sizing import linear_flop_per_token
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ic_train.metrics import peak_tflops, training_flop_per_token

# logits of student and teacher are the largest tensors of all: this many tokens at a time
CHUNK_TOKENS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationWeights:
    """Weights of the losses, and the temperature of the KL.

    Args:
        text: of the cross entropy of the next token.
        logits: of `temperature^2 KL(teacher, student)` (Hinton et al., arXiv 1503.02531).
        hidden: of the relative squared distance of hidden states, a mean over layers.
        temperature: of both distributions.
    """

    text: float = 1.0
    logits: float = 0.0
    hidden: float = 0.0
    temperature: float = 1.0


class DistillationTrainer(Trainer):
    """Trains on packed sequences `input_ids [B, T]`.

    Args:
        model: the student, an InfiniteContextForCausalLM.
        args: training arguments.
        train_dataset: packed sequences, in the order in which they are to come.
        teacher: frozen, or None.
        weights: of the losses.
        callbacks: see transformers.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: Dataset[Any],
        teacher: PreTrainedModel | None,
        weights: DistillationWeights,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=train_dataset, callbacks=callbacks)
        # the loss is a mean over the batch already
        self.model_accepts_loss_kwargs = False
        self.weights = weights
        self.teacher = None if teacher is None else teacher.to(args.device)
        self.seen_tokens = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._measured = 0
        self._clock = (time.perf_counter(), 0)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        # the data set shuffles by itself, so that a resumed run goes on with the same sequences
        return SequentialSampler(self.train_dataset)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Transformers' schedule, or one that follows the clock where a time limit is set."""
        limit = next((one for one in self.callback_handler.callbacks if isinstance(one, TimeLimit)), None)
        if limit is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        cosine = self.args.lr_scheduler_type == "cosine"

        def factor(step: int) -> float:
            left = max(0.0, 1.0 - limit.progress())
            decayed = 0.5 - 0.5 * math.cos(math.pi * left) if cosine else left
            return decayed * (min(1.0, (step + 1) / warmup) if warmup else 1.0)

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
        """The weighted sum of the losses, each a mean over tokens."""
        ids = inputs["input_ids"]
        weights = self.weights
        states = bool(weights.hidden)
        # one token of logits: the head is applied below, a chunk at a time
        outputs = model(input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=1)
        hidden = outputs.hidden_states
        # the last recorded state is the normed one; a zero times the model's own logits keeps its head in the
        # graph of wrappers that expect every parameter to be used in forward
        loss = outputs.logits.sum() * 0.0
        taught = None
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(
                    input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=1
                ).hidden_states
        head = self.accelerator.unwrap_model(model).lm_head.weight
        text, logits = self._token_losses(hidden[-1], ids, head, None if taught is None else taught[-1])
        loss = loss + weights.text * text + weights.logits * logits
        self._add("text_loss", text)
        if weights.logits:
            self._add("distillation_loss", logits)
        if states:
            assert taught is not None, "checked: hidden_weight needs a teacher"
            distance = hidden_distance(hidden[1:], taught[1:])
            loss = loss + weights.hidden * distance
            self._add("hidden_loss", distance)
        if model.training:
            self.seen_tokens += ids.numel() * self.args.world_size
            self._measured += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log, with each loss on its own, tokens per second and, where the GPU's peak is known, MFU."""
        if "loss" in logs and self._measured:
            for name, total in self._sums.items():
                logs[name] = round(float(total) / self._measured, 4)
            logs.update(self._speed())
            logs["tokens"] = self.seen_tokens
            self._sums.clear()
            self._measured = 0
        super().log(logs, *args, **kwargs)

    def _token_losses(
        self,
        student: torch.Tensor,
        ids: torch.Tensor,
        head: torch.Tensor,
        teacher: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross entropy and mean KL, from normed states `[B, T, D]`."""
        student, labels = student[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        if teacher is not None:
            teacher = teacher[:, :-1].flatten(0, 1)
        teacher_head = None if self.teacher is None else self.teacher.get_output_embeddings().weight
        text = logits = student.new_zeros((), dtype=torch.float32)
        for start in range(0, len(labels), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            one, other = checkpoint(
                chunk_losses,
                student[part],
                head,
                labels[part],
                None if teacher is None else teacher[part],
                teacher_head,
                self.weights,
                use_reentrant=False,
            )
            text, logits = text + one, logits + other
        return text / len(labels), logits / len(labels)

    def _add(self, name: str, value: torch.Tensor) -> None:
        # stays on the device: reading it here would make every step wait for the GPU
        self._sums[name] = self._sums.get(name, torch.zeros_like(value.detach())) + value.detach()

    def _speed(self) -> dict[str, Any]:
        now, tokens = time.perf_counter(), self.seen_tokens
        seconds, done = now - self._clock[0], tokens - self._clock[1]
        self._clock = (now, tokens)
        speed: dict[str, Any] = {"tokens_per_s": round(done / seconds)}
        config = self.accelerator.unwrap_model(self.model, keep_torch_compile=False).config
        peak = peak_tflops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        if peak:
            length = self.train_dataset.tokens_per_sequence
            flop = training_flop_per_token(config, length)
            if self.teacher is not None:
                # its forward pass; of the student's kind, without the attention
                flop += linear_flop_per_token(config)
            speed["mfu"] = round(done / seconds * flop / (peak * 1e12 * self.args.world_size), 4)
        return speed


class TimeLimit(TrainerCallback):
    """Ends training after a time, at a step's end.

    Args:
        seconds: from the first step's start.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._started: float | None = None

    def progress(self) -> float:
        """Share of the time that is over."""
        return 0.0 if self._started is None else (time.perf_counter() - self._started) / self.seconds

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop where the time is over."""
        if self.progress() >= 1:
            control.should_training_stop = True


def chunk_losses(
    student: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    teacher: torch.Tensor | None,
    teacher_head: torch.Tensor | None,
    weights: DistillationWeights,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of cross entropy and of KL over some tokens, in float32.

    Args:
        student: `[tokens, D]`, normed.
        head: `[vocabulary, D]`, the student's.
        labels: `[tokens]`, what follows.
        teacher: `[tokens, D]`, normed, or None.
        teacher_head: `[vocabulary, D]`.
        weights: which of them are wanted.
    """
    logits = F.linear(student, head.to(student.dtype)).float()
    zero = logits.new_zeros(())
    text = F.cross_entropy(logits, labels, reduction="sum") if weights.text else zero
    if teacher is None or not weights.logits:
        return text, zero
    assert teacher_head is not None, "a teacher has a head"
    temperature = weights.temperature
    wanted = (F.linear(teacher, teacher_head).float() / temperature).log_softmax(-1)
    found = (logits / temperature).log_softmax(-1)
    return text, temperature**2 * F.kl_div(found, wanted, reduction="sum", log_target=True)


def hidden_distance(student: tuple[torch.Tensor, ...], teacher: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Mean over layers of `|s - t|^2 / |t|^2`, each `[B, T, D]`."""
    ratios = []
    for own, other in zip(student, teacher, strict=True):
        wanted = other.float()
        ratios.append((own.float() - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12))
    return torch.stack(ratios).mean()
