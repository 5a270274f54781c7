"""Pass keys through a real server; documents, questions and scoring are those of `ic-train evaluate passkey`."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cases.serving_server import Server, ServerFailed, serve

if TYPE_CHECKING:
    from bench.cases.serving import Run

# room for a question and its answer in bytes
SPARE_TOKENS = 128
QUESTIONS_AT_A_TIME = 4


def find_keys(run: Run) -> None:
    """A row per cache dtype and length, written as soon as its last key was asked for."""
    o = run.options
    for kv_dtype in o.kv_dtypes.split(","):
        arguments = ["--max-model-len", str(max(o.context_tokens)), "--kv-cache-dtype", kv_dtype]
        arguments += [
            "--dtype",
            o.dtype,
            "--max-num-batched-tokens",
            str(o.step_tokens),
            *json.loads(o.serve),
        ]
        with tempfile.TemporaryDirectory() as scratch:
            try:
                with serve(run.model("ours"), arguments, Path(scratch) / "log") as server:
                    for tokens in o.context_tokens:
                        _find_at(run, server, kv_dtype, tokens)
            except ServerFailed as error:
                run.error(f"server with {kv_dtype}", str(error))


def _find_at(run: Run, server: Server, kv_dtype: str, tokens: int) -> None:
    samples: list[dict[str, Any]] = []
    for context in range(run.options.contexts):
        if run.left_s < 20:
            run.error("passkey", f"no time for context {context} of {tokens:,} tokens")
            break
        samples += _ask_all(run, server, tokens, context)
        print(f"    {sum(one['correct'] for one in samples)} of {len(samples)} right", flush=True)
    if samples:
        run.add(
            {
                "model": run.options.model,
                "engine": "vllm",
                "kv_dtype": run.options.dtype if kv_dtype == "auto" else kv_dtype,
                "task": "passkey",
                "haystack": "jargon",
                "context_tokens": tokens,
                "correct": sum(one["correct"] for one in samples),
                "total": len(samples),
                "samples": samples,
            }
        )


def _ask_all(run: Run, server: Server, tokens: int, context: int) -> Iterator[dict[str, Any]]:
    from ic_train.data.passkey import PassKey, parse_answer
    from ic_train.evaluation.haystack import load_haystack
    from ic_train.evaluation.passkey import make_document
    from transformers import AutoTokenizer

    o = run.options
    tokenizer = AutoTokenizer.from_pretrained(server.model)
    document = make_document(
        load_haystack("jargon"),
        tokenizer,
        context_tokens=tokens - SPARE_TOKENS,
        num_keys=o.keys // o.contexts,
        seed=o.seed + context,
    )
    ids = document.token_ids.tolist()
    began = time.monotonic()
    status, answer = server.complete(ids, timeout_s=max(10, run.left_s), max_tokens=1)
    prefill_s = time.monotonic() - began
    if status != 200:
        run.error("passkey", f"document {context} of {tokens:,} tokens: {answer}")
        return
    print(f"    {tokens:,} tokens, document {context} read in {prefill_s:.1f} s", flush=True)

    def ask(key: PassKey) -> dict[str, Any]:
        question = tokenizer(key.question, add_special_tokens=False)["input_ids"]
        asked = time.monotonic()
        status, answer = server.complete(ids + question, max_tokens=8)
        answer_s = time.monotonic() - asked
        text = answer["choices"][0]["text"] if status == 200 else str(answer)[:200]
        return {
            "context": context,
            "document_tokens": len(ids),
            "depth": round(key.depth, 4),
            "key": key.key,
            "expected": key.digits,
            "answer": text,
            "correct": status == 200 and parse_answer(text) == key.digits,
            "prefill_s": round(prefill_s, 3),
            "answer_s": round(answer_s, 3),
        }

    with ThreadPoolExecutor(QUESTIONS_AT_A_TIME) as pool:
        yield from pool.map(ask, document.pass_keys)
