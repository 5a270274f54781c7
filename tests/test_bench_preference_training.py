"""From pairs to the table of what preference training did: real pairs, training and evaluation, of few of each."""

import argparse

import pytest

from bench.cases import preference_training
from bench.cases.preference_training import _Step, _together, choose
from bench.report import load_rows

STEPS = {"fine": ["timeit", "--help"], "wrong": ["timeit", "--nonsense"]}


def test_the_run_with_most_right_answers_that_kept_the_text_is_chosen():
    runs = [
        {"right_after": 5, "perplexity_ratio": 1.0},
        {"right_after": 9, "perplexity_ratio": 1.05},
        {"right_after": 20, "perplexity_ratio": 1.3},
    ]
    assert choose(runs, 1.1) == 1
    assert choose(runs, 1.5) == 2
    assert choose(runs[1:], 1.0) == 0


def test_steps_beside_each_other_have_logs_and_one_that_fails_is_named(tmp_path):
    fine, wrong = (_Step(name, tmp_path / "logs" / f"{name}.log", words) for name, words in STEPS.items())
    with pytest.raises(ValueError, match=rf"wrong failed with status 2; what it said is in {wrong.log}"):
        _together(argparse.Namespace(at_once=2), [wrong, fine])
    assert "nonsense" in wrong.log.read_text()
    assert "usage" in fine.log.read_text(), "it was ended with the other"


def test_pairs_training_and_evaluations_become_one_result(tmp_path, capfd):
    few = (
        "--pairs 1 --pair-lengths 1k --short-tokens 900 --kinds corrections,absent --lengths 1k --questions 2"
    )
    few += " --screen-questions 1 --keys-per-context 2 --dtype float32 --device cpu --most-perplexity 100"
    words = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results"), *few.split()]
    words += ["--flags", "--max_steps 1 --save_strategy no"]
    assert preference_training.main(words) == 0
    rows = load_rows(tmp_path / "results")
    assert {row["task"] for row in rows} == {"niah", "distractors", "corrections", "absent", "perplexity"}
    assert all(row["asked"] == 2 for row in rows if row["task"] != "perplexity")
    assert next((tmp_path / "results").glob("*/preferences.png")).stat().st_size > 10_000
    (screened,) = rows[0]["screened"]
    assert screened["flags"] == rows[0]["training_flags"] == "--max_steps 1 --save_strategy no"
    assert screened["perplexity_ratio"] > 0
    # other flags are another run, beside the one that is there; one that fails ends the case
    capfd.readouterr()
    assert preference_training.main([*words, "--flags", "--objective other"]) == 2
    said = capfd.readouterr()
    assert said.out.count("there already") == 1
    assert "training with '--objective other' failed with status 1" in said.err
    assert len(load_rows(tmp_path / "results")) == len(rows)
    # pairs of other settings are not taken for these
    assert preference_training.main([*words, "--pairs", "2"]) == 2
    assert "holds a run with pairs" in capfd.readouterr().err
