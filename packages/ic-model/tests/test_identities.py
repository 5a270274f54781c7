"""The three identities: absorbed = expanded, prefill = step by step, paged = dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import YARN, random_ids, tiny_config, tiny_model

from ic_model import LatentCache
from ic_model.attention import ICAttention
from ic_model.ops.mla_decode import latent_attention, mla_decode
from ic_model.rope import rope_tables, softmax_scale
from ic_model.testing import assert_close

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "q-lora": {"q_lora_rank": 12},
    "yarn": {"rope_parameters": YARN},
    "no-latent-norms": {"q_lora_rank": 12, "kv_latent_norm": False, "q_latent_norm": False},
}


@pytest.mark.parametrize("tokens", [1, 2, 63, 300])
@pytest.mark.parametrize("variant", VARIANTS)
def test_absorbed_equals_expanded_at_every_position(variant: str, tokens: int) -> None:
    torch.manual_seed(0)
    config = tiny_config(**VARIANTS[variant])
    attention = tiny_model(**VARIANTS[variant]).model.layers[1].self_attn
    hidden = torch.randn(2, tokens, config.hidden_size)
    positions = torch.arange(tokens)[None] + 1000
    tables = rope_tables(config, positions)
    causal = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
    with torch.no_grad():
        q_nope, q_rope = attention._queries(hidden, tables)
        latent, k_rope = attention._latent_rows(hidden, tables)
        expanded, _ = attention._expanded(q_nope, q_rope, latent, k_rope, causal)
        absorbed = attention._absorbed(q_nope, q_rope, torch.cat((latent, k_rope), -1), causal)
    for position in range(tokens):
        assert_close(
            absorbed[:, position],
            expanded[:, position],
            "fp32_reordered",
            what=f"output at position {position}",
        )


def test_absorbed_and_expanded_have_equal_gradients() -> None:
    config = tiny_config()
    attention = tiny_model().model.layers[1].self_attn
    hidden = torch.randn(1, 17, config.hidden_size, generator=torch.Generator().manual_seed(3))
    tables = rope_tables(config, torch.arange(17)[None])
    causal = torch.ones(1, 1, 17, 17, dtype=torch.bool).tril()
    gradients = []
    for absorb in (False, True):
        attention.zero_grad()
        q_nope, q_rope = attention._queries(hidden, tables)
        latent, k_rope = attention._latent_rows(hidden, tables)
        if absorb:
            out = attention._absorbed(q_nope, q_rope, torch.cat((latent, k_rope), -1), causal)
        else:
            out, _ = attention._expanded(q_nope, q_rope, latent, k_rope, causal)
        attention.o_proj(out.flatten(2)).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in attention.named_parameters()})
    for name, expected in gradients[0].items():
        assert_close(gradients[1][name], expected, "fp32_gradient", what=name)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_equals_step_by_step(variant: str, attention: str) -> None:
    model = tiny_model(**VARIANTS[variant], attn_implementation=attention)
    ids = random_ids(2, 41)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache = LatentCache(model.config.num_hidden_layers)
        steps = [
            model(ids[:, index : index + 1], past_key_values=cache).logits for index in range(ids.shape[1])
        ]
    assert_close(torch.cat(steps, 1), expected, "fp32_reordered", what="logits, token by token")


@pytest.mark.parametrize("chunks", [(40, 1), (1, 40), (7, 2, 3, 29), (20, 21), (39, 2)])
def test_prefill_equals_chunks(chunks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    paths: list[str] = []
    for name in ("_absorbed", "_expanded"):
        method = getattr(ICAttention, name)

        def spy(self: Any, *args: Any, _method: Any = method, _name: str = name, **kwargs: Any) -> Any:
            paths.append(_name)
            return _method(self, *args, **kwargs)

        monkeypatch.setattr(ICAttention, name, spy)
    ids = random_ids(2, sum(chunks))
    cache = None
    parts = []
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        paths.clear()
        for chunk in ids.split(chunks, dim=1):
            output = model(chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    assert_close(torch.cat(parts, 1), expected, "fp32_reordered", what=f"logits in chunks {chunks}")
    # small chunks after the first absorb, large ones expand
    layers = model.config.num_hidden_layers
    assert paths[:layers] == ["_expanded"] * layers
    absorbed = [2 * 20 * new + new * 8 < 20 * 24 + new * 32 for new in chunks[1:]]
    assert [paths[layers * index] == "_absorbed" for index in range(1, len(chunks))] == absorbed


@pytest.mark.parametrize("page_tokens", [1, 16, 17])
@pytest.mark.parametrize("query_tokens", [1, 2, 5])
def test_paged_equals_dense(query_tokens: int, page_tokens: int) -> None:
    """Garbage wherever nothing may be read, and zero-length, one-page and odd-length sequences."""
    generator = torch.Generator().manual_seed(0)
    lengths = [0, query_tokens, 16 + query_tokens, 63, 129]
    rank, rope_dim, heads = 20, 8, 3
    max_pages = -(-max(lengths) // page_tokens) + 2
    pages = len(lengths) * max_pages + 3
    kv_cache = torch.full((pages, page_tokens, rank + rope_dim), torch.nan)
    block_table = torch.full((len(lengths), max_pages), 2_147_480_000, dtype=torch.int32)
    free = torch.randperm(pages, generator=generator).tolist()
    rows = []
    for index, length in enumerate(lengths):
        rows.append(torch.randn(length, rank + rope_dim, generator=generator))
        for page in range(-(-length // page_tokens)):
            block_table[index, page] = free.pop()
            part = rows[index][page * page_tokens : (page + 1) * page_tokens]
            kv_cache[block_table[index, page], : len(part)] = part
    q = torch.randn(len(lengths), query_tokens, heads, rank + rope_dim, generator=generator)
    out, lse = mla_decode(
        q,
        kv_cache,
        block_table=block_table,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        kv_lora_rank=rank,
        softmax_scale=0.3,
    )
    assert out.isfinite().all()
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    for index, length in enumerate(lengths[1:], start=1):
        expected, expected_lse = plain_attention(q[index], rows[index], rank=rank, scale=0.3)
        assert_close(out[index], expected, "fp32_reordered", what=f"output of a sequence of {length}")
        assert_close(
            lse[index], expected_lse, "fp32_reordered", what=f"log-sum-exp of a sequence of {length}"
        )


def plain_attention(
    q: torch.Tensor, rows: torch.Tensor, *, rank: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in float64 for one sequence: q `[T, N, C + R]`, rows `[S, C + R]`, causal at the end."""
    queries, tokens = q.shape[0], rows.shape[0]
    scores = torch.einsum("tnd,sd->tns", q.double(), rows.double()) * scale
    hidden = torch.arange(tokens) > torch.arange(tokens - queries, tokens)[:, None]
    scores = scores.masked_fill(hidden[:, None], -torch.inf)
    return torch.einsum("tns,sc->tnc", scores.softmax(-1), rows[:, :rank].double()), scores.logsumexp(-1)


def test_more_queries_than_tokens_see_nothing() -> None:
    """The first queries of a sequence that is shorter than the step lie before its start."""
    q = torch.randn(1, 3, 2, 6)
    rows = torch.randn(1, 4, 6)
    out, lse = mla_decode(
        q,
        rows,
        block_table=torch.zeros(1, 1, dtype=torch.int32),
        seq_lens=torch.tensor([2]),
        kv_lora_rank=4,
        softmax_scale=1.0,
    )
    assert (out[0, 0] == 0).all() and (lse[0, 0] == -torch.inf).all()
    expected, _ = plain_attention(q[0, 1:], rows[0, :2], rank=4, scale=1.0)
    assert_close(out[0, 1:], expected, "fp32_reordered", what="the queries that have a token")


@pytest.mark.parametrize("block_tokens", [1, 7, 64, 1000])
def test_block_size_does_not_change_the_result(block_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, rows = torch.randn(2, 3, 4, 28, generator=generator), torch.randn(2, 65, 28, generator=generator)
    # scores far apart, so that the running maximum has to work
    rows[:, 40] *= 30
    mask = torch.rand(2, 3, 65, generator=generator) > 0.4
    mask[0, 1] = False
    options: dict[str, Any] = {"kv_lora_rank": 20, "softmax_scale": 1.0, "mask": mask}
    out, lse = latent_attention(q, rows, **options, block_tokens=block_tokens)
    expected, expected_lse = latent_attention(q, rows, **options)
    assert (out[0, 1] == 0).all() and (lse[0, 1] == -torch.inf).all()
    assert_close(out, expected, "fp32_reordered", what=f"output in blocks of {block_tokens}")
    assert_close(lse, expected_lse, "fp32_reordered", what=f"log-sum-exp in blocks of {block_tokens}")


def test_wrong_row_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"q has rows of 28 and latent rows of 27"):
        latent_attention(torch.zeros(1, 1, 1, 28), torch.zeros(1, 1, 27), kv_lora_rank=20, softmax_scale=1.0)


def test_switched_off_latent_norm_is_gone() -> None:
    model = tiny_model(q_lora_rank=12, kv_latent_norm=False, q_latent_norm=False)
    assert not any("a_layernorm" in name for name, _ in model.named_parameters())
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(1, 5, model.config.hidden_size)
    latent, _ = attention._latent_rows(hidden, rope_tables(model.config, torch.arange(5)[None]))
    assert_close(
        latent, attention.kv_a_proj_with_mqa(hidden)[..., :20], "exact", what="latent without a norm"
    )
    assert attention.scaling == softmax_scale(model.config)
