"""Every shape of the architecture in vLLM's engine against transformers, and checkpoints that do not fit."""

from pathlib import Path

import pytest
import torch
from engine_process import greedy, run_cases
from ic_model import ICForCausalLM
from safetensors.torch import load_file, save_file
from served_models import YARN, prompt_tokens, write_checkpoint

NEW_TOKENS = 64
# random weights give every token a logarithm near log(1 / vocabulary), so that one absolute bound serves all; the
# trained model's are further apart, and test_server.py has theirs
LOGPROB_ABSOLUTE = 2e-5
# absorbed and expanded prefill in one batch
PROMPTS = [prompt_tokens(length, seed=length) for length in (9, 130, 600)]
SHAPES = {
    "row 576, q_lora": {"kv_lora_rank": 512, "q_lora_rank": 96},
    "no latent norms, YaRN": {
        "kv_latent_norm": False,
        "q_latent_norm": False,
        "q_lora_rank": 96,
        "rope_parameters": YARN,
    },
    "row 96, P = R, untied": {
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 48,
        "num_attention_heads": 3,
        "tie_word_embeddings": False,
    },
    # what `ic-train convert` writes: ranks that are no power of two, no latent norm, angles of its own, biases
    "converted, row 208, biases": {
        "kv_lora_rank": 192,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "kv_latent_norm": False,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "explicit",
            "inverse_frequencies": [1.0, 0.7, 0.7, 0.2, 0.05, 0.01, 0.001, 0.0],
        },
    },
}
DAMAGES = {
    "missing tensor": "lacks 1 tensors of InfiniteContextForCausalLM: model.layers.1.self_attn.kv_b_proj",
    "unknown tensor": "does not know: model.layers.0.self_attn.k_proj.weight",
}


def damaged(folder: Path, damage: str) -> Path:
    write_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    if damage == "missing tensor":
        del tensors["model.layers.1.self_attn.kv_b_proj.weight"]
    else:
        tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(4, 4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict]]:
    root = tmp_path_factory.mktemp("engine")
    folders = {name: write_checkpoint(root / str(i), **SHAPES[name]) for i, name in enumerate(SHAPES)}
    folders |= {name: damaged(root / name.replace(" ", "-"), name) for name in DAMAGES}
    task = {"prompts": PROMPTS, "new_tokens": NEW_TOKENS, "prompt_logprobs": True}
    found = run_cases({name: {"checkpoint": str(folder), **task} for name, folder in folders.items()})
    return {name: (folders[name], found[name]) for name in folders}


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_equal_those_of_transformers(results, shape):
    folder, result = results[shape]
    assert result.get("error") is None
    assert result["tokens"] == greedy(folder, PROMPTS, NEW_TOKENS)


@pytest.mark.parametrize("shape", SHAPES)
def test_logarithms_of_a_prompts_tokens_agree_with_transformers(results, shape):
    folder, result = results[shape]
    model = ICForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, served in zip(PROMPTS, result["prompt_logprobs"], strict=True):
        ids = torch.tensor(prompt)
        with torch.inference_mode():
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        expected = logprobs.gather(1, ids[1:, None])[:, 0]
        assert (torch.tensor(served) - expected).abs().max() < LOGPROB_ABSOLUTE


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(results, damage):
    _, result = results[damage]
    assert DAMAGES[damage] in result["error"]
