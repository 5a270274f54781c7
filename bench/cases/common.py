"""What the benchmarked ops have in common: cases, their work, and the check that precedes every timing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch


class Refused(Exception):
    """An implementation cannot take a case; the message says why."""


class WrongOutput(Exception):
    """An implementation's output is not the reference's; the message says how far it is off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The least that an op must do, whatever the implementation does.

    Args:
        bytes: every input read once and every output written once.
        flop: multiplications and additions of its matrix products (of its arithmetic, where it has none).
        traffic: whether its bytes are mostly read, or read and written like a copy's.
    """

    bytes: int
    flop: int
    traffic: Literal["read", "copy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """An implementation, ready to be timed.

    Args:
        launches: one call per input set; each does all that the op needs per call.
        outputs: takes what the first launch returned, and returns the named outputs to be checked.
        bound: key of `BOUNDS`.
        note: what the reader of the number must know.
    """

    launches: Sequence[Callable[[], Any]]
    outputs: Callable[[Any], Mapping[str, torch.Tensor]]
    bound: str = "bfloat16"
    note: str = ""


class Case(Protocol):
    """One line of a table, without anything allocated. Picklable."""

    @property
    def label(self) -> str:
        """Short text for progress and messages."""
        ...

    def row(self) -> dict[str, Any]:
        """The fields that identify it in a result."""
        ...


class Problem(Protocol):
    """A case with its inputs on a device."""

    @property
    def work(self) -> Work:
        """Bytes and FLOP."""
        ...

    @property
    def sets(self) -> int:
        """Number of input sets that launches rotate among."""
        ...

    def ours(self, implementation: str) -> Prepared:
        """The op of ic-model by the named implementation."""
        ...

    def expected(self) -> Mapping[str, torch.Tensor]:
        """The reference's outputs on the first input set, computed in float32."""
        ...

    def checked_part(self, name: str, output: torch.Tensor) -> torch.Tensor:
        """The part of an output that `expected` has; all of it where that is cheap enough."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class OpBench:
    """A benchmarked op.

    Args:
        op: its name.
        cases: all of them, the most important first.
        quick: a few of them.
        toy: tiny ones, for a run without a GPU.
        build: makes a case's inputs on a device from a seed; with `small`, the same shapes with as little memory
            as possible, enough to compile everything.
        implementations: those of ic-model that are timed unless others are asked for.
    """

    op: str
    cases: Sequence[Any]
    quick: Sequence[Any]
    toy: Sequence[Any]
    build: Callable[..., Any]
    implementations: Sequence[str] = ("triton",)


# largest relative norm of the difference from the float32 reference, and what it comes from. The largest single
# difference may be PEAK_FACTOR times that share of the largest element.
BOUNDS = {
    "float32": (1e-4, "sums in another order"),
    "bfloat16": (
        1e-2,
        "bfloat16 keeps 8 bits: inputs of the second product and the output are rounded (2**-8 each)",
    ),
    "bfloat16_gradient": (2e-2, "a gradient passes several products whose inputs are rounded to bfloat16"),
    "fp8_store": (
        3e-2,
        "the stored number is rounded to 4 bits; one that lies near a border may fall to the other side",
    ),
    "fp8_query": (
        1.5e-1,
        "query and softmax weights are rounded to float8 e4m3 too (2**-4 each), which ours are not",
    ),
}
PEAK_FACTOR = 10.0


def named(implementation: str) -> str | None:
    """An op's argument for an implementation's name: "auto" is None, whatever the op then chooses."""
    return None if implementation == "auto" else implementation


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Relative Frobenius norm of the difference, and its largest element over the largest expected one.

    Elements that are the same infinity in both are left out. Computed on the tensors' device: outputs here may
    have billions of bytes.

    Raises:
        WrongOutput: shapes differ, or an element is NaN or infinite in only one of them.
    """
    if actual.shape != expected.shape:
        raise WrongOutput(f"shape {list(actual.shape)} instead of {list(expected.shape)}")
    left, right = actual.detach().float(), expected.detach().float()
    finite = left.isfinite() & right.isfinite()
    bad = int((~finite & (left != right)).sum())
    if bad:
        raise WrongOutput(f"{bad} elements are not finite in the output or the reference only")
    zero = torch.zeros((), device=left.device)
    error = torch.where(finite, left - right, zero)
    reference = torch.where(finite, right, zero)
    norm = float(reference.norm(dtype=torch.float64)) or 1.0
    largest = float(reference.abs().max()) or 1.0
    return float(error.norm(dtype=torch.float64)) / norm, float(error.abs().max()) / largest


def check_outputs(
    problem: Problem, prepared: Prepared, expected: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Compare an implementation's outputs with the reference.

    Returns:
        output's name to relative error.

    Raises:
        WrongOutput: one is further off than its bound.
    """
    bound, reason = BOUNDS[prepared.bound]
    errors = {}
    for name, output in prepared.outputs(prepared.launches[0]()).items():
        relative, peak = relative_error(problem.checked_part(name, output), expected[name])
        errors[name] = relative
        if not (relative <= bound and peak <= PEAK_FACTOR * bound):
            raise WrongOutput(
                f"{name} differs by {relative:.1e} (norm) and {peak:.1e} (peak) from the float32 reference; bound "
                f"{bound:.0e} and {PEAK_FACTOR * bound:.0e}: {reason}"
            )
    return errors
