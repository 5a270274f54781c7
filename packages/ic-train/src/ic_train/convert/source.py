"""What is converted: checkpoints of the Llama family, checked, and read one layer at a time.

Letters: D hidden_size, N query heads, G key-value heads, d head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ic_train.convert.algebra import AttentionShape, SourceAttention
from ic_train.convert.readers import (
    GGUF_FREQUENCY_FACTORS,
    GgufTensors,
    SafetensorsReader,
    TensorReader,
)

ACCEPTED = ("llama", "mistral", "qwen2")
# model_type: why it cannot be converted
REFUSED = {
    "qwen3": "it norms queries and keys per head, between projection and RoPE: a key is then no "
    "linear function of "
    "the token, and no latent that all heads share can hold it exactly"
}
SCALED_ROPE = ("linear", "llama3", "yarn")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MATRICES = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceLayer:
    """One block: its attention in float64, and its other weights as they are stored, by name within the layer."""

    attention: SourceAttention
    weights: dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A checkpoint to convert.

    Args:
        path: folder or GGUF file.
        name: for the record.
        config: transformers' configuration.
        shape: of the attention.
        norm_eps: epsilon of its norms.
        frequencies: `[d / 2]` float32, radians per token, scaling included.
        score_factor: what scores are multiplied by beside `d ** -0.5` (YaRN's temperature).
        context_tokens: as far as the source attends to everything.
        dtype: of the weights as they are stored, float32 for GGUF.
        biased: whether its attention has biases.
        reader: its tensors.
        tokenizer: its tokenizer.
    """

    path: Path
    name: str
    config: Any
    shape: AttentionShape
    norm_eps: float
    frequencies: torch.Tensor
    score_factor: float
    context_tokens: int
    dtype: torch.dtype
    biased: bool
    reader: TensorReader
    tokenizer: PreTrainedTokenizerBase

    @property
    def num_layers(self) -> int:
        """Blocks."""
        return self.config.num_hidden_layers

    @property
    def tied(self) -> bool:
        """Whether the output projection is the embedding."""
        return "lm_head.weight" not in self.reader.names or bool(self.config.tie_word_embeddings)

    @property
    def kv_numbers_per_layer(self) -> int:
        """Numbers that the source caches per token and layer: 2 G d."""
        return 2 * self.shape.key_width

    def embedding(self) -> torch.Tensor:
        """`[vocabulary, D]`."""
        return self.reader.read("model.embed_tokens.weight")

    def output(self) -> torch.Tensor:
        """`[vocabulary, D]`."""
        return self.embedding() if self.tied else self.reader.read("lm_head.weight")

    def final_norm(self) -> torch.Tensor:
        """`[D]`."""
        return self.reader.read("model.norm.weight")

    def layer(self, index: int) -> SourceLayer:
        """Read one block."""
        prefix = f"model.layers.{index}."
        shape = self.shape
        projection = {name: self._augmented(f"{prefix}self_attn.{name}") for name in _PROJECTIONS}
        output = projection["o_proj"]
        attention = SourceAttention(
            shape=shape,
            query=projection["q_proj"].unflatten(0, (shape.heads, -1)),
            key=projection["k_proj"].unflatten(0, (shape.kv_heads, -1)),
            value=projection["v_proj"].unflatten(0, (shape.kv_heads, -1)),
            output=output[:, :-1].unflatten(1, (shape.heads, -1)),
            output_bias=output[:, -1] if f"{prefix}self_attn.o_proj.bias" in self.reader.names else None,
        )
        weights = {name: self.reader.read(f"{prefix}{name}.weight") for name in (*_MATRICES, *_NORMS)}
        return SourceLayer(attention=attention, weights=weights)

    def _augmented(self, name: str) -> torch.Tensor:
        weight = self.reader.read(f"{name}.weight").double()
        bias = torch.zeros(len(weight), dtype=torch.float64)
        if f"{name}.bias" in self.reader.names:
            bias = self.reader.read(f"{name}.bias").double()
        return torch.cat((weight, bias[:, None]), dim=1)


def open_source(path: str | Path) -> Source:
    """Open and check a checkpoint.

    Args:
        path: a Hugging Face folder with safetensors and tokenizer, or a GGUF file.

    Raises:
        ValueError: it is none, its architecture cannot be converted exactly, tensors are missing, unexpected,
            truncated or misshapen, or it has no tokenizer.
    """
    location = Path(path)
    gguf = location.is_file() and location.suffix == ".gguf"
    if not gguf and not (location / "config.json").is_file():
        raise ValueError(f"{location} is neither a folder with config.json nor a .gguf file")
    reader: TensorReader
    folder, extra = (location.parent, {"gguf_file": location.name}) if gguf else (location, {})
    reader = GgufTensors(location) if gguf else SafetensorsReader(location)
    config = _config(folder, extra, location)
    _check_config(config, location)
    frequencies, score_factor = _frequencies(config)
    if gguf and GGUF_FREQUENCY_FACTORS in reader.names:
        frequencies = frequencies / reader.read(GGUF_FREQUENCY_FACTORS)
    shape = AttentionShape(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
    )
    _check_tensors(reader, config, shape, location)
    biased = "model.layers.0.self_attn.q_proj.bias" in reader.names
    stored = torch.float32 if gguf else reader.read("model.norm.weight").dtype
    return Source(
        path=location,
        name=location.stem if gguf else location.resolve().name,
        config=config,
        shape=shape,
        # GGUF stores it in single precision
        norm_eps=float(str(np.float32(config.rms_norm_eps))),
        frequencies=frequencies,
        score_factor=score_factor,
        context_tokens=min(config.max_position_embeddings, _window(config) or config.max_position_embeddings),
        dtype=stored,
        biased=biased,
        reader=reader,
        tokenizer=_tokenizer(folder, extra, location),
    )


def _config(folder: Path, extra: dict[str, str], location: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, **extra)
    except (ValueError, OSError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{location} has no configuration that transformers reads: {first}") from None


def _tokenizer(folder: Path, extra: dict[str, str], location: Path) -> PreTrainedTokenizerBase:
    files = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not extra and not any((folder / name).is_file() for name in files):
        raise ValueError(f"{location} has no tokenizer; it needs one of {', '.join(files)}")
    try:
        return AutoTokenizer.from_pretrained(folder, **extra)
    except Exception as error:
        raise ValueError(f"the tokenizer of {location} cannot be read: {error}") from None


def _check_config(config: Any, location: Path) -> None:
    """Refuse what would not be converted exactly."""
    kind = config.model_type
    if kind in REFUSED:
        raise ValueError(f"model_type of {location} is {kind!r}, which cannot be converted: {REFUSED[kind]}")
    if kind not in ACCEPTED:
        raise ValueError(f"model_type of {location} is {kind!r}; accepted: {', '.join(ACCEPTED)}")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{location} is quantised; accepted: plain weights, or a GGUF file")
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act of {location} is {config.hidden_act!r}; accepted: 'silu'")
    if getattr(config, "mlp_bias", False):
        raise ValueError(f"mlp_bias of {location} is True; accepted: False")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_key_value_heads of {location} is {config.num_key_value_heads}; it must divide "
            f"num_attention_heads ({config.num_attention_heads})"
        )
    if _head_dim(config) % 2:
        raise ValueError(f"head_dim of {location} is {_head_dim(config)}; it must be even")


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _window(config: Any) -> int | None:
    """Tokens that the source's attention reaches back, or None where that is everything."""
    if not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None)


def _frequencies(config: Any) -> tuple[torch.Tensor, float]:
    """Angles per token `[d / 2]` float32, and the factor on scores."""
    rope = dict(config.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor is {rope['partial_rotary_factor']}; accepted: 1")
    if kind == "default":
        dim = _head_dim(config)
        return 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)), 1.0
    if kind not in SCALED_ROPE:
        raise ValueError(f"rope_type is {kind!r}; accepted: default, {', '.join(SCALED_ROPE)}")
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    # it multiplies cos and sin, of queries and of keys
    return frequencies.float(), math.pow(factor, 2)


def _check_tensors(reader: TensorReader, config: Any, shape: AttentionShape, location: Path) -> None:
    width, inner, keys = shape.hidden, config.intermediate_size, shape.key_width
    queries = shape.heads * shape.head_dim
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, width),
        "model.norm.weight": (width,),
    }
    optional = {"lm_head.weight": (config.vocab_size, width), GGUF_FREQUENCY_FACTORS: (shape.head_dim // 2,)}
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": width}
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        for name, outputs in rows.items():
            inputs = queries if name == "o_proj" else width
            expected[f"{prefix}self_attn.{name}.weight"] = (outputs, inputs)
            optional[f"{prefix}self_attn.{name}.bias"] = (outputs,)
        expected |= {
            f"{prefix}mlp.gate_proj.weight": (inner, width),
            f"{prefix}mlp.up_proj.weight": (inner, width),
            f"{prefix}mlp.down_proj.weight": (width, inner),
            f"{prefix}input_layernorm.weight": (width,),
            f"{prefix}post_attention_layernorm.weight": (width,),
        }
    if not config.tie_word_embeddings and location.suffix != ".gguf":
        expected["lm_head.weight"] = optional["lm_head.weight"]
    missing = sorted(set(expected) - reader.names)
    unknown = sorted(
        name
        for name in reader.names - set(expected) - set(optional)
        if not name.endswith("rotary_emb.inv_freq")
    )
    if missing or unknown:
        said = [f"it lacks {', '.join(missing[:5])}"] if missing else []
        said += [f"it has the unknown {', '.join(unknown[:5])}"] if unknown else []
        raise ValueError(f"the tensors of {location} do not fit its configuration: {'; '.join(said)}")
    for name, wanted in (expected | optional).items():
        if name in reader.names and reader.shape(name) != wanted:
            raise ValueError(f"{name} of {location} is {reader.shape(name)}; its configuration says {wanted}")
