"""The output projection and cross entropy as one, without the logits of all tokens at once.

At 131,072 tokens and a vocabulary of 49,152, float32 logits take 24 GiB and their gradient as much. Liger's kernel
(`liger-kernel`, on a GPU) computes them some tokens at a time and their gradients in the forward pass; TRL's
(everywhere, on the CPU in plain PyTorch) some tokens and some of the vocabulary at a time, and once more in the
backward pass.

Letters: T tokens, D model width.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from ic_model import ICForCausalLM
from torch import nn
from torch.nn import functional as F

from ic_train.context_parallel import SequenceLayout
from ic_train.trainers import liger

LOSSES = ("auto", "liger", "chunked", "full")
IGNORED = -100
# columns of the vocabulary that TRL's kernel multiplies at once
CHUNK_COLUMNS = 8192


class LossHead(nn.Linear):
    """The output projection of a model in training: called with labels, it returns their summed loss.

    Its parameter and its name are the projection's, so that checkpoints do not change. That the loss is computed
    inside the module's own call matters under FSDP2, which gathers the weight for the time of that call.
    """

    kind: str = "chunked"

    def forward(self, input: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Logits `[..., vocabulary]`, or with labels the sum of the losses, float32.

        Args:
            input: `[..., D]`, normed states.
            labels: `[...]`, the token that follows each; IGNORED where none is wanted.
        """
        if labels is None:
            return super().forward(input)
        hidden, wanted = input.flatten(0, -2), labels.flatten()
        return {"liger": _liger, "chunked": _chunked, "full": _full}[self.kind](hidden, self.weight, wanted)


class CausalLMWithLoss(ICForCausalLM):
    """An InfiniteContextForCausalLM whose forward returns the loss alone.

    Made of an existing model by `add_loss_head`; what is saved is an InfiniteContextForCausalLM as before.
    """

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        layout: SequenceLayout | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The sum of the losses.

        Args:
            input_ids: `[B, T]`.
            labels: `[B, T]`, already shifted: the token that follows each; IGNORED where none is wanted.
            position_ids: `[B, T]`.
            layout: where documents begin, for the attention.
        """
        states = self.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, layout=layout, **kwargs
        ).last_hidden_state
        return self.lm_head(states, labels)


def add_loss_head(model: ICForCausalLM, kind: str) -> CausalLMWithLoss:
    """Make a model return its loss; in place.

    Args:
        model: whose parameters stay what they are.
        kind: "liger", "chunked" or "full".
    """
    assert kind in LOSSES[1:], kind
    model.__class__ = CausalLMWithLoss
    model.lm_head.__class__ = LossHead
    model.lm_head.kind = kind  # type: ignore[bad-argument-type]
    return model  # type: ignore[return-value]


def choose_loss(wanted: str, device: torch.device) -> str:
    """Which loss runs on a device: "auto" is Liger's where it can.

    Raises:
        ValueError: the name is unknown, or that loss cannot run here.
    """
    return liger.choose("linear_loss", wanted, LOSSES, device, otherwise="chunked")


# both launch kernels of their own, which the compiler need not look into
@torch.compiler.disable
def _liger(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    found: Any = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy(
        hidden,
        weight.to(hidden.dtype),
        labels,
        ignore_index=IGNORED,
        reduction="sum",
        # bfloat16 sums of thousands of chunks would drift
        accum_dtype=torch.float32,
    )
    return found.loss if hasattr(found, "loss") else found


@torch.compiler.disable
def _chunked(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from trl.kernels import ChunkedLogProbFunction

    wanted = labels != IGNORED
    found = ChunkedLogProbFunction.apply(
        hidden, weight, None, labels.clamp_min(0), 1.0, CHUNK_COLUMNS, None, 1.0, ()
    )
    return -torch.where(wanted, found[0], 0.0).sum()


def _full(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, weight.to(hidden.dtype))
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
