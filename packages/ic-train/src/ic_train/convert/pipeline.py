"""The conversion of a whole model: measure, choose what stays rotary, convert; one layer in memory at a time.

Letters: B sequences, T tokens, D hidden_size, C kv_lora_rank, R qk_rope_head_dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from ic_train.convert.algebra import LatentAttention, Moments
from ic_train.convert.calibration import Windows
from ic_train.convert.factor import factor_query, latent_norm_weight, residual_scale
from ic_train.convert.forward import Block, latent_attention, mean_loss, source_attention
from ic_train.convert.latent import convert_attention
from ic_train.convert.options import ConversionOptions, check_options
from ic_train.convert.plans import RotaryPlanner
from ic_train.convert.rotary import Fold, RotaryPlan, RotaryStatistics
from ic_train.convert.source import Source, SourceLayer
from ic_train.convert.workspace import Workspace

DEEPSEEK_NORM_EPS = 1e-6
# sequences run through a layer at once
_BATCH_TOKENS = 8192
logger = logging.getLogger(__name__)

Hidden = dict[str, torch.Tensor]
Step = Callable[[int, SourceLayer, Block, Hidden], Hidden]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What came out, beside the layers in the workspace.

    Args:
        plan: what stays rotary.
        norm_eps: of the converted model.
        biased: whether it has biases.
        energy_kept: share of the weighted variance that the latent holds, per layer.
        losses: mean cross entropy on held-out text in nats, by step.
        searched: mean cross entropy of every plan that was tried, on the text to choose on.
    """

    plan: RotaryPlan
    norm_eps: float
    biased: bool
    energy_kept: list[float]
    losses: dict[str, float]
    searched: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerMeasures:
    """What all plans need to know of a layer."""

    moments: Moments
    statistics: RotaryStatistics


class Converter:
    """Runs the steps; each continues where an interrupted run stopped, with the same result.

    Args:
        source: the checkpoint.
        windows: token ids.
        measured: workspace of what depends on source and text only.
        device: to compute forward passes on; the algebra runs on the CPU.
    """

    def __init__(self, source: Source, windows: Windows, measured: Workspace, device: torch.device) -> None:
        self.source = source
        self.windows = windows
        self.measured = measured
        self.device = device

    def measure(self) -> float:
        """Take every layer's moments; the source's loss on held-out text."""
        if self.measured.has("measured.json"):
            return self.measured.load_json("measured.json")["loss"]

        def step(index: int, layer: SourceLayer, block: Block, hidden: Hidden) -> Hidden:
            self.measured.save(
                f"moments-{index:03d}.safetensors", {"second": self._second_moment(block, hidden)}
            )
            attend = source_attention(
                layer.attention, self.source.frequencies, self.source.score_factor, self.device
            )
            return {name: self._run(block, attend, states) for name, states in hidden.items()}

        ids = {"calibration": self.windows.calibration, "evaluation": self.windows.evaluation}
        hidden = self._stream("measure", self.measured, ids, step)
        loss = mean_loss(self.source, hidden["evaluation"].to(self.device), self.windows.evaluation)
        self.measured.save_json("measured.json", {"loss": loss})
        self.measured.remove("measure.safetensors")
        return loss

    def moments(self, index: int) -> Moments:
        """Of a layer's input, from `measure`."""
        return Moments(second=self.measured.load(f"moments-{index:03d}.safetensors")["second"])

    def measures(self, index: int, layer: SourceLayer) -> LayerMeasures:
        """A layer's moments, and what follows from them for every plan."""
        moments = self.moments(index)
        return LayerMeasures(moments=moments, statistics=RotaryStatistics(layer.attention, moments.damped()))

    def choose_plan(self, options: ConversionOptions) -> tuple[RotaryPlan, dict[str, float]]:
        """The plan with the lowest loss where only RoPE is cut; and the losses of all that were tried."""
        # depends on nothing else of the options: conversions to other ranks share it
        name = f"plan-{options.qk_rope_head_dim}-{options.frequencies}"
        if self.measured.has(f"{name}.json"):
            found = self.measured.load_json(f"{name}.json")
            return _plan_from(found["plan"]), found["searched"]
        planner = RotaryPlanner(self.source.frequencies, self.source.shape.kv_heads)
        for index in tqdm(range(self.source.num_layers), desc="energies", unit="layer"):
            planner.add_layer(self.measures(index, self.source.layer(index)).statistics)
        plans = planner.candidates(options.qk_rope_head_dim, standard=options.frequencies == "standard")
        searched: dict[str, float] = {}
        if len(plans) > 1:
            searched = self._compare(plans, name)
            plans.sort(key=lambda plan: searched[plan.name])
        self.measured.save_json(f"{name}.json", {"plan": asdict(plans[0]), "searched": searched})
        return plans[0], searched

    def convert(self, options: ConversionOptions, workspace: Workspace) -> Conversion:
        """Convert all layers into the workspace, `layer-NNN.safetensors` each.

        Raises:
            ValueError: an option asks for what the source does not have, or the disk is full.
        """
        check_options(options, self.source)
        losses = {"source": self.measure()}
        plan, searched = self.choose_plan(options)
        full_rank = 2 * self.source.shape.key_width - options.qk_rope_head_dim
        steps = ["partial_rope"]
        if options.kv_lora_rank < full_rank:
            steps.append("low_rank")
        if options.q_lora_rank is not None:
            steps.append("query_rank")
        if options.latent_norm:
            steps.append("latent_norm")
        eps = DEEPSEEK_NORM_EPS if options.latent_norm else self.source.norm_eps
        ids = dict.fromkeys(steps, self.windows.evaluation)
        if options.latent_norm:
            ids["source"] = self.windows.search
        work = _LayerWork(self, options, plan, steps, workspace, eps)
        hidden = self._stream("convert", workspace, ids, work)
        for name in steps:
            losses[name] = mean_loss(self.source, hidden[name].to(self.device), self.windows.evaluation)
        energies = [
            workspace.load_json(f"layer-{index:03d}.json")["energy_kept"]
            for index in range(self.source.num_layers)
        ]
        return Conversion(
            plan=plan,
            norm_eps=eps,
            biased=self.biased,
            energy_kept=energies,
            losses=losses,
            searched=searched,
        )

    @property
    def biased(self) -> bool:
        """Whether the converted model has biases: only where the source has."""
        return self.source.biased

    def one_layer(
        self, layer: SourceLayer, seen: LayerMeasures, plan: RotaryPlan, rank: int | None
    ) -> LatentAttention:
        """A converted layer; rank None: keys and values as they are."""
        return convert_attention(
            layer.attention,
            seen.moments,
            plan,
            self.source.frequencies,
            rank=rank,
            statistics=seen.statistics,
            score_factor=self.source.score_factor,
            biased=self.biased,
        )

    def _compare(self, plans: list[RotaryPlan], file: str) -> dict[str, float]:
        by_name = {plan.name: plan for plan in plans}

        def step(index: int, layer: SourceLayer, block: Block, hidden: Hidden) -> Hidden:
            advanced = {}
            seen = self.measures(index, layer)
            for name, plan in by_name.items():
                attention = self.one_layer(layer, seen, plan, None)
                attend = latent_attention(attention, torch.tensor(plan.frequencies), self.device)
                advanced[name] = self._run(block, attend, hidden[name])
            return advanced

        hidden = self._stream(file, self.measured, dict.fromkeys(by_name, self.windows.search), step)
        losses = {
            name: mean_loss(self.source, states.to(self.device), self.windows.search)
            for name, states in hidden.items()
        }
        self.measured.remove(f"{file}.safetensors")
        return losses

    def _stream(self, name: str, workspace: Workspace, ids: dict[str, torch.Tensor], step: Step) -> Hidden:
        """Run token ids through all layers; the states between two layers are on disk after each."""
        file = f"{name}.safetensors"
        first = 0
        if workspace.has(file):
            hidden = workspace.load(file)
            first = int(hidden.pop("layers"))
        else:
            embedding = self.source.embedding()
            hidden = {key: F.embedding(value, embedding).float() for key, value in ids.items()}
        bar = tqdm(total=self.source.num_layers, initial=first, desc=name, unit="layer")
        for index in range(first, self.source.num_layers):
            layer = self.source.layer(index)
            block = Block(layer, self.source.norm_eps, self.device)
            with torch.no_grad():
                hidden = step(index, layer, block, hidden)
            workspace.save(file, {**hidden, "layers": torch.tensor(index + 1)})
            bar.update()
        bar.close()
        return hidden

    def _run(self, block: Block, attend: Any, hidden: torch.Tensor) -> torch.Tensor:
        """One layer over all sequences, in batches; the states stay on the CPU."""
        batch = max(1, _BATCH_TOKENS // hidden.shape[1])
        return torch.cat([block(part.to(self.device), attend).cpu() for part in hidden.split(batch)])

    def _second_moment(self, block: Block, hidden: Hidden) -> torch.Tensor:
        states = hidden["calibration"]
        size = states.shape[-1] + 1
        # float64 where the states are: GPUs have it, too
        total = torch.zeros(size, size, dtype=torch.float64, device=self.device)
        batch = max(1, _BATCH_TOKENS // states.shape[1])
        for part in states.split(batch):
            x = block.attention_input(part.to(self.device)).flatten(0, 1).double()
            x = torch.cat((x, x.new_ones(len(x), 1)), dim=1)
            total += x.T @ x
        return (total / states.shape[:2].numel()).cpu()


class _LayerWork:
    """Converts one layer after the other, and carries the states of every lossy step beside each other."""

    def __init__(
        self,
        converter: Converter,
        options: ConversionOptions,
        plan: RotaryPlan,
        steps: list[str],
        workspace: Workspace,
        eps: float,
    ) -> None:
        self.converter, self.options, self.plan = converter, options, plan
        self.steps, self.workspace, self.eps = steps, workspace, eps
        self.frequencies = torch.tensor(plan.frequencies)

    def __call__(self, index: int, layer: SourceLayer, block: Block, hidden: Hidden) -> Hidden:
        """Save the converted layer and advance all states."""
        converter, source = self.converter, self.converter.source
        seen = converter.measures(index, layer)
        # where the rank cuts nothing, there is no step of its own for it
        rank = None if "low_rank" in self.steps else self.options.kv_lora_rank
        attention = converter.one_layer(layer, seen, self.plan, rank)
        advanced: Hidden = {}
        norm = query_factors = None
        for name in self.steps:
            if name == "low_rank":
                attention = converter.one_layer(layer, seen, self.plan, self.options.kv_lora_rank)
            elif name == "query_rank":
                assert self.options.q_lora_rank is not None
                query_factors = factor_query(
                    attention.query,
                    seen.moments.damped(),
                    self.options.q_lora_rank,
                    converter.biased,
                )
                attention = replace(attention, query=query_factors.product().view_as(attention.query))
            elif name == "latent_norm":
                x = block.attention_input(hidden["source"].to(converter.device)).cpu()
                norm = latent_norm_weight(attention.down[: self.options.kv_lora_rank], x, self.eps)
                if query_factors is not None:
                    query_factors = query_factors.normed(x, self.eps)
            attend = self._attend(attention, norm, query_factors)
            advanced[name] = converter._run(block, attend, hidden[name])
        if "source" in hidden:
            attend = source_attention(
                layer.attention, source.frequencies, source.score_factor, converter.device
            )
            advanced["source"] = converter._run(block, attend, hidden["source"])
        self._save(index, layer, attention, norm, query_factors)
        return advanced

    def _attend(self, attention: LatentAttention, norm: torch.Tensor | None, query_factors: Any) -> Any:
        device = self.converter.device
        plain = latent_attention(attention, self.frequencies, device, norm, self.eps)
        if query_factors is None or query_factors.norm is None:
            return plain
        return latent_attention(
            attention,
            self.frequencies,
            device,
            norm,
            self.eps,
            query=query_factors.function(device, self.eps),
        )

    def _save(
        self,
        index: int,
        layer: SourceLayer,
        attention: LatentAttention,
        norm: torch.Tensor | None,
        query_factors: Any,
    ) -> None:
        converter = self.converter
        scale = residual_scale(converter.source.norm_eps, self.eps)
        tensors: dict[str, torch.Tensor] = {}
        if query_factors is None:
            _put(tensors, "self_attn.q_proj", attention.query.flatten(0, 1), converter.biased)
        else:
            tensors |= query_factors.tensors(converter.biased)
        _put(tensors, "self_attn.kv_a_proj_with_mqa", attention.down, converter.biased)
        if norm is not None:
            tensors["self_attn.kv_a_layernorm.weight"] = norm
        tensors["self_attn.kv_b_proj.weight"] = attention.up.flatten(0, 1)
        tensors["self_attn.o_proj.weight"] = attention.output.flatten(1) * scale
        if converter.biased:
            bias = attention.output_bias
            assert bias is not None, "biased layers get one"
            tensors["self_attn.o_proj.bias"] = bias * scale
        for name, weight in layer.weights.items():
            tensors[f"{name}.weight"] = weight.double() * scale if name == "mlp.down_proj" else weight
        file = f"layer-{index:03d}"
        # float32 holds what any dtype of a checkpoint does, at half the disk of the algebra's
        self.workspace.save(f"{file}.safetensors", {name: value.float() for name, value in tensors.items()})
        self.workspace.save_json(f"{file}.json", {"energy_kept": attention.energy_kept})


def _put(tensors: dict[str, torch.Tensor], name: str, augmented: torch.Tensor, biased: bool) -> None:
    tensors[f"{name}.weight"] = augmented[:, :-1]
    if biased:
        tensors[f"{name}.bias"] = augmented[:, -1]
    else:
        assert not augmented[:, -1].any(), f"{name} has a bias and nowhere to put it"


def _plan_from(fields: dict[str, Any]) -> RotaryPlan:
    return RotaryPlan(
        name=fields["name"],
        folds=tuple(Fold(**fold) for fold in fields["folds"]),
        kept=tuple(fields["kept"]),
        frequencies=tuple(fields["frequencies"]),
        distance_tokens=fields["distance_tokens"],
    )
