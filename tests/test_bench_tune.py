"""Tuning: what is tried, what is chosen, and what is written."""

import json
from dataclasses import dataclass

import pytest
import torch
from ic_model.ops import launch

from bench import tune as bench_tune
from bench.cases import OPS
from bench.cases.common import OpBench, Prepared, Work
from bench.grids import Grid, best, format_entries, merge_entries, read_grids, write_entries
from bench.tune import GRIDS, main

DEFAULT = {
    "capability": 80, "gpu": None, "when": {"kernel": "sleep"}, "parameters": {"naps": 3, "num_warps": 4},
    "provenance": "default, not measured",
}  # fmt: skip


@dataclass(frozen=True)
class _Case:
    tokens: int

    @property
    def label(self):
        return f"{self.tokens} tokens"

    def row(self):
        return {"heads": 1}


class _Clock:
    """What stands for time while launches are timed: a busy machine sleeps longer than it was asked to."""

    now_s = 0.0

    def perf_counter(self):
        return self.now_s


clock = _Clock()


class _Problem:
    """Takes as long as its launch parameters say; one value of them gives a wrong answer."""

    work = Work(bytes=1, flop=1, traffic="read")
    sets = 1

    def __init__(self, case):
        self.case = case

    def ours(self, implementation):
        assert implementation == "triton"

        def run():
            launch.launch_parameters("rope", torch.device("cpu"), kernel="other", tokens=1)
            found = launch.launch_parameters(
                "rope", torch.device("cpu"), kernel="sleep", tokens=self.case.tokens, row_dim=64
            )
            clock.now_s += found["naps"] * 5e-3
            if found["num_warps"] == 16:
                raise RuntimeError("out of resources")
            return torch.ones(1) * (2 if found["num_warps"] == 8 else 1)

        return Prepared(launches=[run], outputs=lambda returned: {"out": returned})

    def expected(self):
        return {"out": torch.ones(1)}

    def checked_part(self, name, output):
        return output


@pytest.fixture
def fake_op(tmp_path, monkeypatch):
    """An op under the name of rope, with a tuning file and a grid of its own."""
    cases = (_Case(10), _Case(20), _Case(5000))
    bench = OpBench(
        op="rope", cases=cases, quick=cases, toy=(), build=lambda case, device, **options: _Problem(case)
    )
    monkeypatch.setattr(bench_tune, "op_bench", lambda op: bench)
    monkeypatch.setattr(launch, "TUNING", tmp_path)
    monkeypatch.setattr("bench.timing.time", clock)
    launch.read_entries.cache_clear()
    launch._find.cache_clear()
    other = {**DEFAULT, "when": {}, "parameters": {"x": 1}}
    (tmp_path / "rope.json").write_text(json.dumps({"entries": [DEFAULT, other]}))
    grid = [
        {
            "kernel": "sleep",
            "parameters": {"naps": [1, 2], "num_warps": [4, 8, 16]},
            "ranges": {"tokens": [[1, 4095], [4096, 100_000]]},
            "ignore": ["row_dim"],
        }
    ]
    path = tmp_path / "grid.json"
    path.write_text(json.dumps(grid))
    yield ["rope", "--grid", str(path), "--device", "cpu", "--samples", "3"]
    launch.read_entries.cache_clear()
    launch._find.cache_clear()


def test_tuning_finds_the_fastest_that_is_right(fake_op, tmp_path, capsys):
    output = tmp_path / "out" / "rope.json"
    assert main([*fake_op, "--output", str(output)]) == 0
    first, second, *defaults = json.loads(output.read_text())["entries"]
    assert first["when"] == {"kernel": "sleep", "tokens": [1, 4095]}
    assert second["when"] == {"kernel": "sleep", "tokens": [4096, 100_000]}
    assert first["parameters"] == {"naps": 1, "num_warps": 4}
    provenance = first["provenance"]
    assert set(provenance) == {"gpu", "date", "triton", "commit", "command", "median_us", "cases"}
    assert provenance["command"].startswith("python -m bench.tune rope --grid")
    assert set(provenance["cases"]) == {"10 tokens", "20 tokens"}
    assert provenance["median_us"] >= 5000
    assert defaults[0] == DEFAULT
    printed = capsys.readouterr().out
    assert "WRONG {'naps': 1, 'num_warps': 8} on 10 tokens: out differs" in printed
    assert "failed {'naps': 1, 'num_warps': 16} on 10 tokens: out of resources" in printed
    assert "2 entries written" in printed
    assert json.loads((tmp_path / "rope.json").read_text())["entries"][0] == DEFAULT


def test_dry_run_writes_nothing(fake_op, tmp_path, capsys):
    before = (tmp_path / "rope.json").read_text()
    assert main([*fake_op, "--dry-run", "--cases", "1"]) == 0
    assert "1 entries found, nothing written" in capsys.readouterr().out
    assert (tmp_path / "rope.json").read_text() == before


def test_what_is_best_already_is_not_written(fake_op, tmp_path, capsys):
    grid = tmp_path / "slower.json"
    grid.write_text(json.dumps([{"kernel": "sleep", "parameters": {"naps": [4, 5]}}]))
    assert main([*fake_op, "--grid", str(grid), "--cases", "1"]) == 0
    assert "as it is; 0.0% over today's" in capsys.readouterr().out


def test_unknown_kernel(fake_op, capsys):
    assert main([*fake_op, "--kernels", "wake"]) == 2
    assert "kernels has wake; the grid has sleep" in capsys.readouterr().err


def test_best_is_by_geometric_mean_and_needs_all_cases():
    one, two, three = ((("a", n),) for n in (1, 2, 3))
    times = {one: {"x": 1.0, "y": 4.0}, two: {"x": 2.0, "y": 1.0}, three: {"x": 0.1}}
    assert [(round(score, 3), name) for score, name in best(times)] == [(1.414, two), (2.0, one)]
    assert best({}) == []


def test_grid():
    grid = Grid(kernel=None, parameters={"a": [1, 2], "b": [3]}, ranges={"n": [[1, 8]]}, ignore=["m"])
    assert grid.candidates() == [(("a", 1), ("b", 3)), (("a", 2), ("b", 3))]
    assert grid.when({"n": 5, "m": 7, "k": "x"}) == (("k", "x"), ("n", (1, 8)))
    assert grid.when({"n": 9}) == (("n", 9),)


def test_entries_replace_those_for_the_same(tmp_path):
    named = {**DEFAULT, "gpu": "H200", "parameters": {"naps": 9}}
    newer = {**named, "parameters": {"naps": 1}}
    content = merge_entries({"entries": [named, DEFAULT]}, [newer])
    assert content["entries"] == [newer, DEFAULT]
    assert json.loads(format_entries(content)) == content
    assert format_entries(content).count("\n") == 6
    path = tmp_path / "rope.json"
    path.write_text(json.dumps({"entries": [DEFAULT]}))
    with pytest.raises(ValueError, match="num_warps is 'four'"):
        write_entries(path, tmp_path / "new.json", [{**named, "parameters": {"num_warps": "four"}}])


def test_malformed_grid(tmp_path):
    path = tmp_path / "grid.json"
    path.write_text(json.dumps([{"kernel": "x", "values": {}}]))
    with pytest.raises(ValueError, match="entry 0: it must have parameters"):
        read_grids(path)


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_grids_change_what_the_op_is_launched_with(path):
    assert path.stem in OPS
    entries = launch.read_entries(launch.TUNING / path.name)
    for grid in read_grids(path):
        assert 1 < len(grid.candidates()) <= 200
        launched = [
            set(entry.parameters) for entry in entries if entry.when.get("kernel", grid.kernel) == grid.kernel
        ]
        assert launched, grid.kernel
        assert all(set(grid.parameters) <= parameters for parameters in launched), grid.kernel
