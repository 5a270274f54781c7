"""RMS norm over rows of the model's width and of the latent, forward and backward. Memory-bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.cases.common import OpBench, Prepared, Work, named
from bench.timing import input_sets

EPSILON = 1e-6

# takes x, weight and the residual or None; returns the normed rows, or those and the new residual
Norm = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class NormCase:
    """So many rows of so many numbers; with `residual`, x is added to it first, and the sum is returned too."""

    row_dim: int
    tokens: int
    direction: str = "forward"
    residual: bool = False

    @property
    def label(self) -> str:
        """Short text for progress and messages."""
        return f"{self.direction} {self.tokens}x{self.row_dim}{' with residual' if self.residual else ''}"

    def row(self) -> dict[str, Any]:
        """The fields that identify it in a result."""
        return {
            "direction": self.direction,
            "residual": self.residual,
            "row_dim": self.row_dim,
            "heads": 1,
            "batch": 1,
            "context_tokens": self.tokens,
            "query_tokens": self.tokens,
            "dtype": "bfloat16",
            "kv_dtype": None,
        }

    def work(self) -> Work:
        """Forward x in, y out; backward x and dy in, dx out; the residual in and out; the weight."""
        rows = (2 if self.direction == "forward" else 3) + (2 if self.residual else 0)
        weights = 1 if self.direction == "forward" else 2
        return Work(
            bytes=2 * self.row_dim * (rows * self.tokens + weights),
            flop=self.tokens * self.row_dim * (4 if self.direction == "forward" else 8),
            traffic="copy",
        )


@dataclass(kw_only=True)
class NormProblem:
    """A case's inputs, several sets of them."""

    case: NormCase
    x: list[torch.Tensor]
    residual: list[torch.Tensor | None]
    grad_out: list[torch.Tensor]
    weight: torch.Tensor
    work: Work = field(init=False)

    def __post_init__(self) -> None:
        """The work of the case."""
        self.work = self.case.work()

    @property
    def sets(self) -> int:
        """Number of input sets."""
        return len(self.x)

    def prepared(self, norm: Norm) -> Prepared:
        """A norm function, ready to be timed in the case's direction."""
        if self.case.direction == "backward":
            return self._backward(norm)

        def launch(index: int) -> Any:
            with torch.no_grad():
                return norm(self.x[index], self.weight, self.residual[index])

        return Prepared(
            launches=[lambda index=index: launch(index) for index in range(self.sets)],
            outputs=self.forward_outputs,
        )

    def _backward(self, norm: Norm) -> Prepared:
        weight = self.weight.detach().requires_grad_()
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in self.x]
            outs = [norm(x, weight, None) for x in leaves]

        def launch(index: int) -> Any:
            return torch.autograd.grad(
                outs[index], (leaves[index], weight), self.grad_out[index], retain_graph=True
            )

        return Prepared(
            launches=[lambda index=index: launch(index) for index in range(self.sets)],
            outputs=lambda returned: {"dx": returned[0], "dweight": returned[1]},
            bound="bfloat16_gradient",
        )

    def forward_outputs(self, returned: Any) -> Mapping[str, torch.Tensor]:
        """The outputs by name."""
        if self.case.residual:
            return {"out": returned[0], "residual": returned[1]}
        return {"out": returned}

    def ours(self, implementation: str) -> Prepared:
        """The op of ic-model."""
        from ic_model.ops.rms_norm import rms_norm

        return self.prepared(
            lambda x, weight, residual: rms_norm(
                x, weight, epsilon=EPSILON, residual=residual, implementation=named(implementation)
            )
        )

    def expected(self) -> Mapping[str, torch.Tensor]:
        """The reference on the first set, from inputs in float32."""
        from ic_model.ops.rms_norm.reference import rms_norm

        x, weight = self.x[0].float(), self.weight.float()
        residual = self.residual[0]
        if self.case.direction == "forward":
            added = None if residual is None else residual.float()
            return self.forward_outputs(rms_norm(x, weight, epsilon=EPSILON, residual=added))
        with torch.enable_grad():
            leaves = (x.requires_grad_(), weight.requires_grad_())
            grads = torch.autograd.grad(rms_norm(*leaves, epsilon=EPSILON), leaves, self.grad_out[0].float())
        return {"dx": grads[0], "dweight": grads[1]}

    def checked_part(self, name: str, output: torch.Tensor) -> torch.Tensor:
        """All of it."""
        del name
        return output


def build(case: NormCase, device: torch.device, *, seed: int = 0, small: bool = False) -> NormProblem:
    """Make a case's inputs.

    Args:
        case: the shape.
        device: where.
        seed: of the numbers.
        small: one input set.
    """
    generator = torch.Generator(device).manual_seed(seed)
    sets = 1 if small else input_sets(case.work().bytes, device)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator, dtype=torch.bfloat16)

    rows = (case.tokens, case.row_dim)
    return NormProblem(
        case=case,
        x=[numbers(*rows) for _ in range(sets)],
        residual=[numbers(*rows) if case.residual else None for _ in range(sets)],
        grad_out=[numbers(*rows) for _ in range(sets)] if case.direction == "backward" else [],
        weight=numbers(case.row_dim),
    )


def _full() -> Iterator[NormCase]:
    for tokens in (8192, 131_072, 128, 1, 1024, 16):
        for row_dim in (2048, 512):
            for direction in ("forward", "backward"):
                yield NormCase(row_dim=row_dim, tokens=tokens, direction=direction)
        yield NormCase(row_dim=2048, tokens=tokens, residual=True)


BENCH = OpBench(
    op="rms_norm",
    cases=tuple(_full()),
    quick=tuple(_full())[:5],
    toy=(
        NormCase(row_dim=96, tokens=5),
        NormCase(row_dim=96, tokens=5, residual=True),
        NormCase(row_dim=96, tokens=5, direction="backward"),
    ),
    build=build,
)
