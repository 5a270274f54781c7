"""transformers' Trainer with a teacher: cross entropy on text, KL on logits, distance of hidden states.

Letters: B sequences, T tokens per sequence, D hidden_size.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from ic_model.sizing import linear_flop_per_token
from torch import nn
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
from ic_train.trainers.distillation_loss import IGNORED, DistillationWeights, hidden_distance, token_losses
from ic_train.trainers.finite import FiniteLoss
from ic_train.trainers.muon import MuonWithAdamW

OPTIMIZERS = ("adamw", "muon")


class DistillationTrainer(FiniteLoss, Trainer):
    """Trains on packed sequences `input_ids [B, T]`.

    Args:
        model: the student, an InfiniteContextForCausalLM.
        args: training arguments.
        train_dataset: packed sequences, in the order in which they are to come.
        teacher: frozen, or None.
        weights: of the losses.
        callbacks: see transformers.
        optimizer: "adamw", which the arguments describe, or "muon" for the matrices inside the blocks.
        compile_layers: compile the blocks of both models and the loss.
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
        optimizer: str = "adamw",
        compile_layers: bool = False,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=train_dataset, callbacks=callbacks)
        self.optimizer_name = optimizer
        self.compile_layers = compile_layers
        # the loss is a mean over the batch already
        self.model_accepts_loss_kwargs = False
        self.weights = weights
        self.teacher = None if teacher is None else teacher.to(args.device)
        self._states = RecordedStates(model, every_layer=bool(weights.hidden))
        self._taught = None if teacher is None else RecordedStates(teacher, every_layer=bool(weights.hidden))
        if compile_layers:
            for one in (model, teacher) if teacher is not None else (model,):
                compile_blocks(one)
        self.seen_tokens = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._measured = 0
        self._clock = (time.perf_counter(), 0)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        # the data set shuffles by itself, so that a resumed run goes on with the same sequences
        return SequentialSampler(self.train_dataset)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Transformers' optimiser, or Muon."""
        if self.optimizer_name == "muon" and self.optimizer is None:
            own = self.args
            self.optimizer = MuonWithAdamW(
                self.accelerator.unwrap_model(self.model),
                lr=own.learning_rate,
                betas=(own.adam_beta1, own.adam_beta2),
                eps=own.adam_epsilon,
                weight_decay=own.weight_decay,
            )
        return super().create_optimizer(*args, **kwargs)

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
        # one token of logits: the head is applied below, a chunk at a time
        outputs = model(input_ids=ids, use_cache=False, logits_to_keep=1)
        own = self._states.take()
        taught: list[torch.Tensor] = []
        if self.teacher is not None and self._taught is not None:
            with torch.no_grad():
                self.teacher(input_ids=ids, use_cache=False, logits_to_keep=1)
            taught = self._taught.take()
        wanted, text, logits = self._token_losses(model, own[-1], ids, taught[-1] if taught else None)
        # a zero times the model's own logits keeps its head in the graph of wrappers that expect every parameter
        # to be used in forward
        loss = outputs.logits.sum() * 0.0 + wanted
        self._add("text_loss", text)
        if weights.logits:
            self._add("distillation_loss", logits)
        if weights.hidden:
            # the last block's states only matter as far as their norm lets them
            distance = hidden_distance(
                [*own[:-2], own[-1]], [*taught[:-2], taught[-1]], compiled=self.compile_layers
            )
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
        self, model: nn.Module, states: torch.Tensor, ids: torch.Tensor, taught: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The weighted sum, cross entropy and KL, from normed states `[B, T, D]`."""
        # every sequence's last token has none that follows
        labels = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)), dim=1)
        return token_losses(
            states.flatten(0, 1),
            self.accelerator.unwrap_model(model).lm_head.weight,
            labels.flatten(),
            None if taught is None else taught.flatten(0, 1),
            None if self.teacher is None else self.teacher.get_output_embeddings().weight,
            self.weights,
            dtype=torch.bfloat16 if self.args.bf16 else None,
            compiled=self.compile_layers,
        )

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


class RecordedStates:
    """Keeps what a model's blocks and its last norm return, until it is taken.

    Hooks on the modules, and not `output_hidden_states`, whose hooks reach into the blocks and break what is
    compiled.

    Args:
        model: of the Llama family's shape, `model.base_model.layers` and `.norm`.
        every_layer: keep the blocks' states, too.
    """

    def __init__(self, model: nn.Module, *, every_layer: bool) -> None:
        self._kept: list[torch.Tensor] = []
        base: Any = getattr(model, "base_model", model)
        for module in [*(base.layers if every_layer else ()), base.norm]:
            module.register_forward_hook(self._keep)

    def take(self) -> list[torch.Tensor]:
        """States `[B, T, D]` of the last forward pass: of each block, then the normed ones; they are forgotten."""
        kept, self._kept = self._kept, []
        return kept

    def _keep(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._kept.append(output[0] if isinstance(output, tuple) else output)


def compile_blocks(model: nn.Module) -> None:
    """Compile every block's forward in place: one compilation, which all of them share."""
    base: Any = getattr(model, "base_model", model)
    for layer in base.layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)
