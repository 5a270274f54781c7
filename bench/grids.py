"""What tuning tries and what it leaves behind: grids of candidates, and entries of `ops/tuning`."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ic_model.ops import launch

Parameters = tuple[tuple[str, int], ...]
When = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Candidates for one kernel of an op.

    Args:
        kernel: as the op's entries name it in `kernel`; None where it has but one.
        parameters: parameter to the values to try.
        ranges: shape field to ranges `[lowest, highest]`, both ends in, within which launches share an entry;
            other fields must be equal.
        ignore: shape fields that entries shall not ask for.
    """

    kernel: str | None
    parameters: Mapping[str, Sequence[int]]
    ranges: Mapping[str, Sequence[Sequence[int]]]
    ignore: Sequence[str]

    def candidates(self) -> list[Parameters]:
        """All combinations."""
        names = list(self.parameters)
        return [
            tuple(zip(names, values, strict=True)) for values in itertools.product(*self.parameters.values())
        ]

    def when(self, shape: Mapping[str, Any]) -> When:
        """The condition of an entry for a launch of this shape."""
        found = []
        for name, value in sorted(shape.items()):
            if name in self.ignore:
                continue
            holding = [tuple(ends) for ends in self.ranges.get(name, ()) if ends[0] <= value <= ends[1]]
            found.append((name, holding[0] if holding else value))
        return tuple(found)


def read_grids(path: Path) -> list[Grid]:
    """Read a list of grids.

    Raises:
        ValueError: there is no such file, or an entry of it has other fields than those of `Grid`.
    """
    if not path.exists():
        raise ValueError(f"there is no grid {path}")
    fields = {"kernel", "parameters", "ranges", "ignore"}
    grids = []
    for index, raw in enumerate(json.loads(path.read_text())):
        if not isinstance(raw, dict) or not {"parameters"} <= set(raw) <= fields:
            raise ValueError(
                f"{path}, entry {index}: it must have parameters, and may have kernel, ranges, ignore"
            )
        grids.append(
            Grid(
                kernel=raw.get("kernel"),
                parameters=raw["parameters"],
                ranges=raw.get("ranges", {}),
                ignore=raw.get("ignore", ()),
            )
        )
    return grids


def best(times: Mapping[Parameters, Mapping[Any, float]]) -> list[tuple[float, Parameters]]:
    """Candidates by the geometric mean, over cases, of their time over the case's best; the best first.

    Args:
        times: candidate to case to microseconds. Candidates that lack a case are left out.
    """
    cases = {case for measured in times.values() for case in measured}
    whole = {candidate: measured for candidate, measured in times.items() if set(measured) == cases}
    fastest = {case: min(measured[case] for measured in whole.values()) for case in cases if whole}
    scores = [
        (
            math.exp(sum(math.log(measured[case] / fastest[case]) for case in cases) / len(cases)),
            candidate,
        )
        for candidate, measured in whole.items()
        if measured
    ]
    return sorted(scores)


def merge_entries(content: dict[str, Any], entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A tuning file's content with new entries first; older ones for the same GPU and condition go."""
    new = [(entry["gpu"], entry["when"]) for entry in entries]
    kept = [entry for entry in content["entries"] if (entry["gpu"], entry["when"]) not in new]
    return {"entries": [*entries, *kept]}


def format_entries(content: dict[str, Any]) -> str:
    """A tuning file's text: a line per entry, so that a difference shows what changed."""
    lines = ",\n".join(f"    {json.dumps(entry)}" for entry in content["entries"])
    return f'{{\n  "entries": [\n{lines}\n  ]\n}}\n'


def write_entries(path: Path, output: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Write a tuning file with new entries, and read it back as the ops do.

    Raises:
        ValueError: what was written is malformed.
    """
    merged = merge_entries(json.loads(path.read_text()), entries)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(format_entries(merged))
    launch.read_entries.cache_clear()
    launch.read_entries(output)
