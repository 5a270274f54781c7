"""The model for transformers: blocks, ICModel and ICForCausalLM.

Letters: B batch, T tokens, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.output_capturing import capture_outputs

from ic_model.attention import ICAttention, ICRMSNorm
from ic_model.cache import LatentCache
from ic_model.configuration import ICConfig
from ic_model.rope import rope_tables


class ICMLP(nn.Module):
    """SwiGLU feed-forward block (arXiv 2002.05202): `down(silu(gate(x)) * up(x))`, width F inside."""

    def __init__(self, config: ICConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, T, D]` to `[B, T, D]`."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ICDecoderLayer(GradientCheckpointingLayer):
    """One block: attention, then feed-forward, each behind its norm and around its residual."""

    def __init__(self, config: ICConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = ICAttention(config, layer_idx)
        self.mlp = ICMLP(config)
        self.input_layernorm = ICRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = ICRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Map `[B, T, D]` to `[B, T, D]`; the keywords are ICAttention's."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        normed, hidden_states = self.post_attention_layernorm(attended, residual=hidden_states)
        return hidden_states + self.mlp(normed)


class ICPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the architecture."""

    config_class = ICConfig
    config: ICConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ICDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": ICDecoderLayer, "attentions": ICAttention}


class ICModel(ICPreTrainedModel):
    """The decoder without its output projection.

    Args:
        config: shapes; see ICConfig.
    """

    def __init__(self, config: ICConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            ICDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = ICRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: `[B, T]` token ids, or None with `inputs_embeds`.
            attention_mask: `[B, S + T]`, 0 where a token is padding; None where none is.
            position_ids: `[B, T]` or `[1, T]`; positions may jump (position-skipping training does that).
                They only place tokens: unlike in other transformers models a jump does not start a new
                document, and packed sequences need an explicit mask. Default: 0, 1, ... after the cache.
            past_key_values: cache; a LatentCache, or any transformers cache.
            inputs_embeds: `[B, T, D]` instead of `input_ids`.
            use_cache: whether to return a cache; default: the configuration's, and never in training.

        Returns:
            `last_hidden_state [B, T, D]` and `past_key_values`.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds` are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = LatentCache(self.config.num_hidden_layers)
        if position_ids is None:
            seen_tokens = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (
                torch.arange(hidden_states.shape[1], device=hidden_states.device)[None] + seen_tokens
            )
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            # transformers would read a jump in the positions as the start of another document
            position_ids=None,
        )
        position_embeddings = rope_tables(self.config, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )


class InfiniteContextForCausalLM(ICPreTrainedModel, GenerationMixin):
    """The decoder with its output projection; what `AutoModelForCausalLM` loads.

    transformers writes the class's name into config.json as the architecture, and vLLM finds the model by it.

    Args:
        config: shapes; see ICConfig.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: ICConfig) -> None:
        super().__init__(config)
        self.model = ICModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the decoder and predict the next token.

        Args:
            labels: `[B, T]` token ids, -100 where no loss is wanted; shifted inside.
            logits_to_keep: last tokens to compute logits for, or a tensor of indices; 0 means all.
            The others are ICModel's.

        Returns:
            `logits [B, T or logits_to_keep, vocab_size]`, the mean `loss` where labels are given, and the
            cache.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        # the default cache would hold the same numbers, but copies all of them for every new token
        cache = model_kwargs.get("past_key_values")
        if given is None and type(cache) is DynamicCache and not cache.offloading:
            model_kwargs["past_key_values"] = LatentCache(self.config.num_hidden_layers)


ICForCausalLM = InfiniteContextForCausalLM
