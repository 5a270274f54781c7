"""TRL's DPOTrainer on `ic_train.preferences`: pairs of any length, the reference computed before.

Differs from TRL's where long contexts need it: pairs come as token ids out of a memory-mapped folder and are never
cut or dropped; no mask is built; three objectives decide which of the two prompts of a pair, the long or the short
one, the model and its reference see; checkpoints are those of the long-context trainer.

Letters: P pairs of a batch, T tokens of its longest row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from ic_train.data.packing import PackedText
from ic_train.preferences.store import Pair, Preferences
from ic_train.trainers.restartable import Restartable

OBJECTIVES = ("dpo", "solopo", "longpo")
# rows of a second prompt, and of text, stand in a batch under these prefixes
LONG, REFERENCE, TEXT = "long_", "reference_", "text_"


class PairCollator:
    """Makes batches in TRL's layout of the numbers of pairs.

    Args:
        pairs: all.
        objective: one of OBJECTIVES.
        text: of which each pair brings the sequence of its own number, or None.
    """

    def __init__(self, pairs: Preferences, objective: str, text: PackedText | None = None) -> None:
        self.pairs = pairs
        self.objective = objective
        self.text = text
        self.kinds = pairs.kinds
        # any token pads: neither attention nor loss sees it
        self._rows = DataCollatorForPreference(pad_token_id=0)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch.

        Args:
            examples: each with `pair`, and in training with `ref_chosen_logps` and `ref_rejected_logps`.

        Returns:
            the rows that the preference is learnt on, the chosen answers before the rejected ones, `[2 P, T]`; the
            same with the prefix `reference_` where the reference sees other prompts; with the prefix `long_` the
            chosen answers behind the whole contexts, `[P, T]`; `kinds` `[P]`; the reference's log-probabilities;
            beside these `text_input_ids`, `[P, tokens of a sequence]`.
        """
        pairs = [self.pairs[example["pair"]] for example in examples]
        learnt = "short_prompt_ids" if self.objective == "solopo" else "prompt_ids"
        batch = self._of(pairs, learnt, examples)
        batch["kinds"] = torch.tensor([self.kinds.index(pair.kind) for pair in pairs])
        if self.objective == "solopo":
            whole = self._of(pairs, "prompt_ids")
            batch |= {LONG + name: part[: len(pairs)] for name, part in whole.items()}
        if self.text is not None and "ref_chosen_logps" in examples[0]:
            texts = [self.text[example["pair"]]["input_ids"] for example in examples]
            batch[f"{TEXT}input_ids"] = torch.stack(texts)
        if self.objective == "longpo" and "ref_chosen_logps" not in examples[0]:
            batch |= {REFERENCE + name: part for name, part in self._of(pairs, "short_prompt_ids").items()}
        return batch

    def _of(
        self, pairs: list[Pair], prompt: str, examples: list[dict[str, Any]] | None = None
    ) -> dict[str, torch.Tensor]:
        """TRL's rows of pairs behind one of their prompts, with what the examples know of the reference."""
        known = examples or [{}] * len(pairs)
        return self._rows(
            [
                {
                    "prompt_ids": getattr(pair, prompt).tolist(),
                    "chosen_ids": pair.chosen_ids.tolist(),
                    "rejected_ids": pair.rejected_ids.tolist(),
                    **example,
                }
                for pair, example in zip(pairs, known, strict=True)
            ]
        )


class PreferenceTrainer(Restartable, DPOTrainer):
    """Learns preferences.

    objective `dpo`: TRL's loss behind the whole contexts.
    objective `longpo`: likewise, and the reference sees the short prompt: what the model answers at length is held
        to what it answered in short. This is LongPO's constraint (arXiv 2502.13922, section 3.2); TRL's loss type
        `sft` beside `sigmoid` is its third term.
    objective `solopo`: TRL's loss behind the short prompts, plus `alignment_weight` times the mean over pairs of
        |r(long) - r(short)|, the rewards r = beta log(pi / pi_ref) of the chosen answer behind both prompts
        (SoLoPO, arXiv 2505.11166, in its chosen-only form): the one forward pass at length.

    With text, `text_weight` times its mean loss per token is added in training, as InstructGPT mixes pretraining
    in (arXiv 2203.02155, eq. 2).

    Args:
        alignment_weight: of the second term of `solopo`.
        text_weight: of the text's loss.
        arguments: of TRL's trainer; `data_collator` is a PairCollator.
    """

    def __init__(self, *, alignment_weight: float, text_weight: float, **arguments: Any) -> None:
        collator = arguments["data_collator"]
        self.objective = collator.objective
        self.kinds = collator.kinds
        self.alignment_weight = alignment_weight
        self.text_weight = text_weight
        super().__init__(**arguments)

    def compute_ref_log_probs(
        self, model: Any, inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed log-probabilities of answers under the reference.

        Args:
            model: the reference.
            inputs: a batch of PairCollator without the reference's log-probabilities.

        Returns:
            of the chosen answers `[P]`, with `solopo` `[P, 2]` for the short and the long prompt; of the rejected
            ones `[P]`.
        """
        inputs = dict(inputs)
        del inputs["kinds"]
        long, other = _take(inputs, LONG), _take(inputs, REFERENCE)
        answering = _Answering(model)
        chosen, rejected = super().compute_ref_log_probs(answering, other or inputs)
        if long:
            # TRL halves what it takes for chosen and rejected rows; here all are chosen ones
            chosen_long = torch.cat(super().compute_ref_log_probs(answering, long))
            chosen = torch.stack((chosen, chosen_long), dim=1)
        return chosen, rejected

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As it is: pairs are token ids already, and none is dropped."""
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["pair", "ref_chosen_logps", "ref_rejected_logps"]

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool) -> Any:
        inputs = dict(inputs)
        kinds, long, text = inputs.pop("kinds"), _take(inputs, LONG), _take(inputs, TEXT)
        reference_long = None
        if long:
            inputs["ref_chosen_logps"], reference_long = inputs["ref_chosen_logps"].unbind(1)
        answering = _Answering(model)
        loss = super()._compute_loss(answering, inputs, False)
        logps = answering.outputs[0].log_probs.sum(1)
        chosen, rejected = logps.chunk(2)
        self._count_by_kind(
            kinds, chosen - rejected > inputs["ref_chosen_logps"] - inputs["ref_rejected_logps"]
        )
        if reference_long is not None:
            labels = long["input_ids"].masked_fill(long["completion_mask"] == 0, -100)
            outputs = model(input_ids=long["input_ids"], labels=labels, use_cache=False, fused_lm_head=True)
            short_reward = self.beta * (chosen - inputs["ref_chosen_logps"])
            long_reward = self.beta * (outputs.log_probs.sum(1) - reference_long)
            distance = (long_reward - short_reward).abs().mean()
            self._metrics[self._mode]["alignment"].append(self._mean(distance))
            self._metrics[self._mode]["rewards/chosen_long"].append(self._mean(long_reward.mean()))
            loss = loss + self.alignment_weight * distance
            self._count_tokens(long["attention_mask"])
        if text and self.model.training:
            ids = text["input_ids"]
            outputs = model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True)
            text_loss = -outputs.log_probs.sum() / ids[:, 1:].numel()
            self._metrics["train"]["text_loss"].append(self._mean(text_loss))
            loss = loss + self.text_weight * text_loss
            self._count_tokens(torch.ones_like(ids))
        self.note_if_not_finite(loss.detach())
        return (loss, {}) if return_outputs else loss

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _count_tokens(self, mask: torch.Tensor) -> None:
        """Add rows that TRL has not counted."""
        if self.model.training:
            self._total_train_tokens += self.accelerator.gather(mask.sum()).sum().item()
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def _count_by_kind(self, kinds: torch.Tensor, right: torch.Tensor) -> None:
        """Note how often the reward of the chosen answer is the larger one, for each kind of pair."""
        kinds, right = self.accelerator.gather((kinds, right))
        for place, name in enumerate(self.kinds):
            ours = right[kinds == place]
            if len(ours):
                self._metrics[self._mode][f"rewards/accuracies/{name}"].append(ours.float().mean().item())

    def _mean(self, value: torch.Tensor) -> float:
        return self.accelerator.gather(value.detach()).mean().item()


class _Answering:
    """A model that is called without a mask, and whose outputs are kept.

    Rows are padded on the right and attention is causal, so that no token sees padding; a mask of [T, T] would
    cost more than the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.outputs: list[Any] = []

    def __call__(self, *, attention_mask: torch.Tensor | None = None, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        self.outputs.append(outputs)
        return outputs


def _take(inputs: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Remove the parts of a batch with a prefix, and give them without it."""
    names = [name for name in inputs if name.startswith(prefix)]
    return {name.removeprefix(prefix): inputs.pop(name) for name in names}
