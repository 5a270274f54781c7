"""`ic-train evaluate passkey`: named pass keys, found by an InfiniteContext model in this process."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ic_model import ICForCausalLM, checkpoint_path
from safetensors import SafetensorError
from transformers import AutoTokenizer

from ic_train.evaluation.haystack import HAYSTACKS, load_haystack
from ic_train.evaluation.passkey import evaluate_passkey, wilson_interval
from ic_train.evaluation.plots import plot_passkey
from ic_train.evaluation.report import MIN_FOR_PERCENTAGE
from ic_train.results import new_result_folder, write_result

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def add_evaluate_passkey(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    passkey = commands.add_parser("evaluate passkey", help="find named pass keys hidden in a long text")
    passkey.description = (
        "Hide pass keys evenly over the depth of long texts, ask for each, count the exact answers."
    )
    passkey.set_defaults(run=_evaluate_passkey)
    add = passkey.add_argument
    add(
        "--model",
        default="ic-nano",
        help="an embedded checkpoint's name or a checkpoint folder (default: ic-nano)",
    )
    add(
        "--context-tokens",
        type=int,
        nargs="+",
        default=[16384],
        metavar="N",
        help="context lengths (default: 16384)",
    )
    add(
        "--contexts",
        type=int,
        default=4,
        help="contexts per length, each with its own text and keys (default: 4)",
    )
    add("--keys-per-context", type=int, default=64, help="pass keys hidden in each context (default: 64)")
    add(
        "--haystack",
        default="jargon",
        help=f"one of {', '.join(HAYSTACKS)}, or a UTF-8 text file (default: jargon)",
    )
    add("--dtype", choices=DTYPES, default="bfloat16", help="weights and cache (default: bfloat16)")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda where there is one",
    )
    add(
        "--chunk-tokens",
        type=int,
        default=0,
        metavar="N",
        help="read contexts in chunks of N tokens to save memory",
    )
    add("--seed", type=int, default=1000, help="of texts, keys and depths (default: 1000)")
    add(
        "--results",
        type=Path,
        metavar="DIR",
        help="write result.json and a plot into a dated folder below DIR",
    )


@contextmanager
def readable(option: str, value: str) -> Iterator[None]:
    """Name what was given where a checkpoint or a tokenizer cannot be read within.

    Args:
        option: that gave it.
        value: of the option.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{option} is {value!r}; it cannot be read: {reason}") from None


def _evaluate_passkey(options: argparse.Namespace) -> int:
    folder = Path(options.model) if Path(options.model).is_dir() else checkpoint_path(options.model)
    with readable("--model", options.model):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = ICForCausalLM.from_pretrained(folder, dtype=DTYPES[options.dtype])
    model = model.to(options.device).eval()
    haystack = load_haystack(options.haystack)
    _check_lengths(options, model.config.max_position_embeddings)
    written = new_result_folder(options.results, "passkey") if options.results else None
    rows: list[dict[str, Any]] = []
    for context_tokens in options.context_tokens:
        samples = evaluate_passkey(
            model,
            tokenizer,
            haystack,
            context_tokens=context_tokens,
            num_contexts=options.contexts,
            keys_per_context=options.keys_per_context,
            seed=options.seed,
            chunk_tokens=options.chunk_tokens,
        )
        rows.append(_row(options, folder.name, context_tokens, list(samples)))
        if written:
            # after every length: the longest comes last and takes longest, and what was measured stays
            write_result(written, "passkey", rows, seed=options.seed)
            plot_passkey(rows, written / "passkey.png")
    if written:
        print(f"written: {written}")
    return 0


def _row(
    options: argparse.Namespace, model: str, context_tokens: int, samples: list[dict[str, Any]]
) -> dict[str, Any]:
    """The result of one length, which is printed, too."""
    correct = sum(sample["correct"] for sample in samples)
    low, high = wilson_interval(correct, len(samples))
    share = f"{correct / len(samples):.1%}, " if len(samples) >= MIN_FOR_PERCENTAGE else ""
    print(
        f"{context_tokens:>9,} tokens: {correct} of {len(samples)} pass keys "
        f"({share}95 % interval {low:.1%} to {high:.1%})",
        flush=True,
    )
    return {
        "model": model,
        "engine": "transformers",
        "kv_dtype": options.dtype,
        "task": "passkey",
        "haystack": options.haystack,
        "context_tokens": context_tokens,
        "correct": correct,
        "total": len(samples),
        "samples": samples,
    }


def _check_lengths(options: argparse.Namespace, longest: int) -> None:
    for context_tokens in options.context_tokens:
        if not 1 <= context_tokens <= longest:
            raise ValueError(
                f"--context-tokens is {context_tokens}; {options.model} takes from 1 to {longest} "
                "(its max_position_embeddings)"
            )
    for name in ("contexts", "keys_per_context"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")
