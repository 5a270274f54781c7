"""The demo's command line: what it accepts, and what it refuses before anything is started."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

MODEL = "ic-nano"
DEFAULT_TOKENS = 32768
DEFAULT_KEYS = 8
MIN_TOKENS = 1024
MAX_KEYS = 1000

_EPILOG = """\
exit status: 0 when every pass key was found, or the questions were your own; 1 when one was not found;
2 when an argument or the document is refused; 3 when the server failed.

Through hatch, arguments follow `--`, and braces are written twice ("{{" for "{").
"""


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line.

    Returns:
        `document` (Path or None), `questions` (list of str), `keys`, `seed`, `tokens`, `port`, `model` (Path
        or None), `timeout` (seconds), `keep_log`.

    Raises:
        ValueError: a value is out of range, or two options exclude each other.
        SystemExit: an option is unknown or malformed (argparse), or help was asked for.
    """
    options = _parser().parse_args(arguments)
    _check_together(options)
    options.keys = _number(options.keys, "--keys", DEFAULT_KEYS, low=1, high=MAX_KEYS)
    options.tokens = _number(options.tokens, "--tokens", DEFAULT_TOKENS, low=MIN_TOKENS)
    _number(options.port, "--port", 0, low=0, high=65535)
    _number(options.seed, "--seed", 0, low=0)
    if not options.timeout > 0:
        raise ValueError(f"--timeout is {options.timeout}; it must be a number of seconds above 0")
    if any(not question.strip() for question in options.questions):
        raise ValueError("--question is empty; it must have some text")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hatch run demo --",
        description="Serve the embedded model with vLLM, hide pass keys in a long document, ask for them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--document", type=Path, metavar="FILE", help="your own UTF-8 text (default: the Jargon File)")
    add("--question", dest="questions", action="append", default=[], metavar="TEXT",
        help="ask this about the document instead of pass keys; may be repeated")  # fmt: skip
    add("--keys", type=int, metavar="N", help=f"pass keys to hide (default: {DEFAULT_KEYS})")
    add("--tokens", "--max-document-tokens", type=int, metavar="N",
        help=f"how much of the Jargon File to use, pass keys included (default: {DEFAULT_TOKENS})")  # fmt: skip
    add("--seed", type=int, default=0, help="of the pass keys and their places (default: 0)")
    add("--model", type=Path, metavar="DIR", help=f"a checkpoint folder (default: the embedded {MODEL})")
    add("--port", type=int, default=0, help="for the server, on 127.0.0.1 (default: any free one)")
    add("--timeout", type=float, default=600.0, metavar="SECONDS",
        help="most for the server's start and for each request (default: 600)")  # fmt: skip
    add("--keep-log", action="store_true", help="keep the server's log also when nothing failed")
    return parser


def _check_together(options: argparse.Namespace) -> None:
    if options.questions and options.keys is not None:
        raise ValueError("--keys hides pass keys and --question asks your own questions; give one of them")
    if options.document is not None and options.tokens is not None:
        raise ValueError(
            "--tokens cuts the shipped document; your own --document is always used whole, so leave it out"
        )


def _number(value: int | None, option: str, default: int, *, low: int, high: int | None = None) -> int:
    number = default if value is None else value
    if number < low or (high is not None and number > high):
        accepted = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{option} is {number}; it must be {accepted}")
    return number
