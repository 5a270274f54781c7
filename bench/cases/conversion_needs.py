"""Memory and disk that conversions of larger sources need, by arithmetic, as one result.

    python -m bench.cases.conversion_needs

Sources are named by their shapes: nothing is downloaded, and nothing measured. What `ic-train convert --dry-run`
says of a source at hand is the same arithmetic.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ic_model import ICConfig
from ic_model.sizing import GIB, kv_numbers_per_token, parameter_count
from ic_train.convert.calibration import WindowSizes
from ic_train.convert.memory import conversion_needs
from ic_train.results import new_result_folder, write_result

TOPIC = "conversion-needs"
BFLOAT16_BYTES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A source by its published config.json, and what it is converted to."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    latent_rank: int
    rope_dim: int = 64


# the latent row is half of what the source caches, or less
SHAPES = {
    "SmolLM2-135M": Shape(
        layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64, vocabulary=49_152, tied=True,
        latent_rank=128,
    ),
    "Qwen2.5-0.5B": Shape(
        layers=24, hidden=896, intermediate=4864, heads=14, kv_heads=2, head_dim=64, vocabulary=151_936, tied=True,
        latent_rank=64,
    ),
    "SmolLM2-1.7B": Shape(
        layers=24, hidden=2048, intermediate=8192, heads=32, kv_heads=32, head_dim=64, vocabulary=49_152,
        tied=True, latent_rank=512,
    ),
    "Llama-3.1-8B": Shape(
        layers=32, hidden=4096, intermediate=14_336, heads=32, kv_heads=8, head_dim=128, vocabulary=128_256,
        tied=False, latent_rank=512,
    ),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute, print and write the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.cases.conversion_needs", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("bench/results"), metavar="DIR")
    options = parser.parse_args(arguments)
    rows = [needs_row(name) for name in SHAPES]
    folder = new_result_folder(options.results, TOPIC)
    write_result(folder, TOPIC, rows)
    for row in rows:
        print(f"{row['shape_of']:14} {row['needs_memory_bytes'] / GIB:6.2f} GiB of memory")
    print(f"written: {folder}")
    return 0


def needs_row(name: str) -> dict[str, Any]:
    """What converting a source of this shape takes, with the defaults of `ic-train convert`, in bfloat16.

    Args:
        name: of SHAPES.
    """
    shape = SHAPES[name]
    config = ICConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        q_lora_rank=None,
        kv_lora_rank=shape.latent_rank,
        qk_nope_head_dim=shape.head_dim,
        qk_rope_head_dim=shape.rope_dim,
        v_head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )
    needs = conversion_needs(config, kv_heads=shape.kv_heads, sizes=WindowSizes(), dtype_bytes=BFLOAT16_BYTES)
    return {
        "shape_of": name,
        "kv_lora_rank": shape.latent_rank,
        "qk_rope_head_dim": shape.rope_dim,
        "parameters": parameter_count(config),
        "kv_numbers_per_token": kv_numbers_per_token(config),
        "source_kv_numbers_per_token": shape.layers * 2 * shape.kv_heads * shape.head_dim,
        "needs_memory_bytes": needs.memory_bytes,
        "needs_workspace_bytes": needs.workspace_bytes,
        "checkpoint_bytes": needs.checkpoint_bytes,
    }


if __name__ == "__main__":
    sys.exit(main())
