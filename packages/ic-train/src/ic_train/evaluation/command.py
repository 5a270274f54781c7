"""`ic-train evaluate`: a model in this process or behind a server, against retrieval tasks and perplexity."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from ic_model import checkpoint_path
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ic_train.evaluation.client import APIS, Client, ServedModel, ServerError
from ic_train.evaluation.engines import InProcess, Server
from ic_train.evaluation.haystack import HAYSTACKS, load_haystack
from ic_train.evaluation.passkey_command import DTYPES, readable
from ic_train.evaluation.report import MIN_FOR_PERCENTAGE, TABLE_FILE, compare, read_report
from ic_train.evaluation.ruler import left_out, ruler_suites
from ic_train.evaluation.ruler_tasks import RULER_FILES, RULER_TASKS, RulerPlan
from ic_train.evaluation.run import PERPLEXITY, SUITES, Run, check_lengths, evaluate
from ic_train.evaluation.tasks import ANSWER_TOKENS, Plan
from ic_train.evaluation.trackers import add_report_to, parse_report_to, send_report
from ic_train.evaluation.wordings import PLAIN

API_KEY_VARIABLE = "OPENAI_API_KEY"
_IN_PROCESS = ("dtype", "device", "chunk_tokens")
_THROUGH_SERVER = ("api", "tokenizer", "kv_dtype", "concurrency", "retries", "timeout_s")
_FINGERPRINT_BYTES = 1_048_576
_UNITS = {"": 1, "k": 1024, "m": 1_048_576}


def add_evaluate(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = commands.add_parser(
        "evaluate",
        help="measure what a model can do",
        description=(
            "Ask a model about long contexts and count the right answers. Every answer is written at once: the "
            "same call after an interruption asks only what is missing. Further commands: evaluate compare, "
            "check, pipeline and passkey."
        ),
    )
    parser.set_defaults(run=lambda options: _evaluate(options, parser))
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help="checkpoint folder or ic-nano; with --server, the served name",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder of answers and report")
    add(
        "--suite",
        default="passkey,niah",
        metavar="A,B",
        help=f"of {', '.join(SUITES)} (default: passkey,niah); ruler is all that follow it",
    )
    add("--lengths", default="4k", metavar="N,N", help="contexts in tokens, as 4k,128k,1M (default: 4k)")
    add(
        "--questions",
        type=int,
        default=MIN_FOR_PERCENTAGE,
        help=f"per task and length (default: {MIN_FOR_PERCENTAGE}; fewer give no percentage)",
    )
    add("--keys-per-context", type=int, default=50, help="questions that share a context (default: 50)")
    add("--texts", type=int, default=4, help="texts per length for perplexity (default: 4)")
    add("--haystack", default="jargon", help=f"one of {', '.join(HAYSTACKS)}, or a UTF-8 text file")
    for option in RULER_FILES:
        add(f"--{option}", type=Path, metavar="FILE", help=f"for ruler_qa_{option}: {RULER_FILES[option]}")
    add("--seed", type=int, default=1000, help="of texts, keys and depths (default: 1000)")
    add_report_to(parser)
    add(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="in process: weights and cache (default: bfloat16)",
    )
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="in process; default: cuda where there is one",
    )
    add("--chunk-tokens", type=int, default=0, metavar="N", help="in process: read N tokens at a time")
    add_server(parser, required=False)
    add("--api", choices=APIS, default="completions", help="completions sends token ids, chat sends text")
    add("--tokenizer", metavar="DIR", help="of the served model; default: MODEL, where that is a folder")
    add("--kv-dtype", default="unstated", help="of the server's cache, for the report")


def add_server(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the options that say how a server is asked."""
    add = parser.add_argument
    add("--server", required=required, metavar="URL", help="an OpenAI-compatible server")
    add("--concurrency", type=int, default=16, help="most requests at a time (default: 16)")
    add(
        "--retries",
        type=int,
        default=5,
        help="after 429, 5xx, time-outs and answers without text (default: 5)",
    )
    add("--timeout-s", type=float, default=600, help="of one try (default: 600)")


def add_evaluate_compare(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = commands.add_parser("evaluate compare", help="show several evaluations side by side")
    parser.set_defaults(run=_compare)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="DIR", help="--out of earlier runs; the first is the base"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the Markdown table there, too")


def connect(options: argparse.Namespace) -> Client:
    """The client of --server.

    Raises:
        ValueError: one of its options is out of range.
    """
    check_at_least(options, concurrency=1, retries=0)
    if options.timeout_s <= 0:
        raise ValueError(f"--timeout-s is {options.timeout_s}; it must be above 0")
    key = os.environ.get(API_KEY_VARIABLE) or "none"
    return Client(options.server, timeout_s=options.timeout_s, retries=options.retries, api_key=key)


def check_at_least(options: argparse.Namespace, **least: int) -> None:
    """Refuse options below their least value.

    Raises:
        ValueError: names the option.
    """
    for name, value in least.items():
        if getattr(options, name) < value:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is {getattr(options, name)}; it must be at least {value}")


def parse_lengths(text: str) -> list[int]:
    """Token counts from a list as `4k,32k,1M`, where k is 1,024 and M is 1,048,576.

    Raises:
        ValueError: a part is no such number.
    """
    lengths = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)([kKmM]?)", part.strip())
        if not match:
            raise ValueError(
                f"--lengths has {part!r}; give numbers of tokens as 4096, 4k or 1M, with commas between"
            )
        lengths.append(int(match[1]) * _UNITS[match[2].lower()])
    return sorted(set(lengths))


def report_server_error(error: ServerError) -> int:
    """Say what failed and how to go on; the exit status."""
    print(f"error: {error}\nWhat was answered is kept; the same command asks for the rest.", file=sys.stderr)
    return 1


def _evaluate(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    _refuse_idle_options(options, parser)
    suites = list(dict.fromkeys(options.suite.split(",")))
    if unknown := [name for name in suites if name not in SUITES]:
        raise ValueError(f"--suite has {unknown[0]!r}; accepted are {', '.join(SUITES)}")
    notice = left_out(suites, _ruler_files(options))
    suites = ruler_suites(suites, _ruler_files(options))
    trackers = parse_report_to(options.report_to)
    lengths = parse_lengths(options.lengths)
    check_at_least(options, questions=1, keys_per_context=1, texts=1, chunk_tokens=0)
    try:
        if options.server:
            table = asyncio.run(_through_server(options, suites, lengths))
        else:
            table = asyncio.run(_in_process(options, suites, lengths))
    except ServerError as error:
        return report_server_error(error)
    print(f"{table}\n{notice}written: {options.out / TABLE_FILE}")
    send_report(trackers, options.out)
    return 0


def _ruler_files(options: argparse.Namespace) -> dict[str, Path]:
    return {name: getattr(options, name) for name in RULER_FILES if getattr(options, name)}


def _refuse_idle_options(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse options that have no effect on this way of asking."""
    names = _IN_PROCESS if options.server else _THROUGH_SERVER
    for name in names:
        if getattr(options, name) != parser.get_default(name):
            option, where = name.replace("_", "-"), "with" if options.server else "without"
            raise ValueError(f"--{option} is {getattr(options, name)!r}; it has no effect {where} --server")


async def _in_process(options: argparse.Namespace, suites: list[str], lengths: list[int]) -> str:
    if not options.model:
        raise ValueError("MODEL is missing; give a checkpoint folder, ic-nano, or --server URL")
    folder = checkpoint_folder(options.model)
    with readable("MODEL", options.model):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[options.dtype])
    model = model.to(options.device).eval()
    limit = getattr(model.config, "max_position_embeddings", None)
    check_lengths(lengths, limit, source=f"max_position_embeddings of {folder.name}")
    labels = {"model": folder.name, "engine": "transformers", "kv_dtype": options.dtype}
    run = _run(options, suites, lengths, tokenizer, labels, weights_fingerprint(folder))
    engine = InProcess(model, tokenizer, chunk_tokens=options.chunk_tokens)
    return await evaluate(run, engine, model)


async def _through_server(options: argparse.Namespace, suites: list[str], lengths: list[int]) -> str:
    if PERPLEXITY in suites:
        raise ValueError("--suite has perplexity, which is measured in process; leave it out with --server")
    async with connect(options) as client:
        served = await client.served_model(options.model)
        check_lengths(lengths, served.max_tokens, source=f"what {client.url} says of {served.name}")
        folder = _tokenizer_folder(options, served)
        with readable("--tokenizer", str(folder)):
            tokenizer = AutoTokenizer.from_pretrained(folder)
        labels = {"model": Path(served.name).name, "engine": served.engine, "kv_dtype": options.kv_dtype}
        run = _run(options, suites, lengths, tokenizer, labels, None)
        engine = Server(client, served, tokenizer, api=options.api, concurrency=options.concurrency)
        return await evaluate(run, engine)


def _run(
    options: argparse.Namespace,
    suites: list[str],
    lengths: list[int],
    tokenizer: PreTrainedTokenizerBase,
    labels: dict[str, str],
    weights: str | None,
) -> Run:
    haystack = load_haystack(options.haystack)
    if not haystack:
        raise ValueError(f"--haystack is {options.haystack!r}, which is empty; give a file with text")
    chat = bool(options.server) and options.api == "chat"
    sample = json.dumps(tokenizer(haystack[:10_000], add_special_tokens=False)["input_ids"])
    settings = {
        **labels,
        "weights": weights,
        "tokenizer": hashlib.sha256(sample.encode()).hexdigest(),
        "api": options.api if options.server else None,
        "questions": options.questions,
        "keys_per_context": options.keys_per_context,
        "texts": options.texts,
        "haystack_sha256": hashlib.sha256(haystack.encode()).hexdigest(),
        "seed": options.seed,
    }
    if chat:
        # not in the settings of the other ways of asking, whose folders may be older than this limit
        settings["answer_tokens"] = PLAIN.answer_tokens
    plan = Plan(
        haystack=haystack,
        tokenizer=tokenizer,
        num_questions=options.questions,
        keys_per_context=options.keys_per_context,
        seed=options.seed,
        # a server's chat template is around the message already
        wording=PLAIN if chat else None,
        # behind the template an answer does not go on with the prompt: it may be a sentence of its own
        answer_tokens=PLAIN.answer_tokens if chat else ANSWER_TOKENS,
    )
    ruler = None
    if any(name in RULER_TASKS for name in suites):
        ruler = RulerPlan(
            haystack=haystack,
            haystack_name=Path(options.haystack).name,
            tokenizer=tokenizer,
            num_questions=options.questions,
            seed=options.seed,
            # a server's chat template starts the text itself
            special_tokens=not chat,
            data=_ruler_files(options),
        )
    return Run(
        folder=options.out,
        plan=plan,
        suites=suites,
        lengths_tokens=lengths,
        texts=options.texts,
        labels=labels,
        settings=settings,
        ruler=ruler,
        optional=[name for name in suites if name not in options.suite.split(",")],
        chunk_tokens=options.chunk_tokens,
    )


def _compare(options: argparse.Namespace) -> int:
    runs = {}
    for path in options.runs:
        name = path.name if path.name not in runs else str(path)
        runs[name] = read_report(path)
    table = compare(runs)
    if options.write:
        options.write.write_text(table)
    print(table, end="")
    return 0


def weights_fingerprint(folder: Path) -> str:
    """Tells a checkpoint from a later one of the same name, without reading all of it."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{path.name} {size}".encode() + file.read(_FINGERPRINT_BYTES))
            file.seek(max(0, size - _FINGERPRINT_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


def checkpoint_folder(name: str) -> Path:
    """A folder by its path, or the embedded checkpoint of that name.

    Raises:
        ValueError: it is neither.
    """
    return Path(name) if Path(name).is_dir() else checkpoint_path(name)


def _tokenizer_folder(options: argparse.Namespace, served: ServedModel) -> Path:
    """Where the served model's tokenizer lies; contexts are measured with it."""
    try:
        return checkpoint_folder(options.tokenizer or served.name)
    except ValueError as error:
        raise ValueError(
            f"--tokenizer is {options.tokenizer!r} and the served model is {served.name!r}; "
            f"give the folder of its tokenizer ({error})"
        ) from None
