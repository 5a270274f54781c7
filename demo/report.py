"""What the demo prints, and the arithmetic behind it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ic_model import ICConfig


def section(title: str) -> None:
    """Print a heading."""
    print(f"\n{title}", flush=True)


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows as lines with aligned columns.

    Args:
        rows: the first one may be a heading; all of the same length.
        right: columns that are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return "\n".join(lines)


def human_bytes(count: int) -> str:
    """Bytes with a binary unit: 83886080 is "80.0 MiB"."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def kv_table(config: ICConfig, tokens: int) -> str:
    """The KV cache of a document beside what standard multi-head attention would have taken.

    Args:
        config: of the model; both caches are counted in its own dtype, as vLLM keeps them.
        tokens: in the cache.
    """
    from ic_model.sizing import kv_numbers_per_token, mha_kv_numbers_per_token

    dtype, number_bytes = dtype_name(config), dtype_bytes(config)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    standard, latent = mha_kv_numbers_per_token(config), kv_numbers_per_token(config)
    rows = [
        ("", "numbers per token", "bytes per token", "in all"),
        (
            "multi-head attention",
            f"{layers} layers x {heads} heads x 2 x {config.qk_nope_head_dim} = {standard:,}",
            f"{standard * number_bytes:,}",
            human_bytes(standard * number_bytes * tokens),
        ),
        (
            "latent cache",
            f"{layers} layers x ({config.kv_lora_rank} + {config.qk_rope_head_dim}) = {latent:,}",
            f"{latent * number_bytes:,}",
            human_bytes(latent * number_bytes * tokens),
        ),
    ]
    return f"{table(rows, right=(2, 3))}\n  {1 - latent / standard:.1%} less, both in {dtype}"


def dtype_name(config: ICConfig) -> str:
    """The name of the checkpoint's dtype: "bfloat16"."""
    return str(config.dtype).removeprefix("torch.")


def dtype_bytes(config: ICConfig) -> int:
    """Bytes per number in the checkpoint's dtype.

    Raises:
        ValueError: config.json names no floating-point type.
    """
    import torch

    dtype = getattr(torch, dtype_name(config), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"config.json's dtype is {dtype_name(config)}; it must be a floating-point type")
    return dtype.itemsize


def gpu_commands(arguments: Sequence[str], model: Path | None) -> str:
    """The commands, from the root of a clone, that do the same on a GPU.

    Args:
        arguments: of this demo.
        model: the checkpoint folder, or None for the embedded one.
    """
    embedded = "$(python -c 'import ic_model; print(ic_model.checkpoint_path(\"ic-nano\"))')"
    served = f'"{embedded}"' if model is None else shlex.quote(str(model))
    return (
        '  pip install ./packages/ic-model ./packages/ic-train "./packages/ic-vllm-plugin[cuda]"\n'
        f"  {shlex.join(['python', '-m', 'demo', *arguments])}\n"
        "or only the server, for any OpenAI client:\n"
        f"  vllm serve {served}"
    )
