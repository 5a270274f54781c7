"""Configuration of an InfiniteContext model: fields, their units, and what values they accept."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

# letters used throughout the package: D hidden_size, N num_attention_heads, C kv_lora_rank,
# R qk_rope_head_dim, P qk_nope_head_dim, V v_head_dim.
_POSITIVE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "max_position_embeddings",
)
ROPE_TYPES = ("default", "yarn", "explicit")
_YARN_FIELDS = {
    "rope_type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
}


@strict
class ICConfig(PreTrainedConfig):
    """Shape and behaviour of an InfiniteContext model (Multi-Head Latent Attention).

    The attention is DeepSeek-V3's (arXiv 2412.19437, section 2.1.1); field names are those of
    `transformers.DeepseekV3Config` wherever the meaning is the same.

    Args:
        vocab_size: number of tokens, rows of the embedding.
        hidden_size: model width D.
        intermediate_size: width of the SwiGLU feed-forward block.
        num_hidden_layers: number of blocks.
        num_attention_heads: query heads N. MLA expands the latent to one key and value per head.
        q_lora_rank: rank of the query's own latent, or None for a full-rank query projection.
        kv_lora_rank: rank C of the joint key-value latent.
        qk_nope_head_dim: dimensions P per head without position.
        qk_rope_head_dim: dimensions R of the rotary key that all heads share; even.
        v_head_dim: dimensions V of a head's value.
        kv_latent_norm: whether an RMSNorm follows the key-value latent. DeepSeek-V3 always has it;
            checkpoints converted from other attention do not.
        q_latent_norm: the same for the query's latent; without `q_lora_rank` it has no effect.
        max_position_embeddings: the longest context in tokens that the model is meant for.
        rope_parameters: `{"rope_type": "default", "rope_theta": ...}`, or DeepSeek-V3's YaRN:
            `rope_type="yarn"` with `factor` and `original_max_position_embeddings` (tokens), and
            optionally `beta_fast`, `beta_slow`, `mscale`, `mscale_all_dim`; or `rope_type="explicit"` with
            `inverse_frequencies`, a list of R / 2 angles in radians per token, as converted models have it.
        attention_bias: whether the query projection (its last one), `kv_a_proj_with_mqa` and `o_proj` have
            biases. DeepSeek-V3 has none; models converted from ones with biases do.
        rms_norm_eps: epsilon of every RMSNorm.
        hidden_act: activation of the feed-forward gate; only "silu" is accepted.
        tie_word_embeddings: whether the output projection is the embedding.

    Raises:
        ValueError: a field has a value that the model cannot use. The message names the field,
            the value and what is accepted.
    """

    model_type = "infinite_context"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 49152
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 18
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    q_lora_rank: int | None = 768
    kv_lora_rank: int = 256
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    kv_latent_norm: bool = True
    q_latent_norm: bool = True
    attention_bias: bool = False
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    rope_parameters: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Complete the derived fields and validate all of them."""
        self.rope_parameters = self._complete_rope(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        # what transformers' RoPE functions take as the rotary dimension, as in DeepseekV3Config
        self.head_dim = self.qk_rope_head_dim
        self._validate_shapes()
        # before transformers completes the dictionary: it would fill in a missing original length
        self._validate_rope()
        super().__post_init__(**kwargs)

    @property
    def latent_dim(self) -> int:
        """Numbers cached per token and layer: C + R."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def _complete_rope(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """RoPE's parameters; fields of older transformers releases take their place in the dictionary."""
        legacy = kwargs.pop("rope_scaling", None) or {}
        theta = kwargs.pop("rope_theta", None)
        rope = {**legacy, **(self.rope_parameters or {})}
        if theta is not None:
            rope.setdefault("rope_theta", theta)
        old_type = rope.pop("type", "default")
        if rope.get("rope_type", old_type) == "explicit":
            # transformers puts its default there when it reads a configuration; the angles are given already
            rope.pop("rope_theta", None)
        return {"rope_type": old_type, **(rope or {"rope_theta": 10000.0})}

    def _validate_shapes(self) -> None:
        for field in _POSITIVE_FIELDS:
            value = getattr(self, field)
            if not _is_count(value):
                raise ValueError(f"{field} is {value!r}; it must be an integer of at least 1")
        if self.q_lora_rank is not None and not _is_count(self.q_lora_rank):
            raise ValueError(
                f"q_lora_rank is {self.q_lora_rank!r}; it must be an integer of at least 1, or None for a "
                "full-rank query"
            )
        pad = self.pad_token_id
        if pad is not None and not (_is_number(pad) and 0 <= pad < self.vocab_size):
            raise ValueError(
                f"pad_token_id is {pad!r}; it must be None or 0 to vocab_size - 1 ({self.vocab_size - 1})"
            )
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim is {self.qk_rope_head_dim}; it must be even (RoPE rotates pairs)"
            )
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads is {self.num_key_value_heads}; with MLA it must equal "
                f"num_attention_heads ({self.num_attention_heads}) or be left out"
            )
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act is {self.hidden_act!r}; only 'silu' is accepted")
        if not (_is_number(self.rms_norm_eps) and self.rms_norm_eps > 0):
            raise ValueError(f"rms_norm_eps is {self.rms_norm_eps!r}; it must be a number above 0")

    def _validate_rope(self) -> None:
        rope = self.rope_parameters
        assert rope is not None
        rope_type = rope.get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_parameters['rope_type'] is {rope_type!r}; accepted: {', '.join(ROPE_TYPES)}"
            )
        accepted = {
            "default": {"rope_type", "rope_theta"},
            "yarn": _YARN_FIELDS,
            "explicit": {"rope_type", "inverse_frequencies"},
        }[rope_type]
        unknown = sorted(set(rope) - accepted)
        if unknown:
            raise ValueError(
                f"rope_parameters has unknown keys {unknown}; accepted for rope_type {rope_type!r}: "
                f"{sorted(accepted)}"
            )
        if rope_type == "explicit":
            self._check_frequencies(rope.get("inverse_frequencies"))
            return
        self._check_rope_number("rope_theta", above=0)
        if rope_type == "yarn":
            self._check_rope_number("factor", least=1)
            # the context in tokens that the model had before the extension
            self._check_rope_number("original_max_position_embeddings", least=1)
            for optional in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
                if rope.get(optional) is not None:
                    self._check_rope_number(optional, least=0)

    def _validate_explicit_rope_parameters(self, rope: dict[str, Any], **_: Any) -> None:
        """The hook by which transformers validates a type of RoPE; `_validate_rope` has done it."""

    def _check_frequencies(self, value: Any) -> None:
        pairs = self.qk_rope_head_dim // 2
        listed = isinstance(value, list | tuple) and len(value) == pairs
        if not (listed and all(_is_number(one) and one >= 0 for one in value)):
            shown = f"{len(value)} entries" if isinstance(value, list | tuple) else repr(value)
            raise ValueError(
                f"rope_parameters['inverse_frequencies'] is {shown}; it must be a list of "
                f"qk_rope_head_dim / 2 = {pairs} finite numbers of at least 0"
            )

    def _check_rope_number(self, name: str, *, above: float = -math.inf, least: float = -math.inf) -> None:
        assert self.rope_parameters is not None
        value = self.rope_parameters.get(name)
        if not (_is_number(value) and value > above and value >= least):
            bound = f"above {above}" if above > -math.inf else f"of at least {least}"
            raise ValueError(f"rope_parameters[{name!r}] is {value!r}; it must be a number {bound}")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


__all__ = ["ICConfig"]
