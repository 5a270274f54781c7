"""The `ic-train` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

# command to the module that has it and the function that adds it to argparse's: the modules take seconds to import
_COMMANDS = {
    "convert": ("convert.command", "add_convert"),
    "convert-table": ("convert.table", "add_convert_table"),
    "data": ("data.command", "add_data"),
    "evaluate": ("evaluation.command", "add_evaluate"),
    "evaluate passkey": ("evaluation.passkey_command", "add_evaluate_passkey"),
    "evaluate compare": ("evaluation.command", "add_evaluate_compare"),
    "evaluate check": ("evaluation.pipeline", "add_evaluate_check"),
    "evaluate pipeline": ("evaluation.pipeline", "add_evaluate_pipeline"),
    "judge": ("judge.command", "add_judge"),
    "judge calibrate": ("judge.command", "add_judge_calibrate"),
}
# of two words; anything else behind `evaluate` is a model, and behind `judge` a file
_TWO_WORDS = {"evaluate": ("passkey", "compare", "check", "pipeline"), "judge": ("calibrate",)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ic-train`; the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if len(words) > 1 and words[1] in _TWO_WORDS.get(words[0], ()):
        words[:2] = [" ".join(words[:2])]
    options = _parser(words[:1]).parse_args(words)
    try:
        return options.run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser(asked: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the command that was asked for, or with all where it is none of them."""
    parser = argparse.ArgumentParser(
        prog="ic-train", description="Convert, train and evaluate long-context MLA models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in [one for one in asked if one in _COMMANDS] or _COMMANDS:
        module, function = _COMMANDS[name]
        add = getattr(import_module(f"ic_train.{module}"), function)
        # the pipeline runs other commands
        add(commands, main) if name == "evaluate pipeline" else add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
