"""Memory and disk that conversions of larger sources need, by arithmetic, as one result.

    python -m bench.cases.conversion_needs

Sources are named by their shapes: nothing is downloaded, and nothing measured. What `ic-train convert --dry-run`
says of a source at hand is the same arithmetic.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ic_model import ICConfig
from ic_model.sizing import GIB, kv_numbers_per_token, parameter_count
from ic_train.convert.calibration import WindowSizes
from ic_train.convert.memory import conversion_needs
from ic_train.results import new_result_folder, write_result

TOPIC = "conversion-needs"
BFLOAT16_BYTES = 2
# of config.json: layers, hidden, intermediate, heads, key-value heads, head dimension, vocabulary, tied embeddings
SHAPES: dict[str, tuple[int, int, int, int, int, int, int, bool]] = {
    "SmolLM2-135M": (30, 576, 1536, 9, 3, 64, 49_152, True),
    "Qwen2.5-0.5B": (24, 896, 4864, 14, 2, 64, 151_936, True),
    "SmolLM2-1.7B": (24, 2048, 8192, 32, 32, 64, 49_152, True),
    "Llama-3.1-8B": (32, 4096, 14_336, 32, 8, 128, 128_256, False),
}
# (C, R): a key-value head's worth of rotary dimensions, and half of what the source caches or less
SIZES = {
    "SmolLM2-135M": (128, 64),
    "Qwen2.5-0.5B": (64, 64),
    "SmolLM2-1.7B": (512, 64),
    "Llama-3.1-8B": (512, 64),
}


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
    layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, tied = SHAPES[name]
    latent_rank, rope_dim = SIZES[name]
    config = ICConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        q_lora_rank=None,
        kv_lora_rank=latent_rank,
        qk_nope_head_dim=head_dim,
        qk_rope_head_dim=rope_dim,
        v_head_dim=head_dim,
        tie_word_embeddings=tied,
    )
    needs = conversion_needs(config, kv_heads=kv_heads, sizes=WindowSizes(), dtype_bytes=BFLOAT16_BYTES)
    return {
        "shape_of": name,
        "kv_lora_rank": latent_rank,
        "qk_rope_head_dim": rope_dim,
        "parameters": parameter_count(config),
        "kv_numbers_per_token": kv_numbers_per_token(config),
        "source_kv_numbers_per_token": layers * 2 * kv_heads * head_dim,
        "needs_memory_bytes": needs.memory_bytes,
        "needs_workspace_bytes": needs.workspace_bytes,
        "checkpoint_bytes": needs.checkpoint_bytes,
    }


if __name__ == "__main__":
    sys.exit(main())
