"""transformers' Trainer on packed documents of any length, sharded, with whole checkpoints in the background."""

from __future__ import annotations

import time
from typing import Any

import torch
from ic_model import ICConfig
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from ic_train.checkpoints.saving import CheckpointWriter
from ic_train.context_parallel import SequenceLayout
from ic_train.metrics import UtilisationSampler, peak_tflops, training_flop
from ic_train.trainers.linear_loss import IGNORED
from ic_train.trainers.restartable import Restartable


class LongContextTrainer(Restartable, Trainer):
    """Trains on `PackedDocuments`.

    The loss is the mean over all labelled tokens of an optimiser step, on all ranks and in all accumulated
    batches: how they are divided among them changes nothing but the order of sums.

    Args:
        model: returns the sum of its losses; see trainers.linear_loss.
        args: training arguments; `max_steps` is set.
        train_dataset: sequences in the order in which they are to come.
        config: of the model, for FLOP.
        tokens_per_sequence: of a whole sequence.
        parts: processes that share a sequence.
        group: process group for tensors on the CPU, for what the ranks agree on; None for one process alone.
        writer: of checkpoints.
        record: what every checkpoint says of the run.
        files: that every checkpoint has beside the state, by name.
        callbacks: see transformers.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: Dataset[Any],
        config: ICConfig,
        tokens_per_sequence: int,
        parts: int,
        group: Any,
        writer: CheckpointWriter,
        record: dict[str, Any],
        files: dict[str, str],
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=collate,
            callbacks=callbacks,
        )
        keep_sums_in_float32(self.accelerator.state)
        self.config = config
        self.tokens_per_sequence = tokens_per_sequence
        self.parts = parts
        self.keep_whole(group=group, writer=writer, record=record, files=files)
        # says that the loss is scaled by the number of labels in the whole step
        self.model_accepts_loss_kwargs = True
        self.utilisation = UtilisationSampler()
        self.seen_tokens = 0
        self._flop = 0.0
        self._clock = (time.perf_counter(), 0, 0.0)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and measure how busy the GPU is; see Restartable."""
        self.utilisation.start()
        self._clock = (time.perf_counter(), self.seen_tokens, self._flop)
        try:
            return super().train(*args, **kwargs)
        finally:
            self.utilisation.stop()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This rank's share of the mean loss of the step, times the number of ranks.

        FSDP and DDP average gradients over the ranks; a mean over tokens wants their sum.
        """
        layout = SequenceLayout(self.tokens_per_sequence, inputs["document_starts"])
        if self.args.torch_compile:
            layout = layout.on(inputs["input_ids"].device)
        total = model(
            input_ids=inputs["input_ids"],
            labels=inputs["labels"],
            position_ids=inputs["position_ids"],
            layout=layout,
        )
        assert num_items_in_batch is not None, "the trainer counts labels"
        self.note_if_not_finite(total.detach())
        self._count(inputs["input_ids"], layout)
        loss = total * self.accelerator.num_processes / num_items_in_batch
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log, with speed, MFU, utilisation and peak memory of all ranks since the last line."""
        if "loss" in logs:
            logs.update(self._speed())
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        # the data set shuffles by itself: a sequence depends on its number only, and a resumed run goes on with it
        return SequentialSampler(self.train_dataset)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        """Labels of a step in all accumulated batches of all ranks; transformers would leave out first places."""
        counts = [(batch["labels"] != IGNORED).sum() for batch in batch_samples]
        labels = torch.stack(counts).sum().to(device)
        # a step whose documents have no label at all trains nothing, rather than dividing by zero
        return self.accelerator.gather(labels).sum().clamp_min(1)

    def _count(self, input_ids: torch.Tensor, layout: SequenceLayout) -> None:
        tokens = input_ids.numel()
        pairs = layout.attended_pairs() // self.parts
        if layout.document_starts is None:
            pairs *= input_ids.shape[0]
        self.seen_tokens += tokens
        self._flop += training_flop(self.config, tokens, pairs)

    def _speed(self) -> dict[str, Any]:
        now = time.perf_counter()
        seconds = now - self._clock[0]
        used = self.utilisation.take()
        on_gpu = torch.cuda.is_available() and self.args.device.type == "cuda"
        peak_gib = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
        mine = [self.seen_tokens - self._clock[1], self._flop - self._clock[2], used or 0.0]
        self._clock = (now, self.seen_tokens, self._flop)
        sums, largest = torch.tensor(mine, dtype=torch.float64), torch.tensor(peak_gib)
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        tokens, flop, utilised = sums.tolist()
        processes = self.args.world_size
        speed: dict[str, Any] = {
            "tokens_per_s": round(tokens / seconds, 1),
            "tokens": self.state.global_step * self.record["tokens_per_step"],
        }
        if on_gpu:
            speed["peak_gib"] = round(float(largest), 2)
            peak = peak_tflops(torch.cuda.get_device_name())
            if peak:
                speed["mfu"] = round(flop / seconds / (peak * 1e12 * processes), 4)
        if used is not None:
            speed["gpu_util"] = round(utilised / processes, 4)
        return speed


def keep_sums_in_float32(state: Any) -> None:
    """Have FSDP2 compute in bfloat16, but add gradients over ranks, and return the loss, in float32.

    accelerate sets one dtype for all three: the loss that is logged would have 8 bits. Nor are the blocks' inputs
    cast: the cosines and sines of rotary angles are float32 for good reason, and when activations are recomputed
    nothing casts them a second time, which PyTorch refuses.

    Args:
        state: of an Accelerator, before it prepares the model.
    """
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=plugin.mixed_precision_policy.param_dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack tensors; documents' starts stay lists, which are needed on the host."""
    batch: dict[str, Any] = {
        name: torch.stack([item[name] for item in items]) for name in ("input_ids", "labels", "position_ids")
    }
    starts = [item["document_starts"] for item in items]
    batch["document_starts"] = None if starts[0] is None else starts
    return batch
