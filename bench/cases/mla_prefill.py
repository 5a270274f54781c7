"""Prefill and training: causal attention with query and key rows of 192 and value rows of 128. Compute-bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.cases.common import OpBench, Prepared, Work, named

QK_DIM = 192
V_DIM = 128
SOFTMAX_SCALE = QK_DIM**-0.5

# the reference may hold a few matrices of scores of this size in float32
MAX_REFERENCE_BYTES = 2**33

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillCase:
    """A batch of sequences of one length, forward or backward."""

    heads: int
    batch: int
    context_tokens: int
    direction: str = "forward"

    @property
    def label(self) -> str:
        """Short text for progress and messages."""
        return f"{self.direction} h{self.heads} {self.batch}x{self.context_tokens}"

    def row(self) -> dict[str, Any]:
        """The fields that identify it in a result."""
        return {
            "direction": self.direction,
            "heads": self.heads,
            "batch": self.batch,
            "context_tokens": self.context_tokens,
            "query_tokens": self.context_tokens,
            "qk_dim": QK_DIM,
            "v_dim": V_DIM,
            "dtype": "bfloat16",
        }

    def work(self) -> Work:
        """Products over the pairs of query and key that the causal mask leaves.

        Forward: Q K^T and P V. Backward: Q K^T again, dO V^T, P^T dO, dS K and dS^T Q.
        """
        tokens = self.batch * self.context_tokens
        pairs = self.batch * self.heads * self.context_tokens * (self.context_tokens + 1) // 2
        forward = self.direction == "forward"
        widths = QK_DIM + V_DIM if forward else 3 * QK_DIM + 2 * V_DIM
        inputs, outputs = 2 * QK_DIM + V_DIM, V_DIM
        # backward reads q, k, v, out, dO and writes dq, dk, dv; the log-sum-exp is float32
        numbers = inputs + outputs if forward else 2 * inputs + 2 * outputs
        return Work(bytes=tokens * self.heads * (2 * numbers + 4), flop=2 * pairs * widths, traffic="copy")


@dataclass(kw_only=True)
class PrefillProblem:
    """Inputs of a case: `[tokens, N, 192 or 128]`, sequences one after the other."""

    case: PrefillCase
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad_out: torch.Tensor
    cu_seqlens: torch.Tensor
    softmax_scale: float = SOFTMAX_SCALE
    sets: int = 1
    work: Work = field(init=False)

    def __post_init__(self) -> None:
        """The work of the case."""
        self.work = self.case.work()

    def prepared(self, attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]) -> Prepared:
        """An attention function, ready to be timed in the case's direction.

        Args:
            attention: takes q, k and v and returns `[tokens, N, 128]`, the log-sum-exp left out.
        """
        inputs = (self.q, self.k, self.v)
        if self.case.direction == "forward":

            def forward() -> torch.Tensor:
                with torch.no_grad():
                    return attention(*inputs)

            return Prepared(launches=[forward], outputs=lambda returned: {"out": returned})
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            out = attention(*leaves)

        def backward() -> Tensors:
            return torch.autograd.grad(out, leaves, self.grad_out, retain_graph=True)

        return Prepared(
            launches=[backward],
            outputs=lambda returned: dict(zip(("dq", "dk", "dv"), returned, strict=True)),
            bound="bfloat16_gradient",
        )

    def ours(self, implementation: str) -> Prepared:
        """The op of ic-model."""
        from ic_model.ops.mla_prefill import mla_prefill

        return self.prepared(
            lambda q, k, v: mla_prefill(
                q,
                k,
                v,
                cu_seqlens_q=self.cu_seqlens,
                cu_seqlens_k=self.cu_seqlens,
                max_seqlen_q=self.case.context_tokens,
                max_seqlen_k=self.case.context_tokens,
                softmax_scale=self.softmax_scale,
                causal=True,
                implementation=named(implementation),
            )
        )

    def expected(self) -> Mapping[str, torch.Tensor]:
        """The reference on as many heads as its memory allows, from inputs in float32."""
        from ic_model.ops.mla_prefill.reference import mla_prefill

        heads = self._checked_heads()
        leaves = [tensor[:, heads].float().requires_grad_() for tensor in (self.q, self.k, self.v)]
        with torch.set_grad_enabled(self.case.direction == "backward"):
            out = mla_prefill(
                *leaves,
                cu_seqlens_q=self.cu_seqlens,
                cu_seqlens_k=self.cu_seqlens,
                max_seqlen_q=self.case.context_tokens,
                max_seqlen_k=self.case.context_tokens,
                softmax_scale=self.softmax_scale,
                causal=True,
            )
        assert isinstance(out, torch.Tensor), "the log-sum-exp was not asked for"
        if self.case.direction == "forward":
            return {"out": out}
        grads = torch.autograd.grad(out, leaves, self.grad_out[:, heads].float())
        return dict(zip(("dq", "dk", "dv"), grads, strict=True))

    def checked_part(self, name: str, output: torch.Tensor) -> torch.Tensor:
        """The heads that `expected` has: heads are independent of each other."""
        del name
        return output[:, self._checked_heads()]

    def _checked_heads(self) -> slice:
        per_head = 4 * self.case.context_tokens**2
        count = min(self.case.heads, max(1, MAX_REFERENCE_BYTES // per_head))
        # the last ones: an address that overflows does so there
        return slice(self.case.heads - count, None)


def build(case: PrefillCase, device: torch.device, *, seed: int = 0, small: bool = False) -> PrefillProblem:
    """Make a case's inputs.

    Args:
        case: the shape.
        device: where.
        seed: of the numbers.
        small: makes no difference: implementations are compiled for the exact shape.
    """
    del small
    generator = torch.Generator(device).manual_seed(seed)
    tokens = case.batch * case.context_tokens

    def numbers(width: int) -> torch.Tensor:
        shape = (tokens, case.heads, width)
        return torch.randn(shape, device=device, generator=generator, dtype=torch.bfloat16)

    starts = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.context_tokens
    return PrefillProblem(
        case=case,
        q=numbers(QK_DIM),
        k=numbers(QK_DIM),
        v=numbers(V_DIM),
        grad_out=numbers(V_DIM),
        cu_seqlens=starts.to(torch.int32),
    )


def _full() -> Iterator[PrefillCase]:
    for heads in (32, 16):
        for batch, context in ((1, 8192), (4, 8192), (1, 32_768)):
            for direction in ("forward", "backward"):
                yield PrefillCase(heads=heads, batch=batch, context_tokens=context, direction=direction)


BENCH = OpBench(
    op="mla_prefill",
    cases=tuple(_full()),
    quick=tuple(_full())[:2],
    toy=tuple(
        PrefillCase(heads=2, batch=2, context_tokens=48, direction=direction)
        for direction in ("forward", "backward")
    ),
    build=build,
)
