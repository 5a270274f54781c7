"""One vLLM engine in a process of its own: what the serving benchmark measures from inside.

    python -m bench.cases.serving_engine < SPECIFICATION.json

prints progress, and one line `RESULT {...}`. A process per engine: what one leaves behind in memory is not the
next one's, and one that hangs can be ended.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
from ic_model.sizing import GIB

from bench.cases.serving_worker import EXTENSION

MARK = "RESULT "
PROGRESS_EVERY_S = 10.0


def say(text: str) -> None:
    """A line of progress, at once."""
    print(f"    {text}", flush=True)


def random_prompt(tokens: int, seed: int) -> list[int]:
    """Random bytes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (tokens,), generator=generator).tolist()


def on_gpu() -> bool:
    """Whether there is one; on a CPU the benchmark only shows that its code works."""
    return torch.cuda.is_available()


def limit_memory(limit_gib: float) -> dict[str, float]:
    """Let this process have no more of the GPU than a smaller card has, and tell what vLLM may divide.

    Returns:
        the CUDA context's GiB, and the `gpu_memory_utilization` that is 0.9 of the small card.

    Raises:
        ValueError: the limit is above the card, or so low that nothing is left.
    """
    free, total = torch.cuda.mem_get_info()
    context = total - free
    if not context < limit_gib * GIB <= total:
        raise ValueError(
            f"memory_limit_gib is {limit_gib}; accepted: {context / GIB:.2f} (what is in use) to {total / GIB:.2f}"
        )
    # the allocator raises an out-of-memory error beyond it, as a card of that size would
    torch.cuda.set_per_process_memory_fraction((limit_gib * GIB - context) / total)
    return {"context_gib": context / GIB, "utilization": 0.9 * limit_gib * GIB / total}


def timed(engine: Any, prompts: list[list[int]], new_tokens: int, limit_s: float) -> dict[str, Any]:
    """Run prompts together, and time every step.

    Returns:
        ttft_s of the first token of all, step_s of each step after it, tokens of each prompt, finished.
    """
    from vllm import SamplingParams

    # bytes at random are no text: tokenizers decodes all of them again with every token, which takes 0.2 s at 1M
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    started = shown = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.add_request(f"{started}-{index}", {"prompt_token_ids": prompt}, sampling)
    tokens: dict[str, list[int]] = {}
    ends: list[float] = []
    steps = 0
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        steps += 1
        for output in outputs:
            tokens[output.request_id] = list(output.outputs[0].token_ids)
        if len(tokens) == len(prompts) and outputs:
            ends.append(now)
        if now - shown > PROGRESS_EVERY_S:
            shown = now
            say(f"{now - started:5.0f} s, step {steps}, {sum(map(len, tokens.values()))} new tokens")
        if now - started > limit_s:
            engine.abort_request(list(tokens) or [f"{started}-{index}" for index in range(len(prompts))])
            return {"finished": False, "after_s": now - started, "steps": steps}
    return {
        "finished": True,
        "ttft_s": ends[0] - started,
        "step_s": [later - earlier for earlier, later in zip(ends[:-1], ends[1:], strict=True)],
        "tokens": list(tokens.values()),
    }


def run_timed(specification: dict[str, Any]) -> dict[str, Any]:
    """Start an engine, warm it up, and time prompts of the lengths asked for.

    Args:
        specification: `engine` (arguments of vLLM's LLM), `lengths`, and optionally `sequences`, `new_tokens`,
            `skip_prefill_attention`, `memory_limit_gib`, `limit_s`, `seed`.
    """
    arguments = {**specification["engine"], "worker_extension_cls": EXTENSION}
    limits: dict[str, float] = {}
    if specification.get("memory_limit_gib") and on_gpu():
        limits = limit_memory(specification["memory_limit_gib"])
        arguments["gpu_memory_utilization"] = limits.pop("utilization")
    began = time.perf_counter()
    from vllm import LLM

    llm = LLM(**arguments)
    start_s = time.perf_counter() - began
    if specification.get("skip_prefill_attention"):
        llm.collective_rpc("bench_skip_prefill_attention")
    engine = llm.llm_engine
    cache = engine.vllm_config.cache_config
    held = (cache.num_gpu_blocks or 0) * cache.block_size
    say(f"engine in {start_s:.0f} s, cache of {held:,} tokens")
    step_tokens = engine.vllm_config.scheduler_config.max_num_batched_tokens
    longest = engine.vllm_config.model_config.max_model_len
    # compiles what prefill needs with and without context
    timed(engine, [random_prompt(min(2 * step_tokens + 5, longest - 8), 1)], 4, limit_s=300)
    llm.collective_rpc("bench_reset_peak")
    runs = []
    budget = time.perf_counter() + specification.get("limit_s", 500)
    for length in specification["lengths"]:
        new_tokens = specification.get("new_tokens", 64)
        prompts = [
            random_prompt(length - new_tokens, specification.get("seed", 0) + 10 + number)
            for number in range(specification.get("sequences", 1))
        ]
        left = budget - time.perf_counter()
        estimate = _estimate(runs, length)
        if left <= 0 or estimate > left:
            say(f"{length:,} tokens not run: about {estimate:.0f} s, {left:.0f} s left")
            runs.append({"context_tokens": length, "finished": False, "estimate_s": estimate})
            continue
        found = timed(engine, prompts, new_tokens, left)
        # of the GPU that needed most
        memory = max(llm.collective_rpc("bench_memory"), key=lambda of_gpu: of_gpu.get("peak_gib", 0.0))
        runs.append({"context_tokens": length, **found, **memory})
        say(f"{length:,} tokens: {_summary(found)}")
    return {"start_s": start_s, "cache_tokens": held, "step_tokens": step_tokens, "runs": runs, **limits}


def _estimate(runs: list[dict[str, Any]], length: int) -> float:
    """Seconds of a prompt, from the last one's: attention grows with the square."""
    done = [run for run in runs if run.get("finished")]
    return done[-1]["ttft_s"] * (length / done[-1]["context_tokens"]) ** 2 if done else 0.0


def _summary(found: dict[str, Any]) -> str:
    if not found["finished"]:
        return f"not finished after {found['after_s']:.0f} s"
    steps = sorted(found["step_s"])
    step = f", {1e3 * steps[len(steps) // 2]:.2f} ms per step" if steps else ""
    return f"first token after {found['ttft_s']:.2f} s{step}"


def run_greedy(specification: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens of prompts, all asked `repeats` times, with the logarithms of their probabilities.

    Args:
        specification: `engine`, `prompts`, `new_tokens`, and optionally `repeats`.
    """
    from vllm import LLM, SamplingParams

    llm = LLM(**specification["engine"])
    sampling = SamplingParams(
        temperature=0, max_tokens=specification["new_tokens"], ignore_eos=True, logprobs=0
    )
    rounds = []
    for _ in range(specification.get("repeats", 1)):
        requests = [{"prompt_token_ids": prompt} for prompt in specification["prompts"]]
        outputs = [output.outputs[0] for output in llm.generate(requests, sampling, use_tqdm=False)]
        rounds.append(
            {
                "tokens": [list(output.token_ids) for output in outputs],
                "logprobs": [
                    [
                        entry[token].logprob
                        for token, entry in zip(output.token_ids, output.logprobs, strict=True)
                    ]
                    for output in outputs
                ],
            }
        )
    return {"rounds": rounds}


def run_reference(specification: dict[str, Any]) -> dict[str, Any]:
    """The same from transformers, float32.

    Args:
        specification: `model`, `prompts`, `new_tokens`.
    """
    from ic_model import ICForCausalLM

    device = "cuda" if on_gpu() else "cpu"
    model = ICForCausalLM.from_pretrained(specification["model"], dtype=torch.float32).to(device).eval()
    # as vLLM's ignore_eos
    model.generation_config.eos_token_id = None
    tokens, logprobs = [], []
    for prompt in specification["prompts"]:
        ids = torch.tensor([prompt], device=device)
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=specification["new_tokens"],
                output_logits=True,
                return_dict_in_generate=True,
            )
        chosen = output.sequences[0, len(prompt) :]
        rows = torch.cat(output.logits).float().log_softmax(-1)
        tokens.append(chosen.tolist())
        logprobs.append(rows.gather(1, chosen[:, None])[:, 0].tolist())
    return {"rounds": [{"tokens": tokens, "logprobs": logprobs}]}


def run_roofline(specification: dict[str, Any]) -> dict[str, Any]:
    """What the device reads at most; see `bench.roofline`."""
    from bench.roofline import measure_roofline

    return measure_roofline(torch.device("cuda" if on_gpu() else "cpu")).fields()


TASKS = {"timed": run_timed, "greedy": run_greedy, "reference": run_reference, "roofline": run_roofline}


def main() -> None:
    """Read a specification with `task` from standard input; print the result."""
    # the worker in this process: its memory and its steps are then ours to see
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    specification = json.load(sys.stdin)
    if specification.get("task") not in TASKS:
        raise ValueError(f"task is {specification.get('task')!r}; accepted: {', '.join(TASKS)}")
    result = TASKS[specification["task"]](specification)
    print(MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
