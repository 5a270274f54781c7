"""What a client of `vllm serve` sees, against the same checkpoint in transformers."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ic_model import ICForCausalLM
from served_models import prompt_tokens

# float32 in both engines, but the sums are made in another order: absorbed, blockwise, by other kernels. The
# error grows with the logarithm itself: a trained model gives random bytes logarithms down to about -20
LOGPROB_ABSOLUTE, LOGPROB_RELATIVE = 1e-5, 5e-6
NEW_TOKENS = 64
# 1: no context. 200: absorbed prefill. 300: expanded prefill, within a page's reach of the limit.
# 4500: three steps of chunked prefill, so context and own tokens are merged.
PROMPT_LENGTHS = (1, 17, 200, 300, 4500)


@pytest.fixture(scope="session")
def reference(server) -> ICForCausalLM:
    # the server waits actively on its threads; a second thread here would mostly wait for one of those
    torch.set_num_threads(1)
    return ICForCausalLM.from_pretrained(server.checkpoint, dtype=torch.float32).eval()


def greedy(model: ICForCausalLM, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
        )
    return output[0, len(prompt) :].tolist()


def served_tokens(server, prompt: list[int]) -> list[int]:
    choice = server.complete(prompt, max_tokens=NEW_TOKENS, return_token_ids=True)
    return choice["token_ids"]


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_greedy_tokens_equal_those_of_transformers(server, reference, length):
    prompt = prompt_tokens(length, seed=length)
    assert served_tokens(server, prompt) == greedy(reference, prompt)


@pytest.mark.parametrize("length", (40, 700))
def test_logprobs_agree_with_transformers(server, reference, length):
    prompt = prompt_tokens(length, seed=1000 + length)
    choice = server.complete(prompt, max_tokens=1, prompt_logprobs=0)
    served = [next(iter(entry.values()))["logprob"] for entry in choice["prompt_logprobs"][1:]]
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt])).logits[0, :-1].double()
    expected = logits.log_softmax(-1)[torch.arange(length - 1), torch.tensor(prompt[1:])]
    torch.testing.assert_close(
        torch.tensor(served, dtype=torch.float64), expected, atol=LOGPROB_ABSOLUTE, rtol=LOGPROB_RELATIVE
    )


def test_a_batch_of_different_lengths_equals_one_by_one(server):
    prompts = [prompt_tokens(length, seed=2000 + length) for length in (3, 64, 129, 257, 1000, 2500)]
    one_by_one = [served_tokens(server, prompt) for prompt in prompts]
    fresh = [prompt_tokens(1, seed=9)] + prompts
    with ThreadPoolExecutor(len(fresh)) as pool:
        together = list(pool.map(lambda prompt: served_tokens(server, prompt), fresh))
    assert together[1:] == one_by_one


def test_a_second_question_reuses_the_cached_document(server, reference):
    document = prompt_tokens(1500, seed=3)
    hits = server.metric("vllm:prefix_cache_hits_total")
    for question in (prompt_tokens(20, seed=4), prompt_tokens(30, seed=5)):
        assert served_tokens(server, document + question) == greedy(reference, document + question)
    assert server.metric("vllm:prefix_cache_hits_total") - hits >= 1400


def test_the_context_offered_is_the_models_or_a_logged_cap(server):
    (model,) = json.loads(server.get("/v1/models"))["data"]
    assert model["max_model_len"] == 1_048_576 or "Context capped at" in server.log.read_text()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        pytest.param(b'{"prompt": [1, 2', "JSON", id="malformed JSON"),
        pytest.param({"prompt": []}, "prompt", id="empty prompt"),
        pytest.param({"prompt": [1] * 1_048_577}, "context length", id="over the context limit"),
        pytest.param({"prompt": [1], "max_tokens": -1}, "max_tokens", id="negative max_tokens"),
        pytest.param({"prompt": [264]}, "vocab", id="token outside the vocabulary"),
    ],
)
def test_a_bad_request_is_refused_and_the_server_lives_on(server, body, said):
    if isinstance(body, dict):
        body = {"model": str(server.checkpoint), "max_tokens": 1, **body}
    status, answer = server.post("/v1/completions", body)
    assert 400 <= status < 500
    assert said.lower() in answer["error"]["message"].lower()
    assert server.complete([1, 2, 3], max_tokens=1)["finish_reason"] == "length"


def test_metrics_count_what_was_served(server):
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total")
    before = [server.metric(name) for name in names]
    server.complete(prompt_tokens(50, seed=6), max_tokens=7)
    after = [server.metric(name) for name in names]
    assert [new - old for new, old in zip(after, before, strict=True)] == [50, 7, 1]
