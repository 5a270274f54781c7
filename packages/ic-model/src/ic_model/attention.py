"""Multi-Head Latent Attention as one module with two equal ways to compute it.

DeepSeek-V3 (arXiv 2412.19437, section 2.1.1, eqs. 1 to 11). Expanded: keys and values of every head are
rebuilt from the latent, then ordinary attention; for training and prefill. Absorbed: the up-projections
move to the query and to the output, and all heads attend to the latent rows themselves (DeepSeek-V2,
arXiv 2405.04434, section 2.1.2); for decoding.

Letters: B batch, T query tokens, S cached tokens, N heads, D model width, C kv_lora_rank,
R qk_rope_head_dim, P qk_nope_head_dim, V v_head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ic_model.cache import LatentLayer
from ic_model.configuration import ICConfig
from ic_model.ops.dispatch import kernel_refuses
from ic_model.ops.mla_decode import latent_attention
from ic_model.ops.rms_norm import rms_norm
from ic_model.ops.rope import rope
from ic_model.rope import apply_interleaved_rope, softmax_scale

# what the absorbed path can stand in for: eager has to return its weights, and the masks of the others are no
# tensors of [T, S]; those decode through the expanded path
_ABSORBING = ("sdpa",)

# rows from which norm and rotation run as kernels. With few, as when a token is decoded, time goes to choosing and
# launching them from Python; where that begins to pay has not been measured
KERNEL_ROWS = 256


class ICRMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467, eq. 4), computed in float32.

    Args:
        dim: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Norm rows, after adding a residual where there is one.

        Args:
            x: `[..., dim]`.
            residual: like x, or None.

        Returns:
            `[..., dim]` in the widest dtype of x, residual and weight; with a residual also the sum, in the
            wider of x and residual.
        """
        if residual is not None and residual.dtype != x.dtype:
            # autocast: projections give 16 bits, and what they are added to has 32
            total = residual + x
            return self(total), total
        if self.weight.dtype in (x.dtype, torch.float32) and _kernels_pay(x):
            return rms_norm(x, self.weight, epsilon=self.eps, residual=residual)
        total = x if residual is None else residual + x
        normed = F.rms_norm(total.float(), (total.shape[-1],), eps=self.eps)
        out = self.weight * normed.to(total.dtype)
        return out if residual is None else (out, total)

    def extra_repr(self) -> str:
        """Shape and epsilon, for print(model)."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class ICAttention(nn.Module):
    """One layer's attention.

    Parameters carry the names of transformers' DeepseekV3Attention. A latent norm that the configuration
    switches off has no parameter.

    Args:
        config: shapes; see ICConfig.
        layer_idx: which layer of a cache is this one's.
    """

    def __init__(self, config: ICConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.num_key_value_groups = 1
        self.attention_dropout = 0.0
        self.scaling = softmax_scale(config)
        heads, width = config.num_attention_heads, config.hidden_size
        query_width, bias = heads * config.qk_head_dim, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(width, query_width, bias=bias)
        else:
            self.q_a_proj = nn.Linear(width, config.q_lora_rank, bias=False)
            self.q_a_layernorm = _optional_norm(config.q_latent_norm, config.q_lora_rank, config.rms_norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_width, bias=bias)
        self.kv_a_proj_with_mqa = nn.Linear(width, config.latent_dim, bias=bias)
        self.kv_a_layernorm = _optional_norm(config.kv_latent_norm, config.kv_lora_rank, config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * config.v_head_dim, width, bias=bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            hidden_states: `[B, T, D]`.
            position_embeddings: cos and sin, each `[B, T, R / 2]` float32.
            attention_mask: what transformers' mask functions made for the attention implementation.
            past_key_values: cache to append to, or None.

        Returns:
            the output `[B, T, D]`, and the attention weights where the implementation returns them.
        """
        q_nope, q_rope = self._queries(hidden_states, position_embeddings)
        latent, k_rope = self._latent_rows(hidden_states, position_embeddings)
        seen_tokens = 0
        if past_key_values is not None:
            seen_tokens = past_key_values.get_seq_length(self.layer_idx)
            latent, k_rope = (
                part[:, 0]
                for part in past_key_values.update(latent[:, None], k_rope[:, None], self.layer_idx)
            )
        if seen_tokens and self._absorbed_is_cheaper(hidden_states.shape[1]):
            rows = self._rows(past_key_values, latent, k_rope)
            context, weights = self._absorbed(q_nope, q_rope, rows, attention_mask), None
        else:
            context, weights = self._expanded(q_nope, q_rope, latent, k_rope, attention_mask, **kwargs)
        return self.o_proj(context.flatten(2)), weights

    def up_projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The two halves of `kv_b_proj`: keys `[N, P, C]` and values `[N, V, C]`."""
        config = self.config
        per_head = self.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1))
        key, value = per_head.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        return key, value

    def _queries(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries without position `[B, T, N, P]` and rotated `[B, T, N, R]`."""
        config = self.config
        if config.q_lora_rank is None:
            q = self.q_proj(hidden_states)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        q = q.unflatten(-1, (config.num_attention_heads, config.qk_head_dim))
        q_nope, q_rope = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        return q_nope, _rotate(q_rope, *position_embeddings)

    def _latent_rows(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed latent `[B, T, C]` and the rotated shared key `[B, T, R]`."""
        config = self.config
        latent, k_rope = self.kv_a_proj_with_mqa(hidden_states).split(
            [config.kv_lora_rank, config.qk_rope_head_dim], dim=-1
        )
        # one head, shared by all
        k_rope = _rotate(k_rope[:, :, None], *position_embeddings)[:, :, 0]
        return self.kv_a_layernorm(latent), k_rope

    def _absorbed_is_cheaper(self, query_tokens: int) -> bool:
        """Whether absorbing costs fewer operations than expanding every cached row.

        Per cached token and head, expanding costs C (P + V) products once and P + R + V per query;
        absorbing costs 2 C + R per query.
        """
        config = self.config
        if config._attn_implementation not in _ABSORBING:
            return False
        per_head = config.qk_nope_head_dim + config.v_head_dim
        return query_tokens * (2 * config.kv_lora_rank - per_head) < config.kv_lora_rank * per_head

    def _rows(self, cache: Cache | None, latent: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
        """Cached rows `[B, S, C + R]`; without a copy where the cache keeps them in one buffer."""
        layer = None if cache is None else cache.layers[self.layer_idx]
        return layer.rows if isinstance(layer, LatentLayer) else torch.cat((latent, k_rope), dim=-1)

    def _absorbed(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        rows: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention output `[B, T, N, V]` over latent rows `[B, S, C + R]`."""
        key_up, value_up = self.up_projections()
        q_latent = torch.einsum("btnp,npc->btnc", q_nope, key_up.to(q_nope.dtype))
        mask = None
        if attention_mask is not None:
            mask = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
            mask = mask[:, 0, :, : rows.shape[1]]
        out, _ = latent_attention(
            torch.cat((q_latent, q_rope), dim=-1),
            rows,
            kv_lora_rank=self.config.kv_lora_rank,
            softmax_scale=self.scaling,
            mask=mask,
        )
        return torch.einsum("btnc,nvc->btnv", out, value_up.to(out.dtype))

    def _expanded(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention output `[B, T, N, V]` and weights, over keys and values rebuilt for every head."""
        config = self.config
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            config._attn_implementation, eager_attention
        )
        if getattr(attend, "takes_latent_rows", False):
            # ring attention sends rows from GPU to GPU, which are a fraction of what they expand to
            return attend(self, q_nope, q_rope, latent, k_rope, scaling=self.scaling, **kwargs), None
        key_value = self.kv_b_proj(latent).unflatten(-1, (config.num_attention_heads, -1))
        k_nope, value = key_value.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        shared = k_rope[:, :, None].expand(-1, -1, config.num_attention_heads, -1)
        query = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)
        key = torch.cat((k_nope, shared), dim=-1).transpose(1, 2)
        # PyTorch's flash attention on the CPU wants values as wide as keys; without it the scores of all tokens
        # with all others are kept, and long prefills take several times as long
        missing_width = config.qk_head_dim - config.v_head_dim
        padded = value.device.type == "cpu" and config._attn_implementation == "sdpa" and missing_width > 0
        if padded:
            value = F.pad(value, (0, missing_width))
        output, weights = attend(
            self,
            query,
            key,
            value.transpose(1, 2),
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return (output[..., : config.v_head_dim] if padded else output), weights


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with its weights materialised, in the signature of transformers' attention functions.

    Args:
        module: the attention module; unused, part of the signature.
        query: `[B, N, T, P + R]`.
        key: `[B, N, S, P + R]`.
        value: `[B, N, S, V]`.
        attention_mask: additive, broadcastable to `[B, N, T, S]`, or None where every query sees every key.
        scaling: softmax scale.
        dropout: unused, the model has no attention dropout.

    Returns:
        the output `[B, T, N, V]` and the weights `[B, N, T, S]`.
    """
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _kernels_pay(x: torch.Tensor) -> bool:
    """Whether norm and rotation of `[..., dim]` run as kernels of their own: many rows, on a GPU that can."""
    # torch.compile fuses them by itself, with what is around them
    compiling = torch.compiler.is_compiling()
    return not compiling and x.shape[:-1].numel() >= KERNEL_ROWS and kernel_refuses(x) is None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions of `[B, T, heads, R]`, with tables `[B or 1, T, R / 2]`."""
    if _kernels_pay(x):
        return rope(x, cos, sin)
    return apply_interleaved_rope(x, cos[:, :, None], sin[:, :, None])


def _optional_norm(wanted: bool, dim: int, eps: float) -> nn.Module:
    return ICRMSNorm(dim, eps) if wanted else nn.Identity()
