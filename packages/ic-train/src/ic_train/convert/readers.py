"""Tensors of a source by their Hugging Face names, read one at a time: safetensors folders and GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

# GGUF's name of a tensor in a layer: Hugging Face's
_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# divides the source's frequencies, where a file has it (Llama 3's scaling)
GGUF_FREQUENCY_FACTORS = "rope_freqs.weight"


class TensorReader(Protocol):
    """Tensors by name."""

    names: frozenset[str]

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name, in the dtype it is stored in; quantised blocks as float32."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading it."""
        ...


class SafetensorsReader:
    """The safetensors of a folder, one file or shards with an index.

    Args:
        folder: of a Hugging Face checkpoint.

    Raises:
        ValueError: there are none, or one is missing, truncated or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        for path in _weight_files(folder):
            try:
                file = safe_open(path, framework="pt")
                names = list(file.keys())
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is truncated or damaged: {error}") from None
            self._files |= dict.fromkeys(names, file)
        self.names = frozenset(self._files)

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name."""
        return self._files[name].get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self._files[name].get_slice(name).get_shape())


class GgufTensors:
    """The tensors of a GGUF file, dequantised to float32 as they are read.

    Args:
        path: the file.

    Raises:
        ValueError: the gguf package is missing, or the file is truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise ValueError(f"{path} is a GGUF file; to read it, pip install 'ic-train[gguf]'") from None
        try:
            reader = gguf.GGUFReader(path)
            # a file that was cut off lacks bytes of its last tensors, which mapping it does not show
            end = max(int(one.data_offset) + int(one.n_bytes) for one in reader.tensors)
        except (ValueError, IndexError, KeyError, OSError) as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from None
        if end > path.stat().st_size:
            raise ValueError(f"{path} is truncated: it has {path.stat().st_size} bytes and needs {end}")
        self._dequantize = gguf.dequantize
        self._fields = reader.fields
        self.architecture = self.field("general.architecture")
        self._tensors = {_gguf_name(one.name): one for one in reader.tensors}
        self.names = frozenset(self._tensors)

    def field(self, name: str) -> Any:
        """A value of the file's metadata.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in self._fields:
            raise ValueError(f"the GGUF file has no metadata {name!r}")
        return self._fields[name].contents()

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name, float32."""
        found = self._tensors[name]
        values = torch.from_numpy(self._dequantize(found.data, found.tensor_type).copy())
        if (
            self.architecture == "llama"
            and "self_attn." in name
            and name.split(".")[-2] in ("q_proj", "k_proj")
        ):
            values = self._halves(values, name)
        return values

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def _halves(self, values: torch.Tensor, name: str) -> torch.Tensor:
        """Undo llama.cpp's reordering of Llama's queries and keys: its RoPE takes pairs side by side."""
        suffix = "head_count" if ".q_proj." in name else "head_count_kv"
        heads = int(self.field(f"llama.attention.{suffix}"))
        return values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _gguf_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in _GGUF_LAYER:
        return f"model.layers.{parts[1]}.{_GGUF_LAYER[parts[2]]}.{parts[3]}"
    return f"{_GGUF_MODEL[parts[0]]}.{parts[1]}" if parts[0] in _GGUF_MODEL else name


def _weight_files(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        others = sorted(path.name for path in folder.glob("*.bin")) or ["no weights"]
        raise ValueError(f"{folder} has {', '.join(others)}; accepted: safetensors, or a GGUF file itself")
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{index} names files that are not there: {', '.join(absent)}")
    return [folder / name for name in names]
