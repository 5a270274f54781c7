"""The same questions in process and behind a server become one result, and its table."""

import json

import pytest

from bench.cases import evaluation_engines
from bench.report import engines_table, load_rows


def _evaluation(folder, answers, *, context_tokens=4096, question="who?"):
    samples = [
        {
            "id": f"niah-{number}",
            "question": question,
            "reference": "1",
            "answer": answer,
            "correct": "1" in answer,
            "depth": 0.5,
        }
        for number, answer in enumerate(answers)
    ]
    row = {"model": "m", "engine": folder.name, "kv_dtype": "bfloat16", "task": "niah"}
    row |= {"context_tokens": context_tokens, "correct": 0, "total": len(samples), "samples": samples}
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps({"rows": [row, {**row, "task": "perplexity"}]}))
    return [f"--{folder.name}", str(folder)]


def _result(tmp_path, *words):
    return evaluation_engines.main([*words, "--results", str(tmp_path / "results")])


def test_verdicts_and_texts_are_compared_question_by_question(tmp_path, capsys):
    process = _evaluation(tmp_path / "process", ["1", "1.", "2", "3"])
    server = _evaluation(tmp_path / "server", ["1", "1!", "1", "3"])
    assert _result(tmp_path, *process, *server) == 0
    assert "2 and    3 of 4 right, 2 the same text" in capsys.readouterr().out
    (row,) = load_rows(tmp_path / "results")
    assert (row["only_process"], row["only_server"]) == (0, 1)
    assert (row["verdicts_process"], row["verdicts_server"], row["same_texts"]) == ("1100", "1110", "1001")
    assert "| m | niah | 4,096 | 2 of 4 | 3 of 4 | 0, 1 | 2 of 4 | server |" in engines_table([row])
    assert engines_table([row]).endswith(": 1 of 4 questions have another verdict.")
    (folder,) = (tmp_path / "results").iterdir()
    assert {path.name for path in folder.glob("*.png")} == {"niah-process.png", "niah-server.png"}


def test_answers_of_another_machine_are_stated_as_its_own(tmp_path, capsys):
    words = [*_evaluation(tmp_path / "process", ["1"]), *_evaluation(tmp_path / "server", ["1"])]
    host = {
        "commit": "abc",
        "dirty": None,
        "gpu": "NVIDIA H100 80GB HBM3",
        "driver": "580",
        "versions": {"vllm": "0.26.0"},
    }
    (tmp_path / "other.json").write_text(json.dumps({**host, "rows": []}))
    assert _result(tmp_path, *words, "--measured-on", str(tmp_path / "other.json")) == 0
    (folder,) = (tmp_path / "results").iterdir()
    assert "-h100-80gb-hbm3-" in folder.name
    written = json.loads((folder / "result.json").read_text())
    assert {field: written[field] for field in host} == host
    (tmp_path / "other.json").write_text(json.dumps({"gpu": "cpu", "commit": "abc", "dirty": None}))
    assert _result(tmp_path, *words, "--measured-on", str(tmp_path / "other.json")) == 2
    assert "other.json is no result: KeyError('driver')" in capsys.readouterr().err


def test_several_folders_are_one_and_the_last_counts(tmp_path, capsys, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        evaluation_engines, "plot_passkey", lambda rows, path: drawn.update({path.stem: list(rows)})
    )
    # the second has the length of the first with more questions, and in process one of its own
    process, server = [], []
    for part, answers, lengths in (("short", ["1"], (4096,)), ("all", ["1", "1"], (4096, 8192))):
        for place, folders in (("process", process), ("server", server)):
            for length in lengths if place == "process" else lengths[:1]:
                folder = tmp_path / f"{part}-{length}" / place
                folder.parent.mkdir(exist_ok=True)
                _evaluation(folder, answers, context_tokens=length)
                folders.append(str(folder))
    assert _result(tmp_path, "--process", *process, "--server", *server) == 0
    assert "2 and    2 of 2 right" in capsys.readouterr().out
    assert {
        stem: [(row["context_tokens"], row["total"]) for row in rows] for stem, rows in drawn.items()
    } == {
        "niah-process": [(4096, 2), (8192, 2)],
        "niah-server": [(4096, 2)],
    }


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"question": "where?"}, "--process and --server asked different questions"),
        ({"context_tokens": 8192}, "have no task and length in common"),
    ],
)
def test_what_cannot_be_compared_is_refused_and_leaves_nothing(tmp_path, capsys, other, message):
    words = [*_evaluation(tmp_path / "process", ["1"]), *_evaluation(tmp_path / "server", ["1"], **other)]
    assert _result(tmp_path, *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
