"""Launch parameters of the kernels, from `tuning/<op>.json`: the only place of them.

Nothing is tuned while a program runs: that needs a GPU, makes launches differ from run to run, and cannot
be captured in a CUDA graph. The files' format is in `tuning/README.md`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

TUNING = Path(__file__).parent / "tuning"

# the interpreter has no device: the plainest chip with tensor cores stands in for it
INTERPRETED_CAPABILITY = 80

_FIELDS = ("capability", "gpu", "when", "parameters", "provenance")
_MEASURED = ("gpu", "date", "triton", "command", "median_us")

Condition = int | str | tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """Launch parameters for one kind of chip and one range of shapes.

    Args:
        capability: compute capability as one number: 90 is 9.0.
        gpu: device name that the entry is for; None for every device of that capability.
        when: shape field to what it must be: a number, a word, or (lowest, highest).
        parameters: what the kernel is launched with.
        provenance: how the parameters were found: a sentence, or the measurement.
        source: file and place of the entry, for messages.
    """

    capability: int
    gpu: str | None
    when: Mapping[str, Condition]
    parameters: Mapping[str, int]
    provenance: str | Mapping[str, Any]
    source: str


def launch_parameters(op: str, device: torch.device | int, **shape: int | str) -> dict[str, int]:
    """Return the launch parameters of an op for a device and a shape.

    The first entry that fits wins: of those that name the device, then of those for every device of its
    capability, then of those for the next lower capability, and so on.

    Args:
        op: name of the file in `ops/tuning`, without `.json`.
        device: CUDA device; a CPU, under Triton's interpreter, counts as capability 80. Or a compute
            capability as one number, for compiling ahead of time.
        shape: the fields that entries ask for, such as `row_dim=576, heads=16`.

    Returns:
        parameter to value; the caller may change it.

    Raises:
        ValueError: there is no such file, it is malformed, no entry fits, or an entry asks for a field that
            is not in `shape`.
    """
    capability, gpu = _chip(device)
    entry = _find(TUNING / f"{op}.json", capability, gpu, tuple(sorted(shape.items())))
    return {**entry.parameters, **_overridden(op, entry.parameters, shape)}


@contextmanager
def overriding(op: str, parameters: Mapping[str, int], **when: int | str) -> Iterator[None]:
    """Inside the block, launch an op with other parameters: for tuning and for tests of launches.

    Args:
        op: as in `launch_parameters`.
        parameters: those that change.
        when: shape fields that must be equal for it; none for every launch of the op.
    """
    _overrides.append((op, dict(parameters), when))
    try:
        yield
    finally:
        _overrides.pop()


@lru_cache(maxsize=64)
def read_entries(path: Path) -> tuple[Entry, ...]:
    """Read and check a tuning file, once in a process; `read_entries.cache_clear()` forgets all files.

    Args:
        path: a JSON file in the format of `tuning/README.md`.

    Raises:
        ValueError: there is no such file or it is malformed: names the file, the entry and the field.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.json"))) or "none"
        raise ValueError(f"op is {path.stem!r}, which has no file {path}; ops with one: {known}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or set(content) != {"entries"}:
        raise ValueError(f"{path} must be an object with the one field 'entries'")
    entries = content["entries"]
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: entries is {entries!r}; it must be a list of at least one entry")
    return tuple(_entry(raw, f"{path}, entries[{index}]") for index, raw in enumerate(entries))


_overrides: list[tuple[str, dict[str, int], dict[str, int | str]]] = []


def _overridden(op: str, found: Mapping[str, int], shape: Mapping[str, int | str]) -> dict[str, int]:
    changes: dict[str, int] = {}
    for name, parameters, when in _overrides:
        if name != op or any(shape.get(field) != value for field, value in when.items()):
            continue
        unknown = set(parameters) - set(found)
        if unknown:
            raise ValueError(
                f"parameters has {', '.join(sorted(unknown))}, which {op} is not launched with; "
                f"accepted: {', '.join(found)}"
            )
        changes |= parameters
    return changes


def _chip(device: torch.device | int) -> tuple[int, str | None]:
    """Compute capability and name of a device."""
    if isinstance(device, int):
        return device, None
    if device.type == "cpu":
        return INTERPRETED_CAPABILITY, None
    if device.type != "cuda":
        raise ValueError(f"device is {device}; accepted: a CUDA device, the CPU or a compute capability")
    return _cuda_chip(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=64)
def _cuda_chip(index: int) -> tuple[int, str | None]:
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor, torch.cuda.get_device_name(index)


# a launch asks anew each time, so that the answer must cost next to nothing
@lru_cache(maxsize=4096)
def _find(path: Path, capability: int, gpu: str | None, items: tuple[tuple[str, Any], ...]) -> Entry:
    entries, shape = read_entries(path), dict(items)
    named = [entry for entry in entries if gpu is not None and entry.gpu == gpu]
    unnamed = [entry for entry in entries if entry.gpu is None and entry.capability <= capability]
    # the sort keeps the order of the file within a capability
    for entry in named + sorted(unnamed, key=lambda entry: -entry.capability):
        if _fits(entry, shape):
            return entry
    asked = ", ".join(f"{field}={value!r}" for field, value in items) or "no shape"
    chip = f"capability {capability}" + (f" ({gpu})" if gpu else "")
    raise ValueError(f"{path} has no entry for {chip} with {asked}")


def _fits(entry: Entry, shape: Mapping[str, int | str]) -> bool:
    for field, wanted in entry.when.items():
        if field not in shape:
            continue
        value = shape[field]
        if isinstance(wanted, tuple):
            if isinstance(value, str) or not wanted[0] <= value <= wanted[1]:
                return False
        elif value != wanted:
            return False
    # only now: an entry for another kernel of the same op may ask for fields that this one does not have
    lacking = set(entry.when) - set(shape)
    if lacking:
        raise ValueError(
            f"{entry.source}: when asks for {', '.join(sorted(lacking))}; the launch has "
            f"{', '.join(sorted(shape)) or 'no fields'}"
        )
    return True


def _entry(raw: Any, source: str) -> Entry:
    if not isinstance(raw, dict):
        raise ValueError(f"{source} is {raw!r}; it must be an object with {', '.join(_FIELDS)}")
    if set(raw) != set(_FIELDS):
        wrong = sorted(set(raw) ^ set(_FIELDS))
        raise ValueError(f"{source} must have exactly {', '.join(_FIELDS)}; missing or unknown: {wrong}")
    capability, gpu, provenance = raw["capability"], raw["gpu"], raw["provenance"]
    if not _is_int(capability) or not 70 <= capability < 1000:
        raise ValueError(f"{source}: capability is {capability!r}; it must be a number such as 90 for 9.0")
    if gpu is not None and not (isinstance(gpu, str) and gpu):
        raise ValueError(f"{source}: gpu is {gpu!r}; it must be a device name or null")
    _check_provenance(provenance, source)
    return Entry(
        capability=capability,
        gpu=gpu,
        when={field: _condition(value, field, source) for field, value in _object(raw, "when", source)},
        parameters=dict(_parameters(raw, source)),
        provenance=provenance,
        source=source,
    )


def _object(raw: Mapping[str, Any], field: str, source: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(raw[field], dict):
        raise ValueError(f"{source}: {field} is {raw[field]!r}; it must be an object")
    yield from raw[field].items()


def _condition(value: Any, field: str, source: str) -> Condition:
    if _is_int(value) or (isinstance(value, str) and value):
        return value
    if isinstance(value, list) and len(value) == 2 and all(map(_is_int, value)) and value[0] <= value[1]:
        return value[0], value[1]
    raise ValueError(f"{source}: when.{field} is {value!r}; it must be a number, a word or [lowest, highest]")


def _parameters(raw: Mapping[str, Any], source: str) -> Iterator[tuple[str, int]]:
    for name, value in _object(raw, "parameters", source):
        if not _is_int(value) or value < 0:
            raise ValueError(f"{source}: parameters.{name} is {value!r}; it must be a number of at least 0")
        yield name, value
    if not raw["parameters"]:
        raise ValueError(f"{source}: parameters is empty; it must have at least one")


def _check_provenance(provenance: Any, source: str) -> None:
    if isinstance(provenance, str) and provenance:
        return
    if isinstance(provenance, dict):
        lacking = [field for field in _MEASURED if field not in provenance]
        if lacking:
            raise ValueError(f"{source}: provenance has no {', '.join(lacking)}")
        date = provenance["date"]
        if not (isinstance(date, str) and re.fullmatch(r"\d{4}-\d{2}-\d{2}", date)):
            raise ValueError(f"{source}: provenance.date is {date!r}; it must be like 2026-11-23")
        return
    raise ValueError(
        f"{source}: provenance is {provenance!r}; it must be a sentence such as 'default, not measured', or an "
        f"object with {', '.join(_MEASURED)}"
    )


def _is_int(value: Any) -> bool:
    # in Python True is 1
    return isinstance(value, int) and not isinstance(value, bool)
