"""`generate` with the latent cache, and with the other caches of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import YARN, random_ids, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from ic_model import ICConfig, ICForCausalLM, LatentCache
from ic_model.cache import LatentLayer
from ic_model.testing import assert_close

NEW_TOKENS = 12
# eos would end some sequences early and make lengths differ
GREEDY: dict[str, Any] = {
    "max_new_tokens": NEW_TOKENS,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def without_cache(model: ICForCausalLM, ids: torch.Tensor, new_tokens: int = NEW_TOKENS) -> torch.Tensor:
    """Greedy tokens from the whole sequence at every step: the definition."""
    for _ in range(new_tokens):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return ids


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "fields", [{}, {"q_lora_rank": 12, "rope_parameters": YARN, "kv_latent_norm": False}]
)
def test_generate_is_greedy_decoding(fields: dict[str, Any], attention: str) -> None:
    model = tiny_model(**fields, attn_implementation=attention)
    ids = random_ids(2, 9)
    assert torch.equal(model.generate(ids, **GREEDY), without_cache(model, ids))


def test_generate_caches_the_latent_row_only() -> None:
    model = tiny_model()
    output = model.generate(random_ids(2, 9), **GREEDY, return_dict_in_generate=True)
    cache = output.past_key_values
    assert type(cache) is LatentCache
    # the last token is not fed back
    tokens = 9 + NEW_TOKENS - 1
    assert cache.get_seq_length() == tokens
    assert cache.cached_bytes == 3 * 2 * tokens * (20 + 8) * 4
    for layer in cache.layers:
        assert isinstance(layer, LatentLayer)
        assert layer.rows.shape == (2, tokens, 28)
        assert layer.rows.data_ptr() == layer.keys.data_ptr(), (
            "keys are a view of the rows, not a second copy"
        )


def test_cache_in_bfloat16_is_half_as_large() -> None:
    model = tiny_model().to(torch.bfloat16)
    cache = model.generate(random_ids(1, 9), **GREEDY, return_dict_in_generate=True).past_key_values
    assert cache.cached_bytes == 3 * (9 + NEW_TOKENS - 1) * 28 * 2


def test_cache_grows_without_losing_rows() -> None:
    model = tiny_model()
    ids = random_ids(1, 700)
    cache = LatentCache(3)
    with torch.no_grad():
        for part in ids.split((250, 7, 1, 442), dim=1):
            logits = model(part, past_key_values=cache).logits
        assert_close(logits, model(ids).logits[:, -442:], "fp32_reordered", what="logits after growing")


def test_reserved_capacity_is_not_reallocated() -> None:
    cache = LatentCache(1, capacity_tokens=1000)
    addresses = set()
    for _ in range(10):
        cache.update(torch.zeros(1, 1, 100, 20), torch.zeros(1, 1, 100, 8), 0)
        addresses.add(cache.layers[0].rows.data_ptr())
    assert len(addresses) == 1 and cache.get_seq_length() == 1000


def test_left_padded_batch_equals_one_by_one() -> None:
    model = tiny_model()
    lengths = [3, 11, 7]
    prompts = [random_ids(1, length, seed=length) for length in lengths]
    batch = torch.cat([torch.nn.functional.pad(prompt, (11 - prompt.shape[1], 0)) for prompt in prompts])
    generated = model.generate(batch, attention_mask=(batch != 0).long(), **GREEDY)
    for row, prompt in zip(generated, prompts, strict=True):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
        assert row[-NEW_TOKENS:].tolist() == alone[0, -NEW_TOKENS:].tolist()


def test_beam_search_equals_beam_search_without_cache() -> None:
    model = tiny_model()
    ids = random_ids(2, 9)
    beams = {**GREEDY, "num_beams": 4, "num_return_sequences": 2}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, **beams, use_cache=False))


def test_sampling_several_sequences() -> None:
    model = tiny_model()
    torch.manual_seed(0)
    options = {**GREEDY, "do_sample": True, "num_return_sequences": 3}
    assert model.generate(random_ids(2, 9), **options).shape == (6, 9 + NEW_TOKENS)


def test_prompt_lookup_decoding_crops_the_cache() -> None:
    model = tiny_model()
    ids = random_ids(1, 6).repeat(1, 4)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY, prompt_lookup_num_tokens=4), expected)


def test_assisted_decoding_crops_the_cache() -> None:
    model, assistant = tiny_model(), tiny_model(seed=5, num_hidden_layers=1)
    ids = random_ids(1, 9)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY, assistant_model=assistant), expected)
    assert torch.equal(model.generate(ids, **GREEDY, assistant_model=model), expected)


@pytest.mark.parametrize(("argument", "left"), [(-3, 6), (4, 4), (0, 9), (20, 9), (-20, 0)])
def test_crop(argument: int, left: int) -> None:
    cache = LatentCache(1)
    rows = torch.randn(2, 1, 9, 28)
    cache.update(rows[..., :20], rows[..., 20:], 0)
    cache.crop(argument)
    assert cache.get_seq_length() == left
    assert_close(cache.layers[0].rows, rows[:, 0, :left], "exact", what="rows after crop")
    if argument < 0:
        # new rows overwrite the dropped ones
        keys, values = cache.update(rows[..., :2, :20], rows[..., :2, 20:], 0)
        assert_close(
            torch.cat((keys, values), -1)[:, 0, left:], rows[:, 0, :2], "exact", what="rows after crop"
        )


def test_batch_operations_of_the_cache() -> None:
    cache = LatentCache(1)
    rows = torch.randn(3, 5, 28)
    cache.update(rows[:, None, :, :20], rows[:, None, :, 20:], 0)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    assert_close(cache.layers[0].rows, rows[order], "exact", what="rows reordered")
    cache.batch_select_indices(torch.tensor([0, 1]))
    assert_close(cache.layers[0].rows, rows[[2, 0]], "exact", what="rows selected")
    cache.batch_repeat_interleave(2)
    expected = rows[[2, 2, 0, 0]]
    assert_close(cache.layers[0].rows, expected, "exact", what="rows repeated")
    cache.layers[0].offload()
    cache.layers[0].prefetch()
    new = torch.randn(4, 1, 1, 28)
    keys, values = cache.update(new[..., :20], new[..., 20:], 0)
    expected = torch.cat((expected, new[:, 0]), dim=1)
    assert_close(torch.cat((keys, values), -1)[:, 0], expected, "exact", what="rows after all of it")
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.update(new[..., :20], new[..., 20:], 0)[0].shape == (4, 1, 1, 20)


def test_cropping_a_cache_that_was_never_used() -> None:
    cache = LatentCache(2)
    cache.crop(-1)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.cached_bytes == 0


def test_continuing_with_a_given_cache() -> None:
    """A second call goes on where the first one stopped, as in a conversation."""
    model = tiny_model()
    ids = random_ids(1, 9)
    first = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    longer = torch.cat((first.sequences, random_ids(1, 5, seed=3)), dim=1)
    expected = without_cache(model, longer)
    second = model.generate(
        longer, **GREEDY, past_key_values=first.past_key_values, return_dict_in_generate=True
    )
    assert torch.equal(second.sequences, expected)
    assert second.past_key_values is first.past_key_values


@pytest.mark.parametrize("kind", ["latent", "dynamic", "dynamic-with-layers"])
def test_the_callers_own_cache_is_filled(kind: str) -> None:
    model = tiny_model()
    ids = random_ids(2, 9)
    cache = {"latent": LatentCache(3), "dynamic": DynamicCache()}.get(kind, DynamicCache(config=model.config))
    assert torch.equal(model.generate(ids, **GREEDY, past_key_values=cache), without_cache(model, ids))
    assert cache.get_seq_length() == 9 + NEW_TOKENS - 1
    # DynamicCache holds the same numbers: the latent as keys, the shared rotary key as values
    assert cache.layers[0].keys.shape == (2, 1, 20, 20) and cache.layers[0].values.shape == (2, 1, 20, 8)


def test_static_cache() -> None:
    model = tiny_model()
    ids = random_ids(2, 9)
    expected = without_cache(model, ids)
    assert torch.equal(model.generate(ids, **GREEDY, cache_implementation="static"), expected)
    cache = StaticCache(config=model.config, max_cache_len=40)
    assert torch.equal(model.generate(ids, **GREEDY, past_key_values=cache), expected)


def test_offloaded_and_dynamic_implementations() -> None:
    model = tiny_model()
    ids = random_ids(2, 9)
    expected = without_cache(model, ids)
    assert torch.equal(model.generate(ids, **GREEDY, cache_implementation="dynamic"), expected)
    assert torch.equal(model.generate(ids, **GREEDY, use_cache=False), expected)


def test_eager_attention_returns_the_weights_of_every_step() -> None:
    model = tiny_model(attn_implementation="eager")
    output = model.generate(random_ids(1, 9), **GREEDY, output_attentions=True, return_dict_in_generate=True)
    assert len(output.attentions) == NEW_TOKENS
    for step, layers in enumerate(output.attentions):
        assert len(layers) == 3
        for weights in layers:
            assert weights is not None, f"no weights at step {step}"
            assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), "fp32_peer", what="sum of weights")


def test_hidden_states_are_recorded() -> None:
    model = tiny_model()
    output = model(random_ids(1, 9), output_hidden_states=True)
    assert len(output.hidden_states) == 4


def test_chunked_prefill_in_generate() -> None:
    model = tiny_model()
    ids = random_ids(1, 50)
    assert torch.equal(model.generate(ids, **GREEDY, prefill_chunk_size=16), without_cache(model, ids))


def test_round_trip_through_a_folder_and_the_auto_classes(tmp_path: Path) -> None:
    model = tiny_model(q_lora_rank=12, rope_parameters=YARN, kv_latent_norm=False)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is ICConfig
    assert config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
    assert config.architectures == ["InfiniteContextForCausalLM"], "the name that vLLM knows"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is ICForCausalLM
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert_close(loaded(ids).logits, model(ids).logits, "exact", what="logits after loading")
        hidden = AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state
        assert_close(hidden, model.model(ids).last_hidden_state, "exact", what="hidden states after loading")


def test_bfloat16_runs_and_is_near() -> None:
    model = tiny_model(q_lora_rank=12)
    ids = random_ids(2, 33)
    with torch.no_grad():
        expected = model(ids).logits
        model = model.to(torch.bfloat16)
        logits = model(ids).logits
        cache = LatentCache(3)
        steps = [model(part, past_key_values=cache).logits for part in ids.split(11, dim=1)]
    assert logits.dtype == torch.bfloat16
    assert_close(logits, expected, "bf16_model", what="bfloat16 logits")
    assert_close(torch.cat(steps, 1), expected, "bf16_model", what="bfloat16 logits in chunks")


def test_one_of_ids_and_embeddings_is_needed() -> None:
    model = tiny_model()
    ids = random_ids(1, 4)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(ids, inputs_embeds=embeddings)
        assert_close(model(inputs_embeds=embeddings).logits, model(ids).logits, "exact", what="logits")
