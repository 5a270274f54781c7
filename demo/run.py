"""The demo itself, step by step."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from demo.options import MODEL, parse_options
from demo.progress import Progress
from demo.report import dtype_bytes, gpu_commands, kv_table, section, table
from demo.server import Server, ServerError

if TYPE_CHECKING:
    # these import transformers, which takes seconds: not before the arguments are known to be good
    from ic_train.data.passkey import PassKey

    from demo.ask import Reader
    from demo.document import Checkpoint, Document

EXIT_OK, EXIT_WRONG, EXIT_REFUSED, EXIT_SERVER = 0, 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status, which `--help` explains."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_on_signal)
    try:
        options = parse_options(arguments)
        return _run(options, arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_SERVER
    except KeyboardInterrupt:
        print("\ninterrupted; the server is stopped", file=sys.stderr)
        return 128 + signal.SIGINT


def _exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    """Leave through every `finally` and `__exit__`, which stop the server."""
    sys.exit(128 + number)


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    print("InfiniteContext: a long document, a latent KV cache, and questions", flush=True)
    checkpoint, document = _prepare(options)
    server = Server(checkpoint.folder, port=options.port, keep_log=options.keep_log)
    print(
        table(
            [
                ("document", f"{document.title}, {document.tokens:,} tokens"),
                ("hidden", f"{len(document.pass_keys)} pass keys" if document.pass_keys else "nothing"),
                ("model", f"{checkpoint.name}, {checkpoint.context_tokens:,} tokens of context"),
                ("server", f"vllm serve {checkpoint.name} at {server.url}"),
            ]
        )
    )
    section("Starting the server")
    with server:
        if options.keep_log:
            print(f"  its log: {server.log}")
        progress = Progress()
        server.wait_until_healthy(options.timeout, progress)
        progress.done("healthy")
        right = _ask_all(options, checkpoint, document, server)
    section("The same on a GPU")
    print(gpu_commands(arguments, options.model))
    return EXIT_OK if right else EXIT_WRONG


def _prepare(options: argparse.Namespace) -> tuple[Checkpoint, Document]:
    """The checkpoint, and the document with its pass keys; refuses what the model cannot take."""
    from ic_model import checkpoint_path

    from demo.document import Checkpoint, own_document, shipped_document

    checkpoint = Checkpoint(options.model or checkpoint_path(MODEL))
    # before anything is started: what is printed last needs it
    dtype_bytes(checkpoint.config)
    keys = 0 if options.questions else options.keys
    if options.document is not None:
        document = own_document(options.document, checkpoint, keys=keys, seed=options.seed)
    else:
        document = shipped_document(checkpoint, tokens=options.tokens, keys=keys, seed=options.seed)
    _check_fits(options, checkpoint, document, checkpoint.context_tokens, f"{checkpoint.name}'s context")
    return checkpoint, document


def _check_fits(
    options: argparse.Namespace, checkpoint: Checkpoint, document: Document, context_tokens: int, whose: str
) -> None:
    from demo.document import check_fits

    check_fits(document, _longest_question(options, checkpoint, document), context_tokens, whose)


def _longest_question(options: argparse.Namespace, checkpoint: Checkpoint, document: Document) -> int:
    """Tokens of the longest question and its answer together."""
    from demo.ask import OWN_ANSWER_TOKENS, PASS_KEY_ANSWER_TOKENS, own_prompt

    questions, answer_tokens = [pass_key.question for pass_key in document.pass_keys], PASS_KEY_ANSWER_TOKENS
    if options.questions:
        questions = [own_prompt(question) for question in options.questions]
        answer_tokens = OWN_ANSWER_TOKENS
    return max(map(checkpoint.count_tokens, questions)) + answer_tokens


def _ask_all(options: argparse.Namespace, checkpoint: Checkpoint, document: Document, server: Server) -> bool:
    """Read the document, ask, print; whether nothing was wrong."""
    from demo.ask import Reader

    reader = Reader(server, document, timeout_s=options.timeout)
    _check_fits(options, checkpoint, document, reader.context_tokens, "the server's context on this machine")
    section("Reading the document")
    progress = Progress()
    read = reader.read(progress)
    progress.done(f"{read.prompt_tokens:,} tokens, {read.prompt_tokens / read.seconds:,.0f} per second")
    section("Asking")
    right = _own_questions(options, reader) if options.questions else _pass_keys(document.pass_keys, reader)
    section(f"KV cache of these {read.prompt_tokens:,} tokens")
    print(kv_table(checkpoint.config, read.prompt_tokens))
    return right


def _own_questions(options: argparse.Namespace, reader: Reader) -> bool:
    from demo.ask import OWN_ANSWER_TOKENS, own_prompt

    for question in options.questions:
        answer = reader.ask(own_prompt(question), OWN_ANSWER_TOKENS, Progress())
        print(
            f"  question  {question}\n  answer    {answer.text or '(empty)'}  ({answer.seconds:.1f} s)",
            flush=True,
        )
    if options.model is None:
        print(
            f"  {MODEL} is trained for one kind of question, 'pass key for WORD?', and answers others with\n"
            "  whatever looks like one. Larger checkpoints go in with --model DIR."
        )
    return True


def _pass_keys(pass_keys: Sequence[PassKey], reader: Reader) -> bool:
    from ic_train.data.passkey import parse_answer

    from demo.ask import PASS_KEY_ANSWER_TOKENS, shown

    rows = [("depth", "question", "expected", "answer", "", "seconds")]
    correct, progress = 0, Progress()
    for pass_key in pass_keys:
        answer = reader.ask(pass_key.question, PASS_KEY_ANSWER_TOKENS, progress)
        digits = parse_answer(answer.text)
        found = digits == pass_key.digits
        correct += found
        rows.append(
            (
                f"{pass_key.depth:.0%}",
                shown(pass_key.question),
                pass_key.digits,
                digits or answer.text or "(empty)",
                "right" if found else "WRONG",
                f"{answer.seconds:.1f}",
            )
        )
    print(table(rows, right=(0, 5)))
    print(f"  {correct} of {len(pass_keys)} right", flush=True)
    return correct == len(pass_keys)
