"""Rotary embedding of the queries' rotary part. Memory-bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.cases.common import OpBench, Prepared, Work, named
from bench.timing import input_sets

ROPE_DIM = 64

# takes x `[tokens, N, 64]`, cos and sin `[tokens, 32]`; returns the rotated x
Rope = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeCase:
    """So many tokens with so many heads of 64 numbers."""

    heads: int
    tokens: int

    @property
    def label(self) -> str:
        """Short text for progress and messages."""
        return f"h{self.heads} {self.tokens}x{ROPE_DIM}"

    def row(self) -> dict[str, Any]:
        """The fields that identify it in a result."""
        return {
            "direction": "forward",
            "row_dim": ROPE_DIM,
            "heads": self.heads,
            "batch": 1,
            "context_tokens": self.tokens,
            "query_tokens": self.tokens,
            "dtype": "bfloat16",
            "kv_dtype": None,
        }

    def work(self) -> Work:
        """X in and out, the angles' cosines and sines in float32; four products and two sums per pair."""
        numbers = self.tokens * self.heads * ROPE_DIM
        return Work(bytes=4 * numbers + 4 * self.tokens * ROPE_DIM, flop=3 * numbers, traffic="copy")


@dataclass(kw_only=True)
class RopeProblem:
    """A case's inputs, several sets of them."""

    case: RopeCase
    x: list[torch.Tensor]
    cos: list[torch.Tensor]
    sin: list[torch.Tensor]
    work: Work = field(init=False)

    def __post_init__(self) -> None:
        """The work of the case."""
        self.work = self.case.work()

    @property
    def sets(self) -> int:
        """Number of input sets."""
        return len(self.x)

    def prepared(self, rope: Rope) -> Prepared:
        """A rotation, ready to be timed."""

        def launch(index: int) -> torch.Tensor:
            with torch.no_grad():
                return rope(self.x[index], self.cos[index], self.sin[index])

        return Prepared(
            launches=[lambda index=index: launch(index) for index in range(self.sets)],
            outputs=lambda returned: {"out": returned},
        )

    def ours(self, implementation: str) -> Prepared:
        """The op of ic-model."""
        from ic_model.ops.rope import rope

        return self.prepared(lambda x, cos, sin: rope(x, cos, sin, implementation=named(implementation)))

    def expected(self) -> Mapping[str, torch.Tensor]:
        """The reference on the first set, from x in float32."""
        from ic_model.ops.rope.reference import rope

        return {"out": rope(self.x[0].float(), self.cos[0], self.sin[0])}

    def checked_part(self, name: str, output: torch.Tensor) -> torch.Tensor:
        """All of it."""
        del name
        return output


def build(case: RopeCase, device: torch.device, *, seed: int = 0, small: bool = False) -> RopeProblem:
    """Make a case's inputs.

    Args:
        case: the shape.
        device: where.
        seed: of the numbers.
        small: one input set.
    """
    generator = torch.Generator(device).manual_seed(seed)
    sets = 1 if small else input_sets(case.work().bytes, device)
    shape = (case.tokens, case.heads, ROPE_DIM)
    angles = [
        torch.rand(case.tokens, ROPE_DIM // 2, device=device, generator=generator) * 6.28 for _ in range(sets)
    ]
    return RopeProblem(
        case=case,
        x=[torch.randn(shape, device=device, generator=generator, dtype=torch.bfloat16) for _ in range(sets)],
        cos=[angle.cos() for angle in angles],
        sin=[angle.sin() for angle in angles],
    )


def _full() -> Iterator[RopeCase]:
    for tokens in (8192, 131_072, 128, 1, 1024, 16):
        for heads in (32, 16):
            yield RopeCase(heads=heads, tokens=tokens)


BENCH = OpBench(
    op="rope",
    cases=tuple(_full()),
    quick=tuple(_full())[:3],
    toy=(RopeCase(heads=3, tokens=5),),
    build=build,
)
