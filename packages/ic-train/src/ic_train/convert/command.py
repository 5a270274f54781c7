"""`ic-train convert`: options, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from ic_model.sizing import GIB, kv_numbers_per_token, mha_kv_numbers_per_token, parameter_count

from ic_train.convert.calibration import WindowSizes
from ic_train.convert.checkpoint import converted_config
from ic_train.convert.options import FREQUENCIES, ConversionOptions, check_options
from ic_train.convert.record import STEP_NAMES
from ic_train.convert.run import DTYPES, convert, planned_needs, warn_about
from ic_train.convert.source import ACCEPTED, open_source


def add_convert(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = commands.add_parser(
        "convert",
        help="turn a pretrained model into one with latent attention",
        description=(
            f"Convert a checkpoint of the Llama family ({', '.join(ACCEPTED)}) to Multi-Head Latent Attention. "
            "What is in progress is in OUT.partial, and the same command continues it."
        ),
    )
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="Hugging Face folder with safetensors, or a .gguf file")
    add("out", type=Path, metavar="OUT", help="folder to make")
    add("--kv-lora-rank", type=int, required=True, metavar="C", help="numbers of the latent per token")
    add("--qk-rope-head-dim", type=int, required=True, metavar="R", help="numbers of the shared rotary key")
    add("--q-lora-rank", type=int, metavar="Q", help="rank of the queries (default: whole)")
    add(
        "--latent-norm",
        action="store_true",
        help="norm the latents as DeepSeek-V3 does: lossy, for checkpoints that are healed and exported",
    )
    add(
        "--frequencies",
        choices=FREQUENCIES,
        help="standard: angles that DeepSeek-V3 can express (default with --latent-norm); "
        "explicit: chosen freely, "
        "loses less (default)",
    )
    add(
        "--dtype", choices=("source", *DTYPES), default="source", help="of the result (default: the source's)"
    )
    add("--dry-run", action="store_true", help="check everything, print what it will take, write nothing")
    add_text_options(parser)


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Options on texts and the device, which `convert-table` has, too."""
    add, sizes = parser.add_argument, WindowSizes()
    add(
        "--calibration",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text files or folders (default: the embedded Jargon File)",
    )
    add(
        "--held-out",
        nargs="+",
        default=[],
        metavar="FILE",
        help="texts to report perplexity on (default: the ends of the calibration texts)",
    )
    for name, what in (
        ("calibration_samples", "windows to measure on"),
        ("calibration_tokens", "tokens of each"),
        ("evaluation_samples", "windows to report perplexity on"),
        ("evaluation_tokens", "tokens of each"),
        ("seed", "of the windows' places"),
    ):
        default = getattr(sizes, name)
        add(
            f"--{name.replace('_', '-')}",
            type=int,
            default=default,
            metavar="N",
            help=f"{what} (default: {default})",
        )
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="for forward passes (default: cuda where there is one)",
    )


def window_sizes(options: argparse.Namespace) -> WindowSizes:
    """The sizes that the options ask for."""
    return WindowSizes(
        calibration_samples=options.calibration_samples,
        calibration_tokens=options.calibration_tokens,
        evaluation_samples=options.evaluation_samples,
        evaluation_tokens=options.evaluation_tokens,
        seed=options.seed,
    )


def _run(options: argparse.Namespace) -> int:
    wanted = ConversionOptions(
        kv_lora_rank=options.kv_lora_rank,
        qk_rope_head_dim=options.qk_rope_head_dim,
        q_lora_rank=options.q_lora_rank,
        latent_norm=options.latent_norm,
        frequencies=options.frequencies or ("standard" if options.latent_norm else "explicit"),
    )
    dtype = DTYPES.get(options.dtype)
    if options.dry_run:
        return _dry_run(options, wanted, dtype)
    record = convert(
        options.source,
        options.out,
        wanted,
        calibration=options.calibration,
        held_out=options.held_out,
        sizes=window_sizes(options),
        dtype=dtype,
        device=options.device,
    )
    _print_record(record)
    print(f"written: {options.out}")
    return 0


def _dry_run(options: argparse.Namespace, wanted: ConversionOptions, dtype: torch.dtype | None) -> int:
    source = open_source(options.source)
    check_options(wanted, source)
    warn_about(source, wanted)
    chosen = dtype or source.dtype
    needs = planned_needs(source, wanted, window_sizes(options), chosen)
    config = converted_config(source, wanted, (1.0,) * (wanted.qk_rope_head_dim // 2), dtype=chosen)
    own = source.num_layers * source.kv_numbers_per_layer
    print(f"source            {source.name}, {source.config.model_type}, {source.num_layers} layers")
    print(f"parameters        {parameter_count(config):,} after")
    _print_cache(own, kv_numbers_per_token(config), mha_kv_numbers_per_token(config))
    print(f"memory            {needs.memory_bytes / GIB:.2f} GiB at most")
    print(f"disk, meanwhile   {needs.workspace_bytes / GIB:.2f} GiB")
    print(f"disk, result      {needs.checkpoint_bytes / GIB:.2f} GiB in {str(chosen).removeprefix('torch.')}")
    return 0


def _print_record(record: dict[str, Any]) -> None:
    numbers = record["kv_numbers_per_token"]
    _print_cache(numbers["before"], numbers["after"], numbers["multi_head"])
    base = record["perplexity"]["source"]
    for step, value in record["perplexity"].items():
        print(f"perplexity        {value:10.3f}  {value / base:7.3f} x  {STEP_NAMES[step]}")
    print(
        f"took              {record['wall_s']:.0f} s, {record['peak_memory_bytes'] / GIB:.2f} "
        "GiB of memory at most"
    )


def _print_cache(before: int, after: int, multi_head: int) -> None:
    print(
        f"cache per token   {before:,} numbers before, {after:,} after: {1 - after / before:.1%} less than the "
        f"source, {1 - after / multi_head:.1%} less than multi-head attention"
    )
