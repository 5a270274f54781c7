"""What a conversion needs of memory and disk, by ic_model.sizing; arithmetic only.

Letters: D hidden_size, F intermediate_size, N query heads, G key-value heads, d head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ic_model import ICConfig
from ic_model.sizing import GIB, embedding_parameters, parameter_count
from ic_model.weights import tensor_shapes

from ic_train.convert.calibration import WindowSizes

# Python, PyTorch, the tokenizer and the texts: what SmolLM2-135M took beyond the rest
RUNTIME_GIB = 1.2
_BATCH_TOKENS = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionNeeds:
    """Bytes at the peak, each for what it says."""

    memory_bytes: int
    workspace_bytes: int
    checkpoint_bytes: int


def conversion_needs(
    config: ICConfig, *, kv_heads: int, sizes: WindowSizes, dtype_bytes: int, steps: int = 3
) -> ConversionNeeds:
    """Memory and disk that converting to `config` takes.

    Memory is the larger of two peaks. While measuring: the embedding as stored and in float32, hidden states
    of all calibration windows twice (before and after a layer) in float32, a layer's weights in float32 and its
    attention in float64, two second moments in float64, and the activations of a batch. While converting: the
    same with the states of `steps` evaluation sets, and the matrices of keys and values, `6 (2 G d)^2` in float64.

    Args:
        config: of the result; `ic_model.sizing` counts its parameters.
        kv_heads: G of the source.
        sizes: of the windows.
        dtype_bytes: per number of the checkpoint.
        steps: sets of hidden states that are carried along while converting.
    """
    width, dim, heads = config.hidden_size, config.qk_nope_head_dim, config.num_attention_heads
    embedding = embedding_parameters(config)
    parameters = parameter_count(config)
    layer = sum(
        math.prod(shape)
        for name, shape in tensor_shapes(config).items()
        if name.startswith("model.layers.0.")
    )
    moment = 8 * (width + 1) ** 2
    attention = 8 * width * dim * (2 * heads + 2 * kv_heads)
    activations = (
        4 * _BATCH_TOKENS * (3 * config.intermediate_size + 4 * width + 3 * heads * config.qk_head_dim)
    )
    calibration = 4 * width * sizes.calibration_samples * sizes.calibration_tokens
    evaluation = 4 * width * sizes.evaluation_samples * sizes.evaluation_tokens
    fixed = round(RUNTIME_GIB * GIB) + 4 * layer + attention + activations
    measuring = fixed + 2 * (calibration + evaluation) + 2 * moment + embedding * (dtype_bytes + 4)
    latent = 8 * 6 * (2 * kv_heads * dim) ** 2 + 8 * 2 * width * heads * config.qk_head_dim
    converting = fixed + 2 * steps * evaluation + 3 * moment + latent + embedding * (dtype_bytes + 4)
    layers = config.num_hidden_layers
    return ConversionNeeds(
        memory_bytes=max(measuring, converting),
        workspace_bytes=4 * layers * layer + layers * moment + 2 * (calibration + steps * evaluation),
        checkpoint_bytes=parameters * dtype_bytes,
    )
