"""Ten ordinary chat questions through `vllm serve`, to a source model and to what was converted or healed of it.

    python -m bench.cases.conversion_chat source=SmolLM2-135M-Instruct healed=work/128-64-healed

Each checkpoint is served in turn, by the `vllm` beside this Python and with the plugin; answers are greedy, so
that they can be repeated. They are printed in full, and committed as a result. Words after `--` go to
`vllm serve`: `-- --gpu-memory-utilization 0.4` where something else runs on the GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ic_train.results import new_result_folder, write_result
from openai import OpenAI

from demo.progress import Progress
from demo.server import Server, ServerError

TOPIC = "conversion-chat"
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "How do I boil an egg?",
    "Explain what a computer program is to a child.",
    "Give me three tips for better sleep.",
    "What is the difference between a frog and a toad?",
    "Write an e-mail to my colleague Anna to say that I am ill today.",
    "Name five fruits and the colour of each.",
    "Summarise in a sentence: The ship left at dawn. The wind was strong, but by evening it reached the island.",
)
REQUEST_TIMEOUT_S = 300.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve, ask, print and write the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.cases.conversion_chat", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER", help="checkpoints, each with its name")
    parser.add_argument(
        "--max-tokens", type=int, default=160, metavar="N", help="of an answer (default: 160)"
    )
    parser.add_argument(
        "--timeout", type=float, default=600, metavar="S", help="for a server to start (default: 600)"
    )
    parser.add_argument("--results", type=Path, default=Path("bench/results"), metavar="DIR")
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    options, flags = parser.parse_args(given[:end]), given[end + 1 :]
    try:
        named = [_named(text) for text in options.models]
        rows: list[dict[str, Any]] = []
        folder = None
        for name, path in named:
            rows += ask(name, path, options.max_tokens, options.timeout, flags)
            folder = folder or new_result_folder(options.results, TOPIC)
            # after every model: what was answered stays, whatever comes
            write_result(folder, TOPIC, rows)
    except (ValueError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(beside_each_other(rows))
    print(f"written: {folder}")
    return 0


def ask(
    name: str, checkpoint: Path, max_tokens: int, timeout_s: float, flags: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Serve a checkpoint and ask it all questions, one after the other.

    Args:
        name: of the model, for the rows.
        checkpoint: its folder.
        max_tokens: of an answer.
        timeout_s: for the server to start.
        flags: more of `vllm serve`.

    Returns:
        a row per question.

    Raises:
        ServerError: the server did not start.
    """
    with Server(checkpoint, flags=flags) as server:
        server.wait_until_healthy(timeout_s, Progress())
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=REQUEST_TIMEOUT_S)
        served = client.models.list().data[0].id
        rows = []
        for question in QUESTIONS:
            started = time.perf_counter()
            reply = client.chat.completions.create(
                model=served,
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=max_tokens,
            )
            rows.append(
                {
                    "model": name,
                    "checkpoint": checkpoint.name,
                    "engine": f"vllm {metadata.version('vllm')}",
                    "task": "chat",
                    "question": question,
                    "answer": reply.choices[0].message.content,
                    "finish_reason": reply.choices[0].finish_reason,
                    "answer_tokens": reply.usage.completion_tokens if reply.usage else None,
                    "seconds": round(time.perf_counter() - started, 2),
                }
            )
    return rows


def beside_each_other(rows: Sequence[dict[str, Any]]) -> str:
    """Every question with the answers of all models, as text."""
    lines = []
    for question in QUESTIONS:
        lines.append(f"\n## {question}")
        for row in rows:
            if row["question"] == question:
                cut = "" if row["finish_reason"] == "stop" else f" [{row['finish_reason']}]"
                lines.append(f"\n{row['model']}: {row['answer']}{cut}")
    return "\n".join(lines)


def _named(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not name or not (Path(folder) / "config.json").is_file():
        raise ValueError(f"models has {text!r}; accepted: NAME=FOLDER, a folder with a config.json")
    return name, Path(folder)


if __name__ == "__main__":
    sys.exit(main())
