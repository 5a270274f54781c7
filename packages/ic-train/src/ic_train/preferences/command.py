"""`ic-train data preferences`: pairs of a right and a wrong answer about facts in long contexts."""

from __future__ import annotations

import argparse
import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ic_train.evaluation.client import ServerError
from ic_train.evaluation.command import (
    add_server,
    check_at_least,
    checkpoint_folder,
    connect,
    parse_lengths,
    report_server_error,
    weights_fingerprint,
)
from ic_train.evaluation.engines import Engine, InProcess, Server
from ic_train.evaluation.hard_sets import KINDS
from ic_train.evaluation.passkey_command import DTYPES
from ic_train.evaluation.records import SETTINGS_FILE
from ic_train.evaluation.run import check_lengths
from ic_train.evaluation.wordings import wording_for
from ic_train.preferences.generate import PairPlan, make_pairs
from ic_train.preferences.haystack import SOURCES, load_training_text

_IN_PROCESS = ("dtype", "device", "chunk_tokens")
_THROUGH_SERVER = ("concurrency", "retries", "timeout_s")


def add_data_preferences(kinds: Any) -> None:
    """Add the command to the kinds of `ic-train data`."""
    parser = kinds.add_parser(
        "preferences",
        help="make pairs of a right and a wrong answer about facts in long contexts, for DPO",
        description=(
            "Hide facts in long texts and pair right answers with wrong ones: those that a model gives, where it "
            "errs, and made ones otherwise. The same call after an interruption makes only what is missing."
        ),
    )
    parser.set_defaults(run=lambda options: _preferences(options, parser))
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder to make")
    add("--tokenizer", metavar="DIR", help="folder of the model or its tokenizer (default: --model)")
    add("--kinds", default=",".join(KINDS), metavar="A,B", help=f"of {', '.join(KINDS)} (default: all)")
    add("--lengths", default="8k", metavar="N,N", help="prompts with answers, as 8k,32k,1M (default: 8k)")
    add("--short-tokens", default="1k", metavar="N", help="the same with little text around (default: 1k)")
    add("--pairs", type=int, default=200, metavar="N", help="per kind and length (default: 200)")
    add("--pairs-per-context", type=int, default=8, metavar="N", help="share a context (default: 8)")
    add(
        "--haystack",
        default=SOURCES,
        metavar="FILE",
        help="UTF-8 text that hides the facts (default: the sources of installed packages)",
    )
    add("--licence", help="of --haystack FILE, as 'public-domain' or an SPDX name")
    add("--allow-evaluation-haystack", action="store_true", help="train on the text that evaluation uses")
    add("--seed", type=int, default=1, help="of names, values, places and texts (default: 1)")
    add(
        "--model",
        metavar="DIR",
        help="take wrong answers of this checkpoint folder or ic-nano; with --server, the served name",
    )
    add("--dtype", choices=DTYPES, default="bfloat16", help="of --model (default: bfloat16)")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="of --model; default: cuda where there is one",
    )
    add("--chunk-tokens", type=int, default=0, metavar="N", help="of --model: read N tokens at a time")
    add_server(parser, required=False)


def _preferences(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    _refuse_idle_options(options, parser)
    check_at_least(options, pairs=1, pairs_per_context=1, chunk_tokens=0, seed=0)
    kinds = tuple(dict.fromkeys(options.kinds.split(",")))
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"--kinds has {unknown[0]!r}; accepted are {', '.join(KINDS)}")
    lengths = tuple(parse_lengths(options.lengths))
    check_lengths(lengths, None, source="")
    short_tokens = _short_tokens(options.short_tokens, lengths)
    _check_folder(options.out)
    try:
        asyncio.run(_make(options, kinds, lengths, short_tokens))
    except ServerError as error:
        return report_server_error(error)
    return 0


async def _make(
    options: argparse.Namespace, kinds: tuple[str, ...], lengths: tuple[int, ...], short_tokens: int
) -> None:
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(connect(options)) if options.server else None
        served = await client.served_model(options.model) if client else None
        if client and served:
            check_lengths(lengths, served.max_tokens, source=f"what {client.url} says of {served.name}")
        tokenizer = _tokenizer(options)
        text = load_training_text(
            options.haystack, options.licence, allow_evaluation_text=options.allow_evaluation_haystack
        )
        plan = PairPlan(
            kinds=kinds,
            lengths_tokens=lengths,
            short_tokens=short_tokens,
            pairs=options.pairs,
            pairs_per_context=options.pairs_per_context,
            seed=options.seed,
            haystack=text.text,
            tokenizer=tokenizer,
            wording=wording_for(tokenizer),
        )
        engine, labels = None, {"model": None, "weights": None}
        if client and served:
            engine = Server(client, served, tokenizer, concurrency=options.concurrency)
            labels["model"] = served.name
        elif options.model:
            engine, labels = _in_process(options, tokenizer, lengths)
        settings = {**plan.settings, "haystack": text.name, "licence": text.licence, **labels}
        record = await make_pairs(options.out, plan, settings, engine)
    for name, count in record["pairs_by_kind_and_fault"].items():
        print(f"{count:>9,} pairs  {name}")
    print(f"{record['pairs']:>9,} pairs  {record['tokens']:,} tokens  written: {options.out}")


def _in_process(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, lengths: tuple[int, ...]
) -> tuple[Engine, dict[str, str | None]]:
    folder = checkpoint_folder(options.model)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[options.dtype])
    limit = getattr(model.config, "max_position_embeddings", None)
    check_lengths(lengths, limit, source=f"max_position_embeddings of {folder.name}")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"--tokenizer is {options.tokenizer!r}; it has {len(tokenizer)} tokens, and {folder.name} knows "
            f"{model.config.vocab_size}: give the model's own"
        )
    engine = InProcess(model.to(options.device).eval(), tokenizer, chunk_tokens=options.chunk_tokens)
    return engine, {"model": folder.name, "weights": weights_fingerprint(folder)}


def _tokenizer(options: argparse.Namespace) -> PreTrainedTokenizerBase:
    name = options.tokenizer or options.model
    if not name:
        raise ValueError("--tokenizer is missing; give the folder of the model or of its tokenizer")
    try:
        return AutoTokenizer.from_pretrained(checkpoint_folder(name))
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"--tokenizer is {name!r}; it cannot be read: {first}") from None


def _refuse_idle_options(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse options that have no effect on this way of asking."""
    idle = {name: "without --server" for name in _THROUGH_SERVER if not options.server}
    if options.server or not options.model:
        idle |= dict.fromkeys(_IN_PROCESS, "with --server" if options.server else "without --model")
    for name, when in idle.items():
        if getattr(options, name) != parser.get_default(name):
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is {getattr(options, name)!r}; it has no effect {when}")


def _short_tokens(text: str, lengths: tuple[int, ...]) -> int:
    try:
        (tokens,) = parse_lengths(text)
    except ValueError:
        raise ValueError(f"--short-tokens is {text!r}; give a number of tokens as 1024 or 1k") from None
    if tokens >= lengths[0]:
        raise ValueError(
            f"--short-tokens is {tokens}; it must be below the shortest of --lengths ({lengths[0]})"
        )
    return tokens


def _check_folder(folder: Path) -> None:
    """Refuse a folder of something else; pairs of other settings are refused later."""
    if folder.exists() and (
        not folder.is_dir() or (any(folder.iterdir()) and not (folder / SETTINGS_FILE).is_file())
    ):
        raise ValueError(f"{folder} exists and holds no preferences; give a new folder, or one to go on with")
