"""Real engines on a GPU: ours without flags, our backends by name for DeepSeek's, and what is refused."""

import json

import pytest
import torch
from engine_process import greedy, run_apart
from ic_model import checkpoint_path
from ic_model.weights import export_deepseek_v3
from served_models import prompt_tokens, write_checkpoint

pytestmark = pytest.mark.gpu

NEW_TOKENS = 32
PROMPTS = [*(prompt_tokens(length, seed=length) for length in (1, 63, 64, 65, 900, 1500)), [70, 71, 72] * 40]
ENGINE = {"dtype": "float32", "kv_cache_memory_bytes": 2**30, "gpu_memory_utilization": 0.1}
NGRAMS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
# float32, so that greedy tokens can be compared with transformers' one by one
SAME_TOKENS = {
    "no flags": {},
    "eager": {"enforce_eager": True},
    "small steps": {"max_num_batched_tokens": 256, "max_num_seqs": 8},
    "drafts": {"speculative_config": NGRAMS},
}
REFUSED = {
    "fp8 cache of another format": ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype is 'fp8_e5m2'; accepted"),
    "wrong option": (
        {"additional_config": {"infinite_context": {"decode": "fast"}}},
        "is 'fast'; accepted: hopper",
    ),
}


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list], dict[str, dict]]:
    """Greedy tokens of transformers by model, and what the engines gave by case."""
    root = tmp_path_factory.mktemp("gpu")
    folders = {"nano": checkpoint_path("ic-nano"), "deepseek": root / "deepseek", "row 256": root / "row-256"}
    export_deepseek_v3(folders["nano"], folders["deepseek"])
    write_checkpoint(
        folders["row 256"], kv_lora_rank=192, qk_nope_head_dim=64, v_head_dim=64, kv_latent_norm=False
    )
    task = {"prompts": PROMPTS, "new_tokens": NEW_TOKENS, "rounds": 2}
    nano = {"checkpoint": str(folders["nano"]), **task}
    cases = {name: {**nano, "engine": {**ENGINE, **engine}} for name, engine in SAME_TOKENS.items()}
    cases["row 256"] = {**task, "checkpoint": str(folders["row 256"]), "engine": ENGINE}
    # float32 is none of vLLM's own; the weights of ic-nano are trained, and greedy tokens far apart
    half = {**ENGINE, "dtype": "bfloat16"}
    cases["bfloat16"] = {**nano, "engine": half}
    cases["fp8"] = {**nano, "engine": {**half, "kv_cache_dtype": "fp8"}}
    cases["fp8 weights"] = {**nano, "engine": {**half, "quantization": "fp8"}}
    custom = {**half, "attention_backend": "CUSTOM"}
    cases["deepseek, CUSTOM"] = {**task, "checkpoint": str(folders["deepseek"]), "engine": custom}
    cases["vLLM's decode, our prefill"] = {
        **nano,
        "engine": {**half, "attention_config": {"backend": "TRITON_MLA", "mla_prefill_backend": "CUSTOM"}},
    }
    cases |= {name: {**nano, "engine": {**half, **engine}} for name, (engine, _) in REFUSED.items()}
    expected = {
        name: greedy(folders[name], PROMPTS, NEW_TOKENS, device="cuda") for name in ("nano", "row 256")
    }
    return expected, run_apart(cases, at_once=4)


@pytest.mark.parametrize("name", SAME_TOKENS)
def test_greedy_tokens_equal_those_of_transformers(results, name):
    expected, found = results
    assert found[name].get("error") is None
    assert found[name]["tokens"] == found[name]["first_round"] == expected["nano"]


def test_rows_that_vllm_refuses_are_served(results):
    expected, found = results
    assert found["row 256"].get("error") is None
    assert found["row 256"]["tokens"] == expected["row 256"]


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("bfloat16", 1),
        ("fp8", 1),
        ("deepseek, CUSTOM", 1),
        ("vLLM's decode, our prefill", 1),
        # weights of 8 bits are other weights
        ("fp8 weights", 3),
    ],
)
def test_in_16_bits_most_tokens_are_those_of_transformers(results, name, others):
    expected, found = results
    assert found[name].get("error") is None
    # where two tokens are nearly as likely, 8 bits decide otherwise, and what follows is another text
    first = [
        served[0] == wanted[0] for served, wanted in zip(found[name]["tokens"], expected["nano"], strict=True)
    ]
    assert sum(first) >= len(first) - others, json.dumps(found[name]["tokens"])[:500]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_by_name(results, name):
    _, found = results
    assert REFUSED[name][1] in found[name]["error"]


def test_there_is_a_gpu():
    assert torch.cuda.is_available()
