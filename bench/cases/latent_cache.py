"""Norm, rotation and the write into the paged latent cache in one, for prefill's and decode's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from bench.cases.common import OpBench, Prepared, Work, named
from bench.cases.mla_decode import DTYPES, FP8_SCALE, PAGE_TOKENS, ROPE_DIM
from bench.timing import input_sets

EPSILON = 1e-6
# so many tokens at most come one from each sequence, and so lie in different pages
MAX_DECODED_TOKENS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentCase:
    """So many new tokens with latent rows of so many numbers."""

    row_dim: int
    tokens: int
    kv_dtype: str = "bfloat16"

    @property
    def label(self) -> str:
        """Short text for progress and messages."""
        return f"row {self.row_dim} {self.tokens} tokens {self.kv_dtype}"

    def row(self) -> dict[str, Any]:
        """The fields that identify it in a result."""
        return {
            "direction": "forward",
            "row_dim": self.row_dim,
            "heads": 1,
            "batch": 1,
            "context_tokens": self.tokens,
            "query_tokens": self.tokens,
            "kv_dtype": self.kv_dtype,
            "page_tokens": PAGE_TOKENS,
        }

    def work(self) -> Work:
        """Latent and key in, cosines, sines and the slot in, the row out."""
        rank = self.row_dim - ROPE_DIM
        per_token = self.row_dim * (2 + DTYPES[self.kv_dtype].itemsize) + 4 * ROPE_DIM + 8
        return Work(
            bytes=self.tokens * per_token + 2 * rank,
            flop=self.tokens * (4 * rank + 3 * ROPE_DIM),
            traffic="copy",
        )


@dataclass(kw_only=True)
class LatentProblem:
    """A case's inputs, several sets of them; `slots[i]` are the rows of the cache that set i writes."""

    case: LatentCase
    latent: list[torch.Tensor]
    k_rope: list[torch.Tensor]
    cos: torch.Tensor
    sin: torch.Tensor
    slots: list[torch.Tensor]
    norm_weight: torch.Tensor
    pages: int
    kv_scale: float
    work: Work = field(init=False)

    def __post_init__(self) -> None:
        """The work of the case."""
        self.work = self.case.work()

    @property
    def sets(self) -> int:
        """Number of input sets."""
        return len(self.latent)

    @property
    def kv_lora_rank(self) -> int:
        """C, numbers of a row that are the normed latent."""
        return self.case.row_dim - ROPE_DIM

    def empty_cache(self) -> torch.Tensor:
        """A cache full of NaN, one per implementation: nobody profits from what another wrote."""
        shape = (self.pages, PAGE_TOKENS, self.case.row_dim)
        cache = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=self.cos.device)
        return cache.to(DTYPES[self.case.kv_dtype])

    def written(self, cache: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """What the first set wrote, in the cache's own unit."""
        return {"rows": cache.flatten(0, 1)[self.slots[0]].float()}

    def call(self, function: Any, cache: torch.Tensor, index: int, **more: Any) -> None:
        """Run a function with the op's signature on an input set."""
        scaled = {"kv_scale": self.kv_scale} if self.kv_scale != 1.0 else {}
        function(
            self.latent[index],
            self.k_rope[index],
            norm_weight=self.norm_weight,
            epsilon=EPSILON,
            cos=self.cos,
            sin=self.sin,
            kv_cache=cache,
            slot_mapping=self.slots[index],
            **scaled,
            **more,
        )

    def prepared(self, function: Any, **more: Any) -> Prepared:
        """A function with the op's signature, ready to be timed."""
        cache = self.empty_cache()

        def launch(index: int) -> None:
            with torch.no_grad():
                self.call(function, cache, index, **more)

        return Prepared(
            launches=[partial(launch, index) for index in range(self.sets)],
            outputs=lambda returned: self.written(cache),
            bound="fp8_store" if self.case.kv_dtype == "fp8_e4m3" else "bfloat16",
        )

    def ours(self, implementation: str) -> Prepared:
        """The op of ic-model."""
        from ic_model.ops.latent_cache import latent_cache

        return self.prepared(latent_cache, implementation=named(implementation))

    def expected(self) -> Mapping[str, torch.Tensor]:
        """The reference on the first set: float32 arithmetic, rounded once, to the cache's dtype."""
        from ic_model.ops.latent_cache.reference import latent_cache

        cache = self.empty_cache()
        self.call(latent_cache, cache, 0)
        return self.written(cache)

    def checked_part(self, name: str, output: torch.Tensor) -> torch.Tensor:
        """All of it."""
        del name
        return output


def build(case: LatentCase, device: torch.device, *, seed: int = 0, small: bool = False) -> LatentProblem:
    """Make a case's inputs.

    Args:
        case: the shape.
        device: where.
        seed: of numbers and slots.
        small: one input set.
    """
    generator = torch.Generator(device).manual_seed(seed)
    sets = 1 if small else input_sets(case.work().bytes, device)
    decoded = case.tokens <= MAX_DECODED_TOKENS
    # a decoded token is the next of its sequence, somewhere in a page of its own; a prompt fills page after page
    pages_per_set = case.tokens if decoded else -(-case.tokens // PAGE_TOKENS)
    pages = torch.randperm(sets * pages_per_set, device=device, generator=generator)
    places = torch.arange(case.tokens, device=device)
    slots = []
    for index in range(sets):
        mine = pages[index * pages_per_set : (index + 1) * pages_per_set]
        slots.append(
            mine * PAGE_TOKENS + places * 7 % PAGE_TOKENS
            if decoded
            else mine[places // PAGE_TOKENS] * PAGE_TOKENS + places % PAGE_TOKENS
        )
    rank = case.row_dim - ROPE_DIM

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator, dtype=torch.bfloat16)

    angles = torch.rand(case.tokens, ROPE_DIM // 2, device=device, generator=generator) * 6.28
    return LatentProblem(
        case=case,
        latent=[numbers(case.tokens, rank) for _ in range(sets)],
        k_rope=[numbers(case.tokens, ROPE_DIM) for _ in range(sets)],
        cos=angles.cos(),
        sin=angles.sin(),
        slots=slots,
        norm_weight=numbers(rank),
        pages=sets * pages_per_set,
        kv_scale=FP8_SCALE if case.kv_dtype == "fp8_e4m3" else 1.0,
    )


def _full() -> Iterator[LatentCase]:
    for tokens in (8192, 32, 131_072, 1, 256, 2048):
        for row_dim in (576, 320):
            for kv_dtype in ("bfloat16", "fp8_e4m3"):
                yield LatentCase(row_dim=row_dim, tokens=tokens, kv_dtype=kv_dtype)


BENCH = OpBench(
    op="latent_cache",
    cases=tuple(_full()),
    quick=tuple(_full())[:4],
    toy=(LatentCase(row_dim=320, tokens=5), LatentCase(row_dim=320, tokens=300)),
    build=build,
)
