"""The same greedy tokens as transformers, and the same answers whatever of vLLM's switches is on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.cases.serving_engine import random_prompt
from bench.cases.serving_server import run_child

if TYPE_CHECKING:
    from bench.cases.serving import Run

# odd lengths, page edges, longer than a step of any of the engines below
LENGTHS = (1, 17, 63, 64, 65, 300, 1000, 4500)
LONGEST = 8192
NEW_TOKENS = 48
NO_CHUNKS = {"enable_chunked_prefill": False, "max_num_batched_tokens": LONGEST}
CASES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "float32, eager": {"dtype": "float32", "enforce_eager": True},
    "float32, prefix caching": {"dtype": "float32", "enable_prefix_caching": True},
    "float32, chunks of 256": {"dtype": "float32", "max_num_batched_tokens": 256},
    "float32, no chunked prefill": {"dtype": "float32", **NO_CHUNKS},
    "float32, n-gram speculation": {
        "dtype": "float32",
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    },
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, chunks of 256": {"dtype": "bfloat16", "max_num_batched_tokens": 256},
    "bfloat16, fp8 cache": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
    "float16": {"dtype": "float16"},
}


def compare(run: Run, engine: dict[str, Any]) -> None:
    """A row per case: prompts with equal tokens, and how far logarithms differ up to the first other token.

    In float32 the tokens must be equal. In 16 bits they may part where two are nearly as likely; how far the
    logarithms are apart until then is what the row is for.
    """
    # a phrase that repeats, so that n-grams are found
    prompts = [random_prompt(length, seed=length) for length in LENGTHS] + [[70, 71, 72, 10] * 60]
    task = {"prompts": prompts, "new_tokens": NEW_TOKENS}
    print("transformers, float32", flush=True)
    reference = run_child({"task": "reference", "model": engine["model"], **task}, run.left_s)
    if "error" in reference:
        run.error("transformers", reference["error"])
        return
    for name in run.chosen(CASES):
        changes = CASES[name]
        print(name, flush=True)
        if run.left_s < 30:
            run.error(name, "no time left; choose cases with --only")
            continue
        specification = {"task": "greedy", "engine": {**engine, "max_model_len": LONGEST, **changes}, **task}
        # the second round is answered from the cache where there is one
        found = run_child({**specification, "repeats": 2}, run.left_s)
        if "error" in found:
            run.error(name, found["error"])
            continue
        gpus = f", {run.options.gpus} ranks" if run.options.gpus > 1 else ""
        row = _row(f"{name}{gpus}", changes["dtype"], found["rounds"], reference["rounds"][0])
        run.add({"model": run.options.model, "impl": "ours", **row})
        if changes["dtype"] == "float32" and row["equal"] != row["prompts"]:
            run.error(name, f"{row['prompts'] - row['equal']} prompts have other tokens than in transformers")
        if row["rounds_differ"] and changes["dtype"] == "float32":
            run.error(name, f"{row['rounds_differ']} prompts were answered in another way the second time")


def _row(name: str, dtype: str, rounds: list[dict[str, Any]], reference: dict[str, Any]) -> dict[str, Any]:
    first, second = rounds
    differences, agreed = [], []
    for tokens, logprobs, wanted, expected in zip(
        first["tokens"], first["logprobs"], reference["tokens"], reference["logprobs"], strict=True
    ):
        same = next((i for i, (a, b) in enumerate(zip(tokens, wanted, strict=True)) if a != b), len(wanted))
        agreed.append(same)
        differences += [abs(a - b) for a, b in zip(logprobs[:same], expected[:same], strict=True)]
    return {
        "case": name,
        "dtype": dtype,
        "prompts": len(reference["tokens"]),
        "equal": sum(a == b for a, b in zip(first["tokens"], reference["tokens"], strict=True)),
        "rounds_differ": sum(a != b for a, b in zip(first["tokens"], second["tokens"], strict=True)),
        "tokens_agreed": agreed,
        "max_logprob_difference": max(differences, default=float("nan")),
        "mean_logprob_difference": sum(differences) / len(differences) if differences else float("nan"),
    }
