"""`ic-train data`: corpora from local files, and preference pairs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ic_train.data.text import SUFFIXES, write_corpus
from ic_train.preferences.command import add_data_preferences


def add_data(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = commands.add_parser("data", help="make training data")
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    add_data_preferences(kinds)
    text = kinds.add_parser(
        "text",
        help="tokenise and pack text files into a memory-mapped corpus",
        description=(
            f"Tokenise text files ({', '.join(SUFFIXES)}; .gz, too) into one packed, "
            "memory-mapped corpus, and record "
            "where each came from and under which licence."
        ),
    )
    text.set_defaults(run=_text)
    add = text.add_argument
    add("out", type=Path, metavar="OUT", help="folder to make")
    add(
        "--from",
        dest="sources",
        nargs=2,
        action="append",
        required=True,
        metavar=("PATH", "LICENCE"),
        help="a file or folder, and its licence (as 'public-domain' or an SPDX name); repeatable",
    )
    add("--tokenizer", required=True, metavar="DIR", help="folder of the model or its tokenizer")
    add("--text-field", default="text", help="of rows in jsonl and parquet (default: text)")
    add("--max-tokens", type=int, default=0, metavar="N", help="most tokens of each source (default: all)")


def _text(options: argparse.Namespace) -> int:
    if options.max_tokens < 0:
        raise ValueError(f"--max-tokens is {options.max_tokens}; it must be at least 0")
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"--tokenizer is {options.tokenizer!r}; it cannot be read: {first}") from None
    corpus = write_corpus(
        options.out,
        [(path, licence) for path, licence in options.sources],
        tokenizer,
        tokenizer_name=Path(options.tokenizer).resolve().name,
        text_field=options.text_field,
        max_tokens=options.max_tokens,
    )
    for source in corpus.record["sources"]:
        print(
            f"{source['tokens']:>13,} tokens  {source['documents']:>8,} documents  {source['path']}  "
            f"({source['licence']})"
        )
    print(f"{corpus.record['tokens']:>13,} tokens  written: {options.out}")
    return 0
