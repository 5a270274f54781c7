"""Command line of `ic_model.sizing`: one table per question, or JSON."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from ic_model.configuration import ICConfig
from ic_model.presets import preset_names
from ic_model.sizing import CARDS, DTYPE_BYTES, GIB, Card, Fit, Size, fit, load_config, size

_DTYPE_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def main(arguments: list[str] | None = None) -> None:
    """Print the sizing of a model; exit code 2 with one line on bad input."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.model)
        model_size = size(
            config,
            context_tokens=config.max_position_embeddings if options.context is None else options.context,
            kv_dtype=options.kv_dtype,
            weight_dtype=options.weight_dtype or _own_dtype(config),
            model=options.model,
            workspace_gib=options.workspace_gib,
        )
        fits = [fit(model_size, card) for card in _cards(options)]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.json:
        report = {"size": asdict(model_size), "cards": [asdict(row) for row in fits]}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        sys.stdout.write(_size_table(model_size) + "\n\n" + _card_table(fits) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ic_model.sizing",
        description="Parameters, bytes and operations of a model at a context length, and the cards it fits.",
    )
    parser.add_argument("model", help=f"preset ({', '.join(preset_names())}) or checkpoint folder")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="default: the model's longest")
    parser.add_argument("--kv-dtype", default="bf16", choices=tuple(DTYPE_BYTES), help="default: %(default)s")
    parser.add_argument(
        "--weight-dtype", choices=tuple(DTYPE_BYTES), help="default: the checkpoint's own; bf16 for a preset"
    )
    parser.add_argument(
        "--workspace-gib", type=float, help="memory beside weights and cache; default: vLLM's, computed"
    )
    parser.add_argument(
        "--card", action="append", metavar="NAME", help="only cards with this in their name; repeatable"
    )
    parser.add_argument("--memory-gib", type=float, help="a card of your own, instead of the list")
    parser.add_argument("--bandwidth-gb-per-s", type=float, help="memory bandwidth of the card of your own")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _own_dtype(config: ICConfig) -> str:
    name = str(config.dtype).removeprefix("torch.")
    if config.dtype is not None and name not in _DTYPE_NAMES:
        raise ValueError(
            f"dtype in the checkpoint is {name!r}; say --weight-dtype ({', '.join(DTYPE_BYTES)})"
        )
    return _DTYPE_NAMES.get(name, "bf16")


def _cards(options: argparse.Namespace) -> list[Card]:
    if options.memory_gib is not None:
        if options.card:
            raise ValueError("--card and --memory-gib exclude each other")
        for name in ("memory_gib", "bandwidth_gb_per_s"):
            value = getattr(options, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; accepted: a number above 0")
        name = f"{options.memory_gib:g} GiB"
        return [Card(name=name, memory_gib=options.memory_gib, bandwidth_gb_per_s=options.bandwidth_gb_per_s)]
    if options.bandwidth_gb_per_s is not None:
        raise ValueError("--bandwidth-gb-per-s needs --memory-gib")
    chosen: list[Card] = []
    for wanted in options.card or [""]:
        matches = [card for card in CARDS if wanted.lower() in card.name.lower()]
        if not matches:
            names = ", ".join(card.name for card in CARDS)
            raise ValueError(f"card is {wanted!r}; accepted: part of one of {names}; or use --memory-gib")
        chosen += [card for card in matches if card not in chosen]
    return chosen


def _size_table(row: Size) -> str:
    decode = row.linear_flop_per_token + row.decode_attention_flop_per_token
    prefill = row.linear_flop_per_token + row.prefill_attention_flop_per_token
    lines = [
        ("model", row.model),
        ("context", f"{row.context_tokens:,} tokens (the model's limit is {row.max_context_tokens:,})"),
        ("parameters", f"{row.parameters:,}, of which embedding {row.embedding_parameters:,}"),
        (f"weights, {row.weight_dtype}", _bytes(row.weight_bytes)),
        (f"KV per token, {row.kv_dtype}", f"{row.kv_bytes_per_token:,} B"),
        (f"KV in all, {row.kv_dtype}", _bytes(row.kv_bytes)),
        ("  with standard MHA", f"{_bytes(row.mha_kv_bytes)}; saved {row.kv_saved_vs_mha:.1%}"),
        ("workspace allowed for", _bytes(row.workspace_bytes)),
        ("FLOP per token, linear", _flop(row.linear_flop_per_token)),
        (
            "  attention, decode",
            f"{_flop(row.decode_attention_flop_per_token)} (absorbed, at the full context)",
        ),
        (
            "  attention, prefill",
            f"{_flop(row.prefill_attention_flop_per_token)} (expanded, mean of the prompt)",
        ),
        ("  sum, decode", _flop(decode)),
        ("  sum, prefill", f"{_flop(prefill)}; whole prompt {_flop(prefill * row.context_tokens)}"),
    ]
    return "\n".join(f"{name:<24}{value}" for name, value in lines)


def _card_table(fits: list[Fit]) -> str:
    titles = (
        "card",
        "memory GiB",
        "needed GiB",
        "fits",
        "tokens in cache",
        "longest context",
        "ms/token at least",
    )
    rows = [titles]
    for row in fits:
        time = "?" if row.min_decode_ms_per_token is None else f"{row.min_decode_ms_per_token:.2f}"
        rows.append(
            (
                row.card,
                f"{row.memory_gib:.1f}",
                f"{row.needed_gib:.2f}",
                "yes" if row.fits else "no",
                f"{row.cache_tokens:,}",
                f"{row.longest_context_tokens:,}",
                time,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(titles))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
    return "\n".join(lines)


def _bytes(number: int) -> str:
    for unit, factor in (("GiB", GIB), ("MiB", 1024**2), ("KiB", 1024)):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number} B"


def _flop(number: float) -> str:
    for unit, factor in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= factor:
            return f"{number / factor:.2f} {unit}FLOP"
    return f"{number:.0f} FLOP"
