"""What vLLM can do with every model, with ours: in the real engine, against transformers."""

import os
from pathlib import Path

import pytest
import torch
from engine_process import greedy, run_cases
from ic_model import ICForCausalLM
from quantised_models import write_gptq, write_lora
from served_models import prompt_tokens, write_checkpoint

from ic_vllm_plugin import compat

NEW_TOKENS = 24
# one short, one of several pages, one of several steps where steps are small, one whose n-grams repeat
PROMPTS = [*(prompt_tokens(length, seed=length) for length in (9, 130, 600)), [70, 71, 72] * 40]
NGRAMS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
SMALL_STEPS = {"max_num_batched_tokens": 256, "max_num_seqs": 8}
# what is left of a prompt whose pages are cached runs absorbed
ABSORBED = {"additional_config": {"infinite_context": {"absorbed_tokens": 128}}}
ADAPTED = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "gate_proj", "up_proj", "down_proj"]
# the same numbers in both, multiplied in bfloat16: about 2**-8 of logarithms around 6
LOGPROB_BFLOAT16 = 0.15
SAME_TOKENS = {
    "GPU backend": {"backend": "gpu"},
    "GPU backend, small steps, from the cache": {
        "backend": "gpu",
        "engine": SMALL_STEPS | ABSORBED,
        "rounds": 2,
    },
    "GPU backend, drafts": {"backend": "gpu", "engine": {"speculative_config": NGRAMS}},
    "drafts": {"engine": {"speculative_config": NGRAMS}},
    "two ranks": {"engine": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}},
}
# vLLM gives each rank of a CPU a NUMA node, unless it is told which cores
CORES = sorted(os.sched_getaffinity(0))
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": f"{CORES[0]}|{CORES[-1]}"}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("features")
    # adapted and quantised, the projections to both latents are apart; else one product
    base = write_checkpoint(root / "base", q_lora_rank=128)
    write_gptq(base, root / "gptq", root / "plain")
    write_lora(base, root / "adapter", root / "merged", ADAPTED)
    write_lora(base, root / "adapter-of-kv-b", None, ["o_proj", "kv_b_proj"])
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="session")
def results(folders: dict[str, Path]) -> dict[str, dict]:
    task = {"checkpoint": str(folders["base"]), "prompts": PROMPTS, "new_tokens": NEW_TOKENS}
    lora = {"engine": {"enable_lora": True, "max_lora_rank": 8}}
    cases = {name: {**task, **case} for name, case in SAME_TOKENS.items()}
    cases["choice"] = {**task, "choice": ["heron", "hedgehog"], "prompts": PROMPTS[:2]}
    cases["lora"] = {**task, **lora, "lora": str(folders["adapter"])}
    cases["lora of kv_b_proj"] = {**task, **lora, "lora": str(folders["adapter-of-kv-b"])}
    cases["4 bits"] = {
        **task,
        "checkpoint": str(folders["gptq"]),
        "engine": {"dtype": "bfloat16"},
        "prompt_logprobs": True,
    }
    # on a CPU vLLM patches Triton's kernels for drafts, once in a process, after which no other engine starts
    last, apart, ranks = ({name: cases.pop(name)} for name in ("GPU backend, drafts", "drafts", "two ranks"))
    return run_cases(cases | last) | run_cases(apart) | run_cases(ranks, environment=TWO_RANKS)


@pytest.fixture(scope="session")
def expected(folders: dict[str, Path]) -> list[list[int]]:
    return greedy(folders["base"], PROMPTS, NEW_TOKENS)


@pytest.mark.parametrize("name", SAME_TOKENS)
def test_greedy_tokens_equal_those_of_transformers(results, expected, name):
    assert results[name].get("error") is None
    assert results[name]["tokens"] == expected
    assert results[name]["first_round"] == expected


def test_structured_output_is_one_of_the_choices(results):
    assert results["choice"].get("error") is None
    assert set(results["choice"]["texts"]) <= {"heron", "hedgehog"}


def test_a_lora_adapter_computes_what_the_merged_model_does(results, folders, expected):
    assert results["lora"].get("error") is None
    assert results["lora"]["tokens"] == greedy(folders["merged"], PROMPTS, NEW_TOKENS)
    assert results["lora"]["tokens"] != expected


def test_a_lora_adapter_for_the_folded_projection_is_refused_by_name(results):
    error = results["lora of kv_b_proj"]["error"]
    assert "expected target modules in" in error and "kv_b_proj" in error.split("but received")[1]


def test_weights_of_4_bits_compute_what_their_numbers_do(results, folders):
    error = results["4 bits"].get("error")
    if compat.lacks_cpu_kernel_of_4_bits():
        # on such a processor nobody's can: that has to be said before anything is loaded
        assert "has weights of 4 bits (quant_method 'gptq'), for which vLLM" in error
        assert "without AVX-512" in error
        return
    assert error is None
    model = ICForCausalLM.from_pretrained(folders["plain"], dtype=torch.float32).eval()
    for prompt, served in zip(PROMPTS, results["4 bits"]["prompt_logprobs"], strict=True):
        ids = torch.tensor(prompt)
        with torch.inference_mode():
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        expected = logprobs.gather(1, ids[1:, None])[:, 0]
        assert (torch.tensor(served) - expected).abs().max() < LOGPROB_BFLOAT16
