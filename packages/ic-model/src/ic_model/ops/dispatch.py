"""Choose among the implementations of an op.

An implementation that was asked for by name runs or fails. Where none was asked for, the first that can take
the arguments runs, and one that does not compile or launch on this machine is replaced by the next, with one
line of warning: a slow answer is better than none, as long as it is said. So it is said, too, where no kernel
takes tensors that are on a GPU.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib import util
from typing import Any

import torch

logger = logging.getLogger("ic_model.ops")

REFERENCE = "reference"

# stock Triton and PyTorch's builds both begin there
MINIMUM_CAPABILITY = 75


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute an op.

    Args:
        name: what callers and messages call it.
        load: returns the function, importing what it needs; called on each use.
        refuses: called with the op's arguments; the reason why it cannot take them, or None.
    """

    name: str
    load: Callable[[], Callable[..., Any]]
    refuses: Callable[..., str | None]


def dispatch(
    op: str,
    implementations: Sequence[Implementation],
    implementation: str | None,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run an op by the implementation that was asked for, or by the first that can, on the tensors' device.

    Args:
        op: name of the op, for messages.
        implementations: the best first; the last one is "reference" and takes everything valid.
        implementation: name of one of them; None to choose.
        args: the op's arguments, already checked.
        kwargs: the op's arguments, already checked.

    Returns:
        what the implementation returns.

    Raises:
        ValueError: `implementation` is not one of them, or cannot take the arguments. Whatever an
            implementation asked for by name raises, and what one that was chosen raises while it computes,
            reaches the caller.
    """
    assert implementations[-1].name == REFERENCE, f"{op}: the last implementation is the reference"
    with on_device(*args, *kwargs.values()):
        if implementation is not None:
            return _by_name(op, implementations, implementation, *args, **kwargs)
        return _first_that_runs(op, implementations, *args, **kwargs)


def on_device(*values: Any) -> AbstractContextManager[Any]:
    """Make the device of the first CUDA tensor the current one: Triton launches there, wherever the tensors are.

    Args:
        values: a function's arguments, tensors or not.
    """
    device = _cuda_device(values)
    if device is None or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def kernel_refuses(*tensors: torch.Tensor) -> str | None:
    """Say why no Triton kernel can take these tensors, or None: what `refuses` of every kernel begins with.

    Args:
        tensors: any shape and dtype. Triton runs on CUDA devices of capability 7.5 and later, and on the CPU
            only under its interpreter (`TRITON_INTERPRET=1`).
    """
    if not _has_triton():
        return "Triton is not installed"
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        return f"the tensors are on {', '.join(sorted(map(str, devices))) or 'no device'}"
    (device,) = devices
    if device.type == "cpu":
        return None if interpreting() else "the tensors are on the CPU"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the tensors are on {device}, which is no NVIDIA GPU"
    capability = _capability(device)
    if capability < MINIMUM_CAPABILITY:
        return f"compute capability {capability} is below {MINIMUM_CAPABILITY}"
    if capability < 80 and any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        return f"compute capability {capability} has no bfloat16"
    return None


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU; as Triton reads the variable."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


_failed: set[tuple[Any, ...]] = set()
_warned: set[tuple[Any, ...]] = set()

# beginnings of RuntimeErrors by which Triton says that it cannot compile or launch; it has no class for them
_FAILURES = (
    "Triton Error [CUDA]",
    "PassManager::run failed",
    "error encountered during parsing",
    "failed to translate module to LLVM IR",
    "Failed to find C compiler",
    "Failed to open libcuda.so.1",
    "0 active drivers",
)
# after these the device is out of memory or in no state to compute anything, by no fault of the kernel
_DEVICE_LOST = ("out of memory", "illegal memory access", "misaligned address", "device-side assert")


def _first_that_runs(op: str, implementations: Sequence[Implementation], /, *args: Any, **kwargs: Any) -> Any:
    refusals = []
    for candidate in implementations[:-1]:
        refusal = candidate.refuses(*args, **kwargs)
        if refusal is not None:
            refusals.append(f"{candidate.name}: {refusal}")
            continue
        kind = (op, candidate.name, *_kind([*args, *kwargs.values()]))
        if kind in _failed:
            continue
        try:
            return candidate.load()(*args, **kwargs)
        except Exception as error:
            reason = _cannot_run(error)
            if reason is None:
                raise
            # compiling once more would take seconds at every call and fail again
            _failed.add(kind)
            _warn_once(
                (op, candidate.name, reason),
                f"{op}: {candidate.name} does not run here, taking the next implementation: {reason}",
            )
    if refusals and _cuda_device([*args, *kwargs.values()]) is not None:
        # by kind: the reasons may name what changes from batch to batch
        _warn_once(
            (op, REFERENCE, *_kind([*args, *kwargs.values()])),
            f"{op}: no kernel takes these tensors, taking the slow reference: {'; '.join(refusals)}",
        )
    return implementations[-1].load()(*args, **kwargs)


def _cuda_device(values: Iterable[Any]) -> torch.device | None:
    """Where the first CUDA tensor is; None without one."""
    return next((value.device for value in values if isinstance(value, torch.Tensor) and value.is_cuda), None)


def _by_name(
    op: str, implementations: Sequence[Implementation], wanted: str, /, *args: Any, **kwargs: Any
) -> Any:
    for candidate in implementations:
        if candidate.name != wanted:
            continue
        reason = candidate.refuses(*args, **kwargs)
        if reason is not None:
            raise ValueError(f"implementation is {wanted!r}, which cannot compute this {op}: {reason}")
        return candidate.load()(*args, **kwargs)
    accepted = ", ".join(repr(candidate.name) for candidate in implementations)
    raise ValueError(f"implementation is {wanted!r}; {op} accepts {accepted} or None to choose")


def _kind(values: Sequence[Any]) -> list[Any]:
    """What decides whether a kernel compiles: dtypes, row lengths and plain options, not numbers of tokens."""
    kind: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            # of lengths and tables, which are integers, sizes are numbers of sequences, tokens and pages
            row = value.shape[-1] if value.ndim >= 2 and value.is_floating_point() else None
            kind.append((value.device, value.dtype, value.ndim, row, value.requires_grad))
        elif value is None or isinstance(value, bool | str | torch.dtype):
            kind.append(value)
    return kind


def _cannot_run(error: Exception) -> str | None:
    """Why the kernel cannot be compiled or launched here; None for every other error."""
    text = str(error).strip()
    first_line = text.splitlines()[0] if text else ""
    reason = f"{type(error).__name__}: {first_line}"
    if any(sign in text for sign in _DEVICE_LOST):
        return None
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    # the interpreter compiles nothing: what fails there is the kernel itself
    if any(name.startswith("triton.") for name in names) and type(error).__name__ != "InterpreterError":
        return reason
    if isinstance(error, ImportError):
        return reason
    return reason if isinstance(error, RuntimeError) and first_line.startswith(_FAILURES) else None


def _warn_once(what: tuple[Any, ...], message: str) -> None:
    if what not in _warned:
        _warned.add(what)
        logger.warning("%s", message)


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return util.find_spec("triton") is not None


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor
