"""The CPU attention against plain attention, with poison in all memory that must not be read."""

import pytest
import torch

from ic_vllm_plugin import latent_attention
from ic_vllm_plugin.latent_attention import (
    PagedRequest,
    absorbed_attention,
    expanded_attention,
    unordered_rows,
    write_latents,
)

# (query tokens, cached tokens): odd lengths, page edges, context and none
REQUESTS = [(1, 1), (1, 300), (5, 5), (7, 333), (33, 777), (50, 50), (16, 32), (1, 64)]
SCALE = 0.1
BLOCK = 16
# float32 accumulates a few hundred terms; bfloat16 keeps 8 bits of keys, values and probabilities
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-3}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    # several pieces, splits and query parts even at these lengths
    monkeypatch.setattr(latent_attention, "QUERY_TOKENS", 20)
    monkeypatch.setattr(latent_attention, "PIECE_BYTES", 1 << 18)
    monkeypatch.setattr(latent_attention, "MIN_SPLIT_ROWS", 7)


class Case:
    """A random batch in a paged cache full of NaN, and what plain attention makes of it."""

    def __init__(
        self, latent: int, rope: int, nope: int, value: int, heads: int, dtype: torch.dtype, shuffled: bool
    ):
        torch.manual_seed(0)
        self.latent, self.nope, self.value = latent, nope, value
        pages_needed = sum(-(-cached // BLOCK) for _, cached in REQUESTS)
        self.cache = torch.full((pages_needed + 9, BLOCK, latent + rope), float("nan"), dtype=dtype)
        order = torch.randperm(pages_needed + 9) if shuffled else torch.arange(pages_needed + 9)
        self.key_weight = torch.randn(heads, nope, latent) / latent**0.5
        self.value_weight = torch.randn(heads, value, latent) / latent**0.5
        self.requests, queries, expected = [], [], []
        tokens = first_page = 0
        for query_tokens, cached in REQUESTS:
            pages = order[first_page : first_page + -(-cached // BLOCK)]
            first_page += len(pages)
            rows = torch.randn(cached, latent + rope).to(dtype)
            slots = pages.repeat_interleave(BLOCK)[:cached] * BLOCK + torch.arange(cached) % BLOCK
            write_latents(self.cache, rows[:, :latent], rows[:, latent:], slots)
            query = torch.randn(query_tokens, heads, nope + rope).to(dtype)
            self.requests.append(PagedRequest(slice(tokens, tokens + query_tokens), cached, pages))
            tokens += query_tokens
            queries.append(query)
            expected.append(self.plain(query.float(), rows.float()))
        self.query, self.expected = torch.cat(queries), torch.cat(expected)

    def expand(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents, rope_keys = rows[:, : self.latent], rows[:, None, self.latent :]
        keys = torch.einsum("sc,npc->snp", latents, self.key_weight.to(rows.dtype))
        keys = torch.cat((keys, rope_keys.expand(-1, keys.shape[1], -1)), dim=-1)
        return keys, torch.einsum("sc,nvc->snv", latents, self.value_weight.to(rows.dtype))

    def plain(self, query: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        keys, values = self.expand(rows)
        scores = torch.einsum("tnd,snd->nts", query, keys) * SCALE
        position = torch.arange(len(query)) + len(rows) - len(query)
        scores.masked_fill_(torch.arange(len(rows)) > position[:, None], float("-inf"))
        return torch.einsum("nts,snv->tnv", scores.softmax(-1), values)

    def absorbed(self) -> torch.Tensor:
        dtype = self.query.dtype
        nope = torch.einsum("tnp,npc->tnc", self.query[..., : self.nope], self.key_weight.to(dtype))
        query = torch.cat((nope, self.query[..., self.nope :]), dim=-1)
        output = absorbed_attention(query, self.cache, self.requests, scale=SCALE, latent_rank=self.latent)
        return torch.einsum("tnc,nvc->tnv", output.float(), self.value_weight)

    def expanded(self) -> torch.Tensor:
        return expanded_attention(
            self.query, self.cache, self.requests, self.expand, scale=SCALE, value_dim=self.value
        ).float()


@pytest.mark.parametrize("shuffled", (False, True), ids=("neighbouring pages", "scattered pages"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "dims",
    [(256, 64, 128, 128, 4), (512, 64, 128, 128, 2), (96, 32, 40, 72, 3), (64, 32, 32, 128, 1)],
    ids=("row 320", "row 576", "odd dimensions", "values wider than keys"),
)
def test_both_forms_equal_plain_attention(dims, dtype, shuffled):
    case = Case(*dims, dtype, shuffled)
    for output in (case.absorbed(), case.expanded()):
        assert not output.isnan().any()
        error = (output - case.expected).norm() / case.expected.norm()
        assert error < TOLERANCE[dtype]
        worst = (output - case.expected).abs().max()
        assert worst < 20 * TOLERANCE[dtype]


def test_neighbouring_pages_are_read_in_place_even_in_reverse():
    cache = torch.zeros(40, BLOCK, 8)
    pages = torch.arange(39, -1, -1)
    pieces = list(unordered_rows(cache, PagedRequest(slice(0, 1), 640, pages), 640, piece_tokens=10_000))
    assert [piece.data_ptr() for piece in pieces] == [cache.data_ptr()]


def test_padding_slots_are_not_written():
    cache = torch.full((2, BLOCK, 6), -1.0)
    write_latents(cache, torch.ones(3, 4), torch.ones(3, 2), torch.tensor([5, -1, 17]))
    written = (cache == 1).all(-1).nonzero().tolist()
    assert written == [[0, 5], [1, 1]]
    assert (cache == 1).sum() == 12
