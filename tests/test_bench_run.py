"""A benchmark's run: the table, the result, the plots, and what happens when something is wrong."""

import json

import pytest
import torch

from bench import run as bench_run
from bench.cases import OPS, op_bench
from bench.cases.common import Refused
from bench.plots import main as plots_main
from bench.plots import plot_result
from bench.precompile import Task, precompile
from bench.run import main, select_cases
from bench.tables import print_table
from bench.timing import input_sets, measure
from bench.tune import main as tune_main

FIELDS = {
    "op", "impl", "heads", "batch", "context_tokens", "query_tokens", "median_us", "gb_per_s", "tflops", "rel_err",
}  # fmt: skip
SMOKE = ["--device", "cpu", "--implementation", "reference", "--samples", "2"]


def _result(folder):
    (path,) = folder.glob("*/result.json")
    return json.loads(path.read_text()), path.parent


@pytest.mark.parametrize("op", OPS)
def test_every_op_runs_without_a_gpu(op, tmp_path, capsys):
    assert main([op, *SMOKE, "--results", str(tmp_path)]) == 0
    result, folder = _result(tmp_path)
    assert result["command"].startswith(f"python -m bench.run {op} --device cpu")
    assert result["topic"] == op.replace("_", "-")
    assert {"commit", "gpu", "versions", "seed", "roofline", "refused"} <= set(result)
    ours = [row for row in result["rows"] if row["ours"]]
    assert len(ours) == len(op_bench(op).toy)
    for row in ours:
        assert set(row) >= FIELDS
        assert row["impl"] == "reference"
        assert row["rel_err"] < 2e-2
        assert len(row["samples_us"]) == 2
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_us"] / 1e3)
    printed = capsys.readouterr().out
    assert printed.count("GFLOP") == 1, "one table"
    assert "it needs a GPU" in printed
    assert list(folder.glob("*.png"))


def test_decode_fields_are_those_of_the_design(tmp_path):
    main(["mla_decode", *SMOKE, "--peers", "eager", "--results", str(tmp_path)])
    result, _ = _result(tmp_path)
    assert {row["impl"] for row in result["rows"]} == {"reference", "eager"}
    for row in result["rows"]:
        assert set(row) >= FIELDS | {"row_dim", "kv_dtype"}


@pytest.fixture
def fake_peer(monkeypatch):
    """Puts a function in the place of the eager peer of rope."""

    def put(function):
        monkeypatch.setattr("bench.peers.small.eager_rope", function)

    return put


def _run(tmp_path, capsys, *more):
    status = main(["rope", *SMOKE, "--results", str(tmp_path), "--peers", "eager", *more])
    return status, capsys.readouterr()


def test_a_wrong_peer_gets_no_number(tmp_path, capsys, fake_peer):
    fake_peer(lambda problem: problem.prepared(lambda x, cos, sin: x * 1.1))
    status, printed = _run(tmp_path, capsys)
    assert status == 1
    assert "eager: WRONG: out differs by" in printed.out
    result, _ = _result(tmp_path)
    assert {row["impl"] for row in result["rows"]} == {"reference"}
    assert result["refused"][0]["impl"] == "eager"


@pytest.mark.parametrize("error", [Refused("not on Sundays"), KeyError("odd"), RuntimeError("first\nsecond")])
def test_a_peer_that_fails_is_a_dash(tmp_path, capsys, fake_peer, error):
    def fails(problem):
        raise error

    fake_peer(fails)
    status, printed = _run(tmp_path, capsys)
    assert status == 0
    (line,) = [line for line in printed.out.splitlines() if " reference " in line]
    assert line.split()[-2] == "-"
    reason = {Refused: "not on Sundays", KeyError: "KeyError: 'odd'", RuntimeError: "RuntimeError: first"}
    assert f"- eager: {reason[type(error)]} [h3 5x64]" in printed.out


def test_an_implementation_of_ours_that_does_not_run_fails(tmp_path, capsys):
    status = main(["rope", "--device", "cpu", "--implementation", "triton", "--peers", "none", "--samples", "1",
                   "--results", str(tmp_path)])  # fmt: skip
    assert status == 1
    assert "- triton: ValueError: implementation is 'triton'" in capsys.readouterr().out
    assert not list(tmp_path.iterdir()), "a result without rows"


def test_time_limit_is_said(tmp_path, capsys):
    assert main(["mla_decode", *SMOKE, "--peers", "none", "--limit-s", "0", "--results", str(tmp_path)]) == 1
    assert "stopped after 0 of 3 cases" in capsys.readouterr().out


def test_reference_that_fails_leaves_no_number(tmp_path, capsys, monkeypatch):
    def fails(self):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("bench.cases.rope.RopeProblem.expected", fails)
    status, printed = _run(tmp_path, capsys)
    assert status == 1
    assert "reference: the reference failed: out of memory" in printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rope", "--peers", "fast"], "peers has fast; rope accepts torch_compile, eager or none"),
        (["rope", "--cases", "all"], "cases has all; accepted: quick, full, toy, or numbers from 1 to 12"),
        (["rope", "--cases", "1,13"], "cases has 13; accepted"),
        (["mla_prefill", "--rows", "576"], "the cases of mla_prefill have no row_dim"),
        (
            ["mla_decode", "--cases", "full", "--heads", "16,17"],
            "heads is [16, 17]; the chosen cases have [16, 32, 128]",
        ),
        (["rope", "--samples", "0"], "samples is 0; it must be at least 1"),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments, message, capsys):
    assert main([*arguments, "--device", "cpu"]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_unknown_op(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["gemm"])
    assert ended.value.code == 2
    assert "invalid choice: 'gemm'" in capsys.readouterr().err


def test_selection():
    bench = op_bench("mla_decode")
    chosen = select_cases(bench, "full", rows=[320], heads=[32])
    assert {(case.row_dim, case.heads) for case in chosen} == {(320, 32)}
    assert select_cases(bench, "2,1") == [bench.cases[1], bench.cases[0]]
    assert main(["mla_decode", "--list", "--cases", "2", "--device", "cpu"]) == 0


def _row(impl, ours, us, **more):
    return {
        "op": "mla_decode", "impl": impl, "row_dim": 576, "heads": 16, "batch": 1, "context_tokens": 8192,
        "lengths": "even", "query_tokens": 1, "kv_dtype": "bfloat16", "median_us": us, "gb_per_s": 1e3,
        "tflops": 3.0, "rel_err": 2e-3, "ours": ours, "bytes": 9_472_580, "flop": 285_212_672,
        "roofline_share": 0.5, "read_gb_per_s": 4e3, "timing": "cuda_graph", "note": "", **more,
    }  # fmt: skip


def test_printed_table():
    rows = [
        _row("triton", True, 10.0),
        _row("fa3", False, 15.0, timing="events", note="half of it"),
        _row("fa3", False, 7.0, batch=32),
    ]
    refused = [{"impl": "eager", "case": f"case {n}", "reason": "too big"} for n in range(3)]
    text = print_table("mla_decode", rows, ["fa3", "eager"], refused)
    header, first, second, _, *notes = text.splitlines()
    assert header.split() == [
        "row", "heads", "batch", "tokens", "lengths", "queries", "cache", "MB", "GFLOP", "impl", "us", "GB/s",
        "TFLOP/s", "roofline", "fa3", "eager", "rel_err",
    ]  # fmt: skip
    assert first.split()[-9:] == ["triton", "10.0", "1,000", "3.0", "50%", "15.0", "(1.50x)", "-", "2.0e-03"]
    assert second.split()[-8:] == ["-", "-", "-", "-", "-", "7.00", "-", "-"]
    assert notes == [
        "- eager: too big [case 0 and 2 more]",
        "fa3: half of it",
        "launched from Python, not from a CUDA graph: fa3",
        "(1.50x): the peer takes 1.5 times as long as ours",
    ]


def test_plots_are_made_from_the_file_alone(tmp_path, capsys):
    rows = [
        _row(impl, impl == "triton", us * context / 8192, context_tokens=context, batch=batch)
        for impl, us in (("triton", 10.0), ("fa3", 12.0))
        for batch, context in ((1, 8192), (1, 131_072), (32, 8192), (128, 8192))
    ]
    (tmp_path / "result.json").write_text(json.dumps({"gpu": "H200", "rows": rows}))
    assert [path.name for path in plot_result(tmp_path)] == ["mla-decode-row-dim-576.png"]
    assert plots_main([str(tmp_path)]) == 0
    assert plots_main([]) == 2
    assert (tmp_path / "mla-decode-row-dim-576.png").stat().st_size > 10_000


def test_measure_on_a_cpu():
    calls = []
    timing = measure(
        [lambda: calls.append(0), lambda: calls.append(1)], device=torch.device("cpu"), samples=5
    )
    assert calls == [0, 0, 1, 0, 1, 0]
    assert len(timing.samples_us) == 5
    assert timing.method == "host"
    assert input_sets(1, torch.device("cpu")) == 1
    with pytest.raises(ValueError, match="launches has 0 entries and samples is 5"):
        measure([], device=torch.device("cpu"), samples=5)


def test_nothing_is_compiled_where_nothing_is_asked_for():
    case = op_bench("rope").toy[0]
    tasks = [Task(op="rope", case=case, implementation="eager", peer=True)]
    assert precompile(tasks, 4, timeout_s=1) == {}
    assert precompile([Task(op="rope", case=case, implementation="triton", peer=False)], 0, timeout_s=1) == {}


def test_a_lost_device_ends_the_run(tmp_path, capsys, fake_peer, monkeypatch):
    def fails(problem):
        raise RuntimeError("illegal memory access")

    fake_peer(fails)
    monkeypatch.setattr(bench_run, "device_works", lambda device: False)
    status, printed = _run(tmp_path, capsys)
    assert status == 1
    assert "the device is lost: eager on h3 5x64: illegal memory access" in printed.err
    assert len(_result(tmp_path)[0]["rows"]) == 1, "what was measured before is kept"


def test_tune_refuses_wrong_arguments(tmp_path, capsys):
    assert tune_main(["rope", "--grid", str(tmp_path / "none.json"), "--device", "cpu"]) == 2
    assert "there is no grid" in capsys.readouterr().err
