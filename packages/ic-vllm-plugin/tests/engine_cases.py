"""Run in a process of its own: one in-process engine per case, one line of JSON each.

python engine_cases.py < cases

A case has `checkpoint`, `prompts` and `new_tokens`, and optionally `engine` (more arguments of vLLM's LLM),
`backend` ("gpu": the one for GPUs, on the CPU), `rounds` (how often all is asked), `choice` (structured output),
`lora` (an adapter) and `prompt_logprobs`.
"""

import json
import os
import sys
from typing import Any

ENGINE = {"dtype": "float32", "max_model_len": 2048, "kv_cache_memory_bytes": 64 * 1024**2}


def run(case: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    import ic_vllm_plugin.model as model

    original = model._attention_backend
    try:
        if case.get("backend") == "gpu":
            from ic_vllm_plugin.attention import LatentBackend

            model._attention_backend = lambda vllm_config: LatentBackend
        engine = LLM(case["checkpoint"], **{**ENGINE, **case.get("engine", {})})
        choice = case.get("choice")
        sampling = SamplingParams(
            temperature=0,
            max_tokens=case["new_tokens"],
            ignore_eos=choice is None,
            prompt_logprobs=0 if case.get("prompt_logprobs") else None,
            structured_outputs=StructuredOutputsParams(choice=choice) if choice else None,
        )
        lora = LoRARequest("adapter", 1, case["lora"]) if case.get("lora") else None
        requests = [{"prompt_token_ids": prompt} for prompt in case["prompts"]]
        rounds = [
            engine.generate(requests, sampling, use_tqdm=False, lora_request=lora)
            for _ in range(case.get("rounds", 1))
        ]
        outputs = rounds[-1]
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "texts": [output.outputs[0].text for output in outputs],
            "first_round": [list(output.outputs[0].token_ids) for output in rounds[0]],
            # the first token has none
            "prompt_logprobs": [
                [next(iter(one.values())).logprob for one in (output.prompt_logprobs or [None])[1:]]
                for output in outputs
            ],
        }
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        model._attention_backend = original
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    # the worker in this process: an engine then starts in seconds, and its exception is ours
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for one in json.load(sys.stdin):
        print("RESULT " + json.dumps(run(one)), flush=True)
