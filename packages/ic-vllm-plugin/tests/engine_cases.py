"""Run in a process of its own by test_engine.py: one in-process engine per checkpoint, one line of JSON each.

python engine_cases.py CHECKPOINT... < prompts
"""

import json
import os
import sys


def run(checkpoint: str, prompts: list[list[int]], new_tokens: int) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        engine = LLM(checkpoint, dtype="float32", max_model_len=2048, kv_cache_memory_bytes=64 * 1024**2)
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, prompt_logprobs=0)
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = engine.generate(requests, sampling, use_tqdm=False)
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            # the first token has none
            "prompt_logprobs": [
                [next(iter(one.values())).logprob for one in output.prompt_logprobs[1:]] for output in outputs
            ],
        }
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    # the worker in this process: an engine then starts in seconds, and its exception is ours
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    task = json.load(sys.stdin)
    for path in sys.argv[1:]:
        print("RESULT " + json.dumps(run(path, task["prompts"], task["new_tokens"])), flush=True)
