"""Writing the converted checkpoint: whole, or not at all under its name."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from ic_model import ICConfig
from ic_model.weights import EMBEDDING, OUTPUT, tensor_shapes

from ic_train.convert.factor import residual_scale
from ic_train.convert.options import ConversionOptions
from ic_train.convert.pipeline import Conversion
from ic_train.convert.source import Source
from ic_train.convert.workspace import Workspace

# of one weight file; what is assembled is held in memory
SHARD_BYTES = 2 * 1024**3
GENERATION = "generation_config.json"


def converted_config(
    source: Source, options: ConversionOptions, frequencies: tuple[float, ...], *, dtype: torch.dtype
) -> ICConfig:
    """The configuration of the result."""
    config = source.config
    rope = {"rope_type": "explicit", "inverse_frequencies": list(frequencies)}
    if options.frequencies == "standard":
        rope = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
    return ICConfig(
        vocab_size=config.vocab_size,
        hidden_size=source.shape.hidden,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=source.num_layers,
        num_attention_heads=source.shape.heads,
        q_lora_rank=options.q_lora_rank,
        kv_lora_rank=options.kv_lora_rank,
        qk_nope_head_dim=source.shape.head_dim,
        qk_rope_head_dim=options.qk_rope_head_dim,
        v_head_dim=source.shape.head_dim,
        kv_latent_norm=options.latent_norm,
        q_latent_norm=options.latent_norm,
        attention_bias=source.biased,
        max_position_embeddings=source.context_tokens,
        rms_norm_eps=1e-6 if options.latent_norm else source.norm_eps,
        initializer_range=config.initializer_range,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        tie_word_embeddings=source.tied,
        rope_parameters=rope,
        dtype=str(dtype).removeprefix("torch."),
        architectures=["InfiniteContextForCausalLM"],
    )


def write_checkpoint(
    source: Source, workspace: Workspace, conversion: Conversion, config: ICConfig, dtype: torch.dtype
) -> Path:
    """Assemble weights, configuration and tokenizer in the workspace's folder `checkpoint`.

    Returns:
        that folder.

    Raises:
        ValueError: the disk is full.
    """
    folder = workspace.path("checkpoint")
    if folder.exists():
        shutil.rmtree(folder)
    shapes = tensor_shapes(config)
    files = _shards(shapes, dtype)
    scale = residual_scale(source.norm_eps, conversion.norm_eps)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        single = len(files) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = _Tensors(source, workspace, scale)
        workspace.path("checkpoint").mkdir(exist_ok=True)
        workspace.save(
            f"checkpoint/{file}", {name: tensors.read(name, shapes[name]).to(dtype) for name in names}
        )
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1:
        total = sum(_bytes(shapes[name], dtype) for name in shapes)
        workspace.save_json(
            "checkpoint/model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
    try:
        config.save_pretrained(folder)
        source.tokenizer.save_pretrained(folder)
        generation = source.path / GENERATION
        if generation.is_file():
            shutil.copyfile(generation, folder / GENERATION)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error}; run the same command again") from None
    return folder


class _Tensors:
    """The result's tensors by name, one layer's file open at a time."""

    def __init__(self, source: Source, workspace: Workspace, scale: float) -> None:
        self.source, self.workspace, self.scale = source, workspace, scale
        self._index = -1
        self._layer: dict[str, torch.Tensor] = {}

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = self._read(name)
        assert tuple(tensor.shape) == shape, f"{name} is {tuple(tensor.shape)}, not {shape}"
        return tensor

    def _read(self, name: str) -> torch.Tensor:
        if name == EMBEDDING:
            return self._scaled(self.source.embedding(), self.scale)
        if name == OUTPUT:
            return self.source.output()
        if name == "model.norm.weight":
            # a tied output projection is the scaled embedding
            return self._scaled(self.source.final_norm(), 1 / self.scale if self.source.tied else 1.0)
        index, own = name.removeprefix("model.layers.").split(".", 1)
        if int(index) != self._index:
            self._index, self._layer = int(index), self.workspace.load(f"layer-{int(index):03d}.safetensors")
        return self._layer[own]

    @staticmethod
    def _scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
        return tensor if factor == 1 else tensor.double() * factor


def _shards(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> list[list[str]]:
    """Names of each file, layers in order, none above SHARD_BYTES unless one tensor is."""
    files: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        more = _bytes(shape, dtype)
        if files[-1] and size + more > SHARD_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += more
    return files


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
