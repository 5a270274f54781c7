"""What must leave the function unchanged does, on every architecture: merged heads, mixed heads, full rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from converted_models import SIZES, SOURCES, converted, source_folder, source_model, token_ids
from ic_model import ICForCausalLM, LatentCache
from ic_model.testing import compare
from transformers import AutoModelForCausalLM, AutoTokenizer

from ic_train.convert.algebra import Moments
from ic_train.convert.factor import factor_query
from ic_train.convert.latent import convert_attention, split_keys
from ic_train.convert.plans import RotaryPlanner
from ic_train.convert.rotary import RotaryStatistics, full_plan, mean_rotation
from ic_train.convert.source import open_source

# float32 with sums in another order, through three layers; the bound
RELATIVE = 1e-4
# float64 algebra
EXACT = 1e-9


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", SOURCES)
def test_a_conversion_that_keeps_everything_keeps_the_logits(name: str, tmp_path: Path) -> None:
    source = source_folder(tmp_path / "source", name)
    width = open_source(source).shape.key_width
    record = converted(source, tmp_path / "out", rank=width, rope=width)
    ids = token_ids(2, 120)
    expected, actual = logits_of(source, ids), logits_of(tmp_path / "out", ids)
    assert compare(actual, expected).relative_norm < RELATIVE
    assert record["perplexity"]["partial_rope"] == pytest.approx(record["perplexity"]["source"], rel=1e-5)
    assert record["kv_saved_vs_source"] == 0


@pytest.mark.parametrize("name", ["llama, grouped", "qwen2"])
def test_full_query_rank_keeps_the_logits(name: str, tmp_path: Path) -> None:
    source = source_folder(tmp_path / "source", name)
    converted(source, tmp_path / "out", rank=32, rope=32, q_lora_rank=48)
    ids = token_ids(2, 60)
    assert compare(logits_of(tmp_path / "out", ids), logits_of(source, ids)).relative_norm < RELATIVE


@pytest.mark.parametrize("name", ["llama, grouped", "qwen2"])
def test_decoding_step_by_step_equals_reading_at_once(name: str, tmp_path: Path) -> None:
    """Biases and explicit angles through the latent cache and the absorbed path."""
    converted(source_folder(tmp_path / "source", name), tmp_path / "out", rank=24, rope=12)
    model = ICForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert model.config.rope_parameters["rope_type"] == "explicit"
    assert (model.model.layers[0].self_attn.o_proj.bias is not None) == (name == "qwen2")
    ids = token_ids(1, 40)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache = LatentCache(3)
        steps = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(40)]
    assert compare(torch.cat(steps, 1), expected).relative_norm < 1e-5


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory):
    """One biased layer of the real size relations, random moments, and its source."""
    source = open_source(source_folder(tmp_path_factory.mktemp("layer") / "source", "qwen2"))
    x = torch.randn(300, 48, generator=torch.Generator().manual_seed(5)).double() + 0.3
    augmented = torch.cat((x, torch.ones(300, 1)), 1)
    return source, source.layer(1).attention, Moments(second=augmented.T @ augmented / 300), augmented


def scores_of(split, frequencies: torch.Tensor, augmented: torch.Tensor) -> torch.Tensor:
    """`[N, T, T]` scores of all heads, rotated by position, from split keys and queries."""
    positions = torch.arange(len(augmented), dtype=torch.float64)
    turn = torch.polar(
        torch.ones(len(positions), len(frequencies)).double(), positions[:, None] * frequencies
    )
    keys = (augmented.to(turn) @ split.rotary_key.T) * turn
    queries = torch.einsum("tx,hmx->htm", augmented.to(turn), split.rotary_query) * turn
    rotary = torch.einsum("htm,sm->hts", queries.conj(), keys).real
    plain_keys = torch.einsum("tx,gdx->gtd", augmented, split.plain_key).repeat_interleave(2, 0)
    plain_queries = torch.einsum("tx,hdx->htd", augmented, split.plain_query)
    return rotary + plain_queries @ plain_keys.transpose(1, 2)


def source_scores(attention, frequencies: torch.Tensor, augmented: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(len(augmented), dtype=torch.float64)
    turn = torch.polar(
        torch.ones(len(positions), len(frequencies)).double(), positions[:, None] * frequencies
    )
    keys = torch.einsum("tx,gfx->gtf", augmented.to(turn), attention.complex_keys()) * turn
    queries = torch.einsum("tx,ghfx->ghtf", augmented.to(turn), attention.complex_queries()) * turn
    return torch.einsum("ghtf,gsf->ghts", queries.conj(), keys).real.flatten(0, 1)


def test_mixing_heads_commutes_with_rope(layer) -> None:
    source, attention, moments, augmented = layer
    frequencies = source.frequencies.double()
    plan = full_plan(source.frequencies, 2)
    split = split_keys(attention, moments.damped(), plan, source.frequencies)
    assert float(split.plain_key.abs().max()) < EXACT
    expected = source_scores(attention, frequencies, augmented)
    # heads were really mixed: the components are not the source's keys
    assert compare(split.rotary_key.abs(), attention.complex_keys().flatten(0, 1).abs()).relative_norm > 0.1
    actual = scores_of(split, torch.tensor(plan.frequencies).double(), augmented)
    assert compare(actual, expected).relative_norm < EXACT


def test_cutting_rope_is_exact_where_positions_are_equal(layer) -> None:
    """At distance 0 no rotation is left, so whatever was taken out of RoPE must still be there."""
    source, attention, moments, augmented = layer
    planner = RotaryPlanner(source.frequencies, 2)
    planner.add_layer(RotaryStatistics(attention, moments.damped()))
    for plan in planner.candidates(8, standard=False):
        cut = split_keys(attention, moments.damped(), plan, source.frequencies)
        assert len(plan.frequencies) == 4 and cut.rotary_key.shape == (4, 49)
        turn = mean_rotation(source.frequencies, plan.distance_tokens).conj()[:, None]
        # undo the mean rotation, which stands in for distances that are not 0
        plain = torch.complex(*cut.plain_query.chunk(2, 1)) / turn
        restored = type(cut)(
            rotary_key=cut.rotary_key,
            rotary_query=cut.rotary_query,
            plain_key=cut.plain_key,
            plain_query=torch.cat((plain.real, plain.imag), 1),
        )
        still = torch.zeros(4, dtype=torch.float64)
        expected = source_scores(attention, torch.zeros(8, dtype=torch.float64), augmented)
        assert compare(scores_of(restored, still, augmented), expected).relative_norm < EXACT


@pytest.mark.parametrize("biased", [False, True])
def test_components_of_keys_and_values_are_exact_at_full_rank(layer, biased: bool) -> None:
    source, attention, moments, _ = layer
    planner = RotaryPlanner(source.frequencies, 2)
    planner.add_layer(RotaryStatistics(attention, moments.damped()))
    plan = planner.candidates(8, standard=False)[0]
    split = split_keys(attention, moments.damped(), plan, source.frequencies)
    for rank, bound in ((2 * 32 - 8, EXACT), (40, None)):
        result = convert_attention(attention, moments, plan, source.frequencies, rank=rank, biased=biased)
        # around the mean, a constant has no variance: where the width has fewer dimensions than keys and values
        # together, it is left to the softmax and to the output's bias (the next test)
        columns = slice(None, -1) if biased else slice(None)
        rebuilt = torch.einsum("hpc,cx->hpx", result.up, result.down[:rank])[..., columns]
        keys, values = rebuilt.chunk(2, dim=1)
        error = compare(values, attention.value.repeat_interleave(2, 0)[..., columns]).relative_norm
        if bound:
            assert error < bound
            assert compare(keys, split.plain_key.repeat_interleave(2, 0)[..., columns]).relative_norm < bound
            assert result.energy_kept == pytest.approx(1)
        else:
            assert error > 1e-3 and result.energy_kept < 1


def test_a_biased_layer_makes_up_for_the_values_mean(layer) -> None:
    source, attention, moments, augmented = layer
    plan = full_plan(source.frequencies, 2)
    result = convert_attention(attention, moments, plan, source.frequencies, rank=8, biased=True)
    mean = augmented.mean(0)
    values = torch.einsum("hpc,cx,x->hp", result.up, result.down[:8], mean)[:, 16:]
    actual = torch.einsum("dnv,nv->d", attention.output, values) + result.output_bias
    expected = torch.einsum("dnv,nv->d", attention.output, (attention.value @ mean).repeat_interleave(2, 0))
    assert compare(actual, expected).relative_norm < EXACT


def test_query_factors_are_exact_at_full_rank_and_not_below(layer) -> None:
    _, attention, moments, _ = layer
    matrix = attention.query.flatten(0, 1)
    for biased in (False, True):
        full = factor_query(attention.query, moments.damped(), 48, biased).product()
        assert compare(full, matrix).relative_norm < EXACT
        assert (
            compare(factor_query(attention.query, moments, 20, biased).product(), matrix).relative_norm > 1e-2
        )


def test_tokenizer_template_and_configuration_come_along(tmp_path: Path) -> None:
    source = source_folder(tmp_path / "source", "llama, multi-head, tied")
    converted(source, tmp_path / "out", rank=40, rope=16)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"content": "hé"}], tokenize=False) == "hé"
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    source_config = source_model("llama, multi-head, tied").config
    for field in ("vocab_size", "hidden_size", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
        assert getattr(config, field) == getattr(source_config, field), field
    assert (config.kv_lora_rank, config.qk_rope_head_dim, config.kv_latent_norm) == (40, 16, False)
    assert SIZES.evaluation_tokens <= config.max_position_embeddings == 512
