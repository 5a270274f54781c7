"""`conversion.json` and its plot: what was converted to what, and what each lossy step cost."""

from __future__ import annotations

import math
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from ic_model import ICConfig
from ic_model.sizing import kv_numbers_per_token, mha_kv_numbers_per_token, parameter_count

from ic_train.convert.options import ConversionOptions, perplexity
from ic_train.convert.pipeline import Conversion
from ic_train.convert.source import Source
from ic_train.results import commit

RECORD_FILE, PLOT_FILE = "conversion.json", "conversion.png"
STEP_NAMES = {
    "source": "source",
    "partial_rope": "position in R dimensions only",
    "low_rank": "keys and values of rank C",
    "query_rank": "queries of low rank",
    "latent_norm": "norm on latents",
}


def conversion_record(
    source: Source,
    options: ConversionOptions,
    conversion: Conversion,
    config: ICConfig,
    *,
    text: dict[str, Any],
    seconds: float,
    peak_memory_bytes: int | None,
) -> dict[str, Any]:
    """Everything about a conversion, for `conversion.json`."""
    own = source.num_layers * source.kv_numbers_per_layer
    ours = kv_numbers_per_token(config)
    return {
        "source": {
            "name": source.name,
            "model_type": source.config.model_type,
            "heads": source.shape.heads,
            "kv_heads": source.shape.kv_heads,
            "head_dim": source.shape.head_dim,
            "rope_parameters": source.config.rope_parameters,
        },
        "kv_lora_rank": options.kv_lora_rank,
        "qk_rope_head_dim": options.qk_rope_head_dim,
        "q_lora_rank": options.q_lora_rank,
        "latent_norm": options.latent_norm,
        "frequencies": options.frequencies,
        "parameters": parameter_count(config),
        "kv_numbers_per_token": {
            "before": own,
            "after": ours,
            "multi_head": mha_kv_numbers_per_token(config),
        },
        "kv_saved_vs_source": 1 - ours / own,
        "kv_saved_vs_mha": 1 - ours / mha_kv_numbers_per_token(config),
        "perplexity": {step: perplexity(loss) for step, loss in conversion.losses.items()},
        "energy_kept_per_layer": conversion.energy_kept,
        "plan": {
            "name": conversion.plan.name,
            "folds": [[fold.first, fold.last] for fold in conversion.plan.folds],
            "kept": list(conversion.plan.kept),
            "distance_tokens": conversion.plan.distance_tokens,
            "perplexity_when_chosen": {name: perplexity(loss) for name, loss in conversion.searched.items()},
        },
        "text": text,
        "wall_s": round(seconds, 1),
        "peak_memory_bytes": peak_memory_bytes,
        "commit": commit()[0],
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}
        | {"python": platform.python_version()},
    }


def plot_conversion(record: dict[str, Any], path: Path) -> None:
    """Draw the perplexity after each step, and the share of variance that every layer keeps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps = list(record["perplexity"])
    # infinity cannot be drawn; its bar is left out, its label stays
    values = [record["perplexity"][step] for step in steps]
    bars = left.bar(
        [STEP_NAMES[step].replace(" ", "\n", 1) for step in steps],
        [value if math.isfinite(value) else 0.0 for value in values],
        color=["grey", *["C0"] * (len(steps) - 1)],
    )
    left.bar_label(bars, [f"{value:.2f}" for value in values])
    left.set_ylabel("perplexity on held-out text")
    left.tick_params(axis="x", labelsize=8)
    energies = record["energy_kept_per_layer"]
    right.plot(range(len(energies)), energies, marker=".")
    right.set_xlabel("layer")
    right.set_ylabel("weighted variance kept")
    right.set_title(f"C = {record['kv_lora_rank']}, R = {record['qk_rope_head_dim']}", fontsize=10)
    figure.suptitle(f"{record['source']['name']} to latent attention, before healing")
    figure.savefig(path, dpi=100)
    plt.close(figure)
