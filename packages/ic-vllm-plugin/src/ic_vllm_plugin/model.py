"""InfiniteContext in vLLM: the model from vLLM's own layers, so that tensor and pipeline parallelism, LoRA
and quantisation are vLLM's.

Letters: T tokens of the batch (all requests in one row), N heads of this rank, D hidden_size, C
kv_lora_rank, R qk_rope_head_dim, P qk_nope_head_dim, V v_head_dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from ic_model.rope import apply_interleaved_rope, cos_sin_scale, inverse_frequencies, softmax_scale
from ic_model.weights import VLLM_MERGED
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from ic_vllm_plugin import compat
from ic_vllm_plugin.gpu_defaults import asked_for_vllms_backend
from ic_vllm_plugin.workspace import count_in_profile

if TYPE_CHECKING:
    from ic_model.configuration import ICConfig


# as VLLM_MERGED, for a model that `fuses_down_projections`
FUSED_DOWN_PROJECTIONS = {
    ".q_a_proj.": (".fused_qkv_a_proj.", 0),
    ".kv_a_proj_with_mqa.": (".fused_qkv_a_proj.", 1),
}


def fuses_down_projections(config: ICConfig, vllm_config: VllmConfig) -> bool:
    """Whether queries' and keys' down-projections are one matrix product, as in vLLM's DeepSeek-V3.

    It saves each layer a launch. Adapters and quantisation know either layer by its own name, and have them apart.

    Args:
        config: of the model.
        vllm_config: of the engine.
    """
    apart = vllm_config.lora_config is not None or vllm_config.quant_config is not None
    return config.q_lora_rank is not None and not config.attention_bias and not apart


class FeedForward(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ICConfig, *, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )
        self.act_fn = SiluAndMul()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[T, D]` to `[T, D]`."""
        return self.down_proj(self.act_fn(self.gate_up_proj(hidden)[0]))[0]


class LatentAttention(nn.Module):
    """DeepSeek-V3's attention (arXiv 2412.19437, section 2.1.1), each latent norm optional."""

    def __init__(self, config: ICConfig, vllm_config: VllmConfig, *, prefix: str) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        if config.num_attention_heads % ranks:
            raise ValueError(
                f"tensor_parallel_size is {ranks}; it must divide num_attention_heads "
                f"({config.num_attention_heads})"
            )
        self.num_heads = config.num_attention_heads // ranks
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.latent_rank, self.value_dim = config.kv_lora_rank, config.v_head_dim
        self._build_projections(config, vllm_config, prefix)
        backend = _attention_backend(vllm_config)
        self.mla_attn = compat.MLAAttention(
            num_heads=self.num_heads,
            scale=softmax_scale(config),
            qk_nope_head_dim=self.nope_dim,
            qk_rope_head_dim=self.rope_dim,
            v_head_dim=self.value_dim,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=self.latent_rank,
            kv_b_proj=self.kv_b_proj,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
            attn_backend=backend,
        )
        if backend is not None and not compat.is_cpu():
            count_in_profile(vllm_config, self.mla_attn)

    def _build_projections(self, config: ICConfig, vllm_config: VllmConfig, prefix: str) -> None:
        quant_config = vllm_config.quant_config
        biased = ("q_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj") if config.attention_bias else ()

        def linear(cls: type[nn.Module], name: str, inputs: int, outputs: int) -> nn.Module:
            return cls(
                inputs, outputs, bias=name in biased, quant_config=quant_config, prefix=f"{prefix}.{name}"
            )

        heads, eps = config.num_attention_heads, config.rms_norm_eps
        query_dim = heads * config.qk_head_dim
        # None in place of an identity module: state-dict names stay those of the checkpoint
        self.q_a_layernorm = self.kv_a_layernorm = None
        self.q_proj = self.fused_qkv_a_proj = None
        self.q_lora_rank = config.q_lora_rank
        if config.q_lora_rank is None:
            self.q_proj = linear(ColumnParallelLinear, "q_proj", config.hidden_size, query_dim)
        else:
            if fuses_down_projections(config, vllm_config):
                self.fused_qkv_a_proj = MergedColumnParallelLinear(
                    config.hidden_size,
                    [config.q_lora_rank, config.latent_dim],
                    bias=False,
                    prefix=f"{prefix}.fused_qkv_a_proj",
                    # every rank has all of both
                    disable_tp=True,
                )
            else:
                self.q_a_proj = linear(ReplicatedLinear, "q_a_proj", config.hidden_size, config.q_lora_rank)
            if config.q_latent_norm:
                self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=eps)
            self.q_b_proj = linear(ColumnParallelLinear, "q_b_proj", config.q_lora_rank, query_dim)
        if self.fused_qkv_a_proj is None:
            self.kv_a_proj_with_mqa = linear(
                ReplicatedLinear, "kv_a_proj_with_mqa", config.hidden_size, config.latent_dim
            )
        if config.kv_latent_norm:
            self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps=eps)
        self.kv_b_proj = linear(
            ColumnParallelLinear, "kv_b_proj", config.kv_lora_rank, heads * (self.nope_dim + self.value_dim)
        )
        self.o_proj = linear(RowParallelLinear, "o_proj", heads * self.value_dim, config.hidden_size)

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`[T, D]` to `[T, D]`; cos and sin are `[T, R / 2]` float32."""
        query, latent_row = self._project(hidden)
        query = query.view(-1, self.num_heads, self.nope_dim + self.rope_dim)
        latent, rope_key = latent_row.split([self.latent_rank, self.rope_dim], dim=-1)
        if self.kv_a_layernorm is not None:
            latent = self.kv_a_layernorm(latent)
        nope, rope = query.split([self.nope_dim, self.rope_dim], dim=-1)
        query = torch.cat((nope, apply_interleaved_rope(rope, cos.unsqueeze(1), sin.unsqueeze(1))), dim=-1)
        attended = self.mla_attn(
            query,
            latent,
            apply_interleaved_rope(rope_key, cos, sin).unsqueeze(1),
            output_shape=(hidden.shape[0], self.num_heads * self.value_dim),
        )
        return self.o_proj(attended)[0]

    def _project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[T, D]` to queries `[T, N * (P + R)]` and latent rows `[T, C + R]`, neither normed nor rotated."""
        if self.q_proj is not None:
            return self.q_proj(hidden)[0], self.kv_a_proj_with_mqa(hidden)[0]
        if self.fused_qkv_a_proj is not None:
            both = self.fused_qkv_a_proj(hidden)[0]
            latent, latent_row = both.split([self.q_lora_rank, self.latent_rank + self.rope_dim], dim=-1)
        else:
            latent, latent_row = self.q_a_proj(hidden)[0], self.kv_a_proj_with_mqa(hidden)[0]
        if self.q_a_layernorm is not None:
            latent = self.q_a_layernorm(latent)
        return self.q_b_proj(latent)[0], latent_row


class DecoderLayer(nn.Module):
    """Pre-norm block: attention, then feed-forward."""

    def __init__(self, vllm_config: VllmConfig, *, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = LatentAttention(config, vllm_config, prefix=f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config, quant_config=vllm_config.quant_config, prefix=f"{prefix}.mlp")

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`hidden` and `residual` `[T, D]`, whose sum is the block's input, to the same of its output."""
        if residual is None:
            residual = hidden
            hidden = self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(hidden, cos, sin)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


# every tensor's first dimension is the step's number of tokens
@compat.support_torch_compile(
    dynamic_arg_dims=dict.fromkeys(("input_ids", "positions", "intermediate_tensors", "inputs_embeds"), 0)
)
class InfiniteContextModel(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        pipeline = get_pp_group()
        holds_embedding = pipeline.is_first_rank or (config.tie_word_embeddings and pipeline.is_last_rank)
        self.embed_tokens = (
            VocabParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.embed_tokens",
            )
            if holds_embedding
            else PPMissingLayer()
        )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: DecoderLayer(vllm_config, prefix=prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = (
            RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            if pipeline.is_last_rank
            else PPMissingLayer()
        )
        # angles are computed as they are needed: a table of a million positions would take 256 MiB
        # vLLM builds models inside `with device:` and moves nothing afterwards
        frequencies = inverse_frequencies(config).to(torch.get_default_device())
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)
        self.cos_sin_scale = cos_sin_scale(config)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`[T]` token ids to `[T, D]`."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """`[T]` ids and `[T]` positions to `[T, D]`, or to the next pipeline stage's input."""
        residual: torch.Tensor | None
        if get_pp_group().is_first_rank:
            if inputs_embeds is None:
                assert input_ids is not None
                inputs_embeds = self.embed_input_ids(input_ids)
            hidden = inputs_embeds
            residual = None
        else:
            assert intermediate_tensors is not None
            hidden, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        # float32 holds every position up to 2 ** 24 exactly
        angles = positions.to(torch.float32).unsqueeze(-1) * self.inverse_frequencies
        cos, sin = angles.cos() * self.cos_sin_scale, angles.sin() * self.cos_sin_scale
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden, residual = layer(hidden, residual, cos, sin)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden, "residual": residual})
        return self.norm(hidden, residual)[0]


class InfiniteContextForCausalLM(nn.Module, SupportsLoRA, SupportsPP):
    """The architecture as vLLM serves it; `config.json`'s `architectures` names it."""

    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.quantised = vllm_config.quant_config is not None
        fused = fuses_down_projections(config, vllm_config)
        self.merged = VLLM_MERGED | (FUSED_DOWN_PROJECTIONS if fused else {})
        if vllm_config.lora_config is not None:
            compat.refuse_lora_on("kv_b_proj")
        self.model = InfiniteContextModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        if not get_pp_group().is_last_rank:
            self.lm_head = PPMissingLayer()
        else:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`[T]` token ids to `[T, D]`."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """`[T]` ids and `[T]` positions to the final hidden states `[T, D]`."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """`[T, D]` to logits `[T, vocabulary]`, on the ranks that vLLM asks for them."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copy a checkpoint's tensors into this rank's parameters.

        Raises:
            ValueError: names the tensors that the model does not know, or the parameters that the
                checkpoint lacks. Quantised models may lack some: their layers make those themselves.
        """
        parameters = dict(self.named_parameters())
        loaded: set[str] = set()
        unexpected: list[str] = []
        for name, tensor in weights:
            target, part = self._target(name)
            if is_pp_missing_parameter(target, self):
                continue
            if target == "lm_head.weight" and self.config.tie_word_embeddings:
                # the embedding is loaded under its own name; some writers store it twice
                continue
            parameter = parameters.get(target)
            if parameter is None:
                if not (self.quantised and _is_group_order(name, tensor)):
                    unexpected.append(name)
                continue
            loader = getattr(parameter, "weight_loader", default_weight_loader)
            loader(parameter, tensor) if part is None else loader(parameter, tensor, part)
            loaded.add(target)
        self._check_loaded(sorted(unexpected), sorted(set(parameters) - loaded))
        return loaded

    def _target(self, name: str) -> tuple[str, int | None]:
        """A checkpoint tensor's parameter here, and which part of it."""
        for stored, (merged, part) in self.merged.items():
            if stored in name:
                return name.replace(stored, merged), part
        return name, None

    def _check_loaded(self, unexpected: list[str], missing: list[str]) -> None:
        if unexpected:
            raise ValueError(
                f"the checkpoint has {len(unexpected)} tensors that {compat.ARCHITECTURE} does not know: "
                f"{', '.join(unexpected)}. Compare config.json (q_lora_rank, kv_latent_norm, "
                "q_latent_norm, num_hidden_layers, tie_word_embeddings) with the checkpoint."
            )
        if missing and not self.quantised:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} tensors of {compat.ARCHITECTURE}: {', '.join(missing)}"
            )


def _is_group_order(name: str, tensor: torch.Tensor) -> bool:
    """Whether it is GPTQ's list of groups in their natural order, which vLLM's kernels take for granted."""
    return name.endswith(".g_idx") and bool((tensor.diff() >= 0).all())


def _attention_backend(vllm_config: VllmConfig) -> Any:
    """Ours, unless the user asked for one of vLLM's by name, or our kernels do not run: None lets vLLM choose."""
    if compat.is_cpu():
        from ic_vllm_plugin.cpu_backend import CPULatentBackend

        return CPULatentBackend
    if not compat.is_cuda() or asked_for_vllms_backend(vllm_config):
        return None
    from ic_vllm_plugin.attention import LatentBackend

    return LatentBackend
