"""The `ic-train` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ic_train.convert.command import add_convert
from ic_train.convert.table import add_convert_table
from ic_train.data.command import add_data
from ic_train.evaluation.command import add_evaluate, add_evaluate_compare
from ic_train.evaluation.passkey_command import add_evaluate_passkey
from ic_train.evaluation.pipeline import add_evaluate_check, add_evaluate_pipeline
from ic_train.judge.command import add_judge, add_judge_calibrate

# of two words; anything else behind `evaluate` is a model, and behind `judge` a file
_TWO_WORDS = {"evaluate": ("passkey", "compare", "check", "pipeline"), "judge": ("calibrate",)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ic-train`; the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if len(words) > 1 and words[1] in _TWO_WORDS.get(words[0], ()):
        words[:2] = [" ".join(words[:2])]
    options = _parser().parse_args(words)
    try:
        return options.run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ic-train", description="Convert, train and evaluate long-context MLA models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_convert(commands)
    add_convert_table(commands)
    add_data(commands)
    add_evaluate(commands)
    add_evaluate_passkey(commands)
    add_evaluate_compare(commands)
    add_evaluate_check(commands)
    add_evaluate_pipeline(commands, main)
    add_judge(commands)
    add_judge_calibrate(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
