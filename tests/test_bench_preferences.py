"""Two evaluations become one result, and its table."""

import hashlib
import json

import pytest

from bench.cases import preferences
from bench.report import load_rows, preferences_table

IDENTITY = {"objective": "dpo", "training_pairs": 8, "pairs_per_step": 4}
RECORD = {"identity": IDENTITY, "longest_pair_tokens": 1000, "wall_s": 3.0, "commit": "c"}


def _evaluation(folder, right, question="who?"):
    samples = [
        {"id": f"absent-{number}", "question": question, "reference": "", "correct": one}
        for number, one in enumerate(right)
    ]
    row = {"model": "m", "engine": "e", "kv_dtype": "float32", "task": "absent", "context_tokens": 4096}
    row |= {"correct": sum(right), "total": len(right), "samples": samples}
    other = row | {"context_tokens": 8192} if folder.name == "before" else row | {"task": "niah"}
    read = {"task": "perplexity", "context_tokens": 512, "from_tokens": 0, "to_tokens": 512}
    read |= {"perplexity": 2.0 + len(question), "low": 1.5, "high": 9.0}
    read |= {name: row[name] for name in ("model", "engine", "kv_dtype")}
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps({"rows": [row, other, read]}))
    return [f"--{folder.name}", str(folder)]


@pytest.fixture
def trained(tmp_path):
    (tmp_path / "training.json").write_text(json.dumps(RECORD))
    return ["--training", str(tmp_path), "--results", str(tmp_path / "results")]


def test_right_answers_are_counted_question_by_question(tmp_path, trained, capsys):
    words = [
        *_evaluation(tmp_path / "before", [True, False, False, False]),
        *_evaluation(tmp_path / "after", [False, True, True, False]),
    ]
    assert preferences.main([*words, *trained]) == 0
    assert "1 ->    2 of 4" in capsys.readouterr().out
    row, read = load_rows(tmp_path / "results")
    assert next((tmp_path / "results").glob("*/preferences.png")).stat().st_size > 10_000
    assert (row["asked"], row["right_before"], row["right_after"]) == (4, 1, 2)
    assert (row["only_before"], row["only_after"]) == (1, 2)
    assert (row["verdicts_before"], row["verdicts_after"]) == ("1000", "0110")
    asked = json.dumps([[f"absent-{number}", "who?", ""] for number in range(4)])
    assert row["questions_sha256"] == hashlib.sha256(asked.encode()).hexdigest()
    assert (row["objective"], row["longest_pair_tokens"]) == ("dpo", 1000)
    assert (row["training_commit"], read["perplexity_after"]) == ("c", 6.0)
    table = preferences_table([row, read]).splitlines()
    assert len(table) == 4
    assert "| perplexity, tokens 0 to 512 | 512 | 6.00 [1.50, 9.00] | 6.00 [1.50, 9.00] |" in table[3]
    # by hand: 1/4 and 2/4 with their Wilson intervals [0.0456, 0.6994] and [0.1500, 0.8500], phi -2 / sqrt(12)
    assert "| 1 of 4 | 2 of 4 | +25.0% [-46.1%, +74.7%] | 1, 2 |" in table[2]


def test_other_questions_are_refused(tmp_path, trained, capsys):
    words = [
        *_evaluation(tmp_path / "before", [True]),
        *_evaluation(tmp_path / "after", [True], question="where?"),
    ]
    assert preferences.main([*words, *trained]) == 2
    assert "--before and --after asked different questions (1 and 1 questions, 0 the same)" in (
        capsys.readouterr().err
    )


def test_shares_are_not_taken_for_right_answers(tmp_path, trained, capsys):
    words = [*_evaluation(tmp_path / "before", [0.25, 1.0]), *_evaluation(tmp_path / "after", [1.0, 1.0])]
    assert preferences.main([*words, *trained]) == 2
    error = capsys.readouterr().err
    assert "absent at 4096 tokens: --before and --after need the answer to every question" in error
    assert "scored by the share of their parts" in error
    assert not (tmp_path / "results").exists()


def test_a_folder_without_a_record_is_refused(tmp_path, capsys):
    words = [*_evaluation(tmp_path / "before", [True]), *_evaluation(tmp_path / "after", [True])]
    assert preferences.main([*words, "--training", str(tmp_path)]) == 2
    assert "has no training.json" in capsys.readouterr().err
