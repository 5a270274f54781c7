"""`ic-train judge`: the published format, and that calibration finds every planted bias and no other."""

import functools
import hashlib
import json
import random
import re
from pathlib import Path

import pytest
from openai_server import ScriptedServer

from ic_train import cli
from ic_train.evaluation.records import read_records
from ic_train.judge import grading, prometheus
from ic_train.judge.calibration import FAULTS, calibration_pairs, findings
from ic_train.judge.prometheus import RUBRIC_FIELDS, load_rubric, parse_choice, parse_score


def part(prompt: str, heading: str) -> str:
    """The text of one section of a prompt."""
    return re.search(rf"###{re.escape(heading)}:\n(.*?)\n\n###", prompt, re.DOTALL)[1]


def is_right(response: str, reference: str) -> bool:
    value = re.search(r"\d+", reference)
    return re.findall(r"\d+", response) == ([value[0]] if value else [])


class Judge:
    """An honest judge that compares with the reference; a bias replaces a part of it."""

    def __init__(self, bias: str = "") -> None:
        self.bias = bias

    def __call__(self, body: dict) -> str:
        prompt = body["messages"][-1]["content"]
        verdict = self.score(prompt) if "###Response to evaluate" in prompt else self.choice(prompt)
        if self.bias == "unparsable" and random.Random(prompt).random() < 0.2:
            return "I cannot decide."
        return f"Feedback: [RESULT] 1 is not my verdict. [RESULT] {verdict}"

    def score(self, prompt: str) -> int:
        response = part(prompt, "Response to evaluate")
        right = is_right(response, part(prompt, "Reference Answer (Score 5)"))
        if self.bias == "lenient":
            return 5
        if self.bias == "likes long scores":
            return (5 if len(response) > 100 else 4) if right else 1
        if self.bias == "guesses":
            return random.Random(prompt).randint(1, 5)
        return 5 if right else 1

    def choice(self, prompt: str) -> str:
        a, b = part(prompt, "Response A"), part(prompt, "Response B")
        reference = part(prompt, "Reference Answer")
        if self.bias == "first place":
            return "A"
        if self.bias == "second place":
            return "B"
        if self.bias == "likes long":
            return "A" if len(a) > len(b) else "B"
        if self.bias == "guesses":
            return random.Random(prompt).choice("AB")
        if is_right(a, reference) != is_right(b, reference):
            return "A" if is_right(a, reference) else "B"
        if self.bias == "likes long if equal":
            return "A" if len(a) > len(b) else "B"
        if self.bias == "likes short if equal":
            return "A" if len(a) < len(b) else "B"
        return random.Random(prompt).choice("AB")


BIASES = {
    "": set(),
    "first place": {"agreement of comparisons", "flips", "preference for the first place"},
    "second place": {"agreement of comparisons", "flips", "preference for the first place"},
    "likes long": {"agreement of comparisons", "preference for the longer in comparisons"},
    "likes long if equal": {"preference for the longer in comparisons"},
    "likes short if equal": {"preference for the longer in comparisons"},
    "likes long scores": {"preference for the longer in scores"},
    "lenient": {"agreement of scores", "lenient"},
    "guesses": {"agreement of comparisons", "agreement of scores", "flips", "lenient"},
}


@functools.cache
def asked(seed: int) -> tuple[list, list]:
    """Pairs, and all that a judge is asked about them."""
    judge = grading.Judge(client=None, model="", rubric=load_rubric(None), max_tokens=1, concurrency=1)
    pairs = calibration_pairs(100, seed)
    return pairs, [request for pair in pairs for request in pair.requests(judge)]


def failures(bias: str, seed: int = 1000) -> set[str]:
    """What calibration says of a judge that is asked without a server."""
    judge, (pairs, requests) = Judge(bias), asked(seed)
    judgements = {
        request.id: {"verdict": request.parse(judge({"messages": request.messages}))} for request in requests
    }
    return {finding.name for finding in findings(pairs, judgements) if not finding.passed}


# the others, and these once more, without a server below
@pytest.mark.parametrize("bias", ["", "likes long if equal"])
def test_calibration_finds_the_planted_bias_and_no_other(tmp_path: Path, bias: str) -> None:
    with ScriptedServer(Judge(bias)) as server:
        status = cli.main(["judge", "calibrate", "--server", server.url, "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "report.json").read_text())["rows"]
    failed = {finding["name"] for finding in row["findings"] if not finding["passed"]}
    assert failed == BIASES[bias]
    assert status == (3 if failed else 0)
    assert row["passed"] == (not failed)
    table = (tmp_path / "report.md").read_text()
    assert table.count("FAILED") == len(failed)
    if not bias:
        assert row["agreement_by_fault"] == {fault: [20, 20] for fault in FAULTS}
    assert {body["temperature"] for body in server.requests} == {0}
    assert len(server.requests) == 800


@pytest.mark.parametrize("bias", BIASES)
def test_calibration_does_so_whatever_the_pairs(bias: str) -> None:
    # a judge that tosses a coin between equals strays by chance: at most one in twenty may fail for it
    verdicts = [failures(bias, seed) for seed in range(20)]
    assert all(BIASES[bias] <= failed for failed in verdicts), verdicts
    assert sum(failed != BIASES[bias] for failed in verdicts) <= 1, verdicts


def test_calibration_finds_a_judge_without_verdicts(tmp_path: Path) -> None:
    with ScriptedServer(Judge("unparsable")) as server:
        assert cli.main(["judge", "calibrate", "--server", server.url, "--out", str(tmp_path)]) == 3
    (row,) = json.loads((tmp_path / "report.json").read_text())["rows"]
    found = {finding["name"]: finding for finding in row["findings"]}
    judgements = read_records(tmp_path / "judgements.jsonl")
    without = sum(one["verdict"] is None for one in judgements.values())
    assert without > 100
    assert (found["unparsable"]["count"], found["unparsable"]["total"]) == (without, 800)
    assert not found["unparsable"]["passed"]
    # they count against agreement instead of dropping out of it
    assert found["agreement of comparisons"]["total"] == found["agreement of scores"]["total"] == 100
    assert not found["agreement of comparisons"]["passed"]
    assert found["flips"]["total"] < 100


def test_calibration_pairs_are_what_they_claim() -> None:
    pairs = calibration_pairs(100, 7)
    assert len({pair.case.id for pair in pairs}) == 200
    known = [pair for pair in pairs if pair.fault]
    assert {fault: sum(pair.fault == fault for pair in known) for fault in FAULTS} == dict.fromkeys(
        FAULTS, 20
    )
    for pair in pairs:
        assert is_right(pair.first, pair.case.reference)
        assert is_right(pair.second, pair.case.reference) == (pair.fault is None)
        value = re.search(r"\d+", pair.case.reference)
        assert (value is None) == (pair.fault == "not absent")
        assert value is None or value[0] in pair.case.quote
    longer = [len(pair.second) > len(pair.first) for pair in known]
    assert sum(longer) == 50
    assert calibration_pairs(100, 7) == pairs != calibration_pairs(100, 8)


def test_the_prompts_are_those_that_prometheus_was_trained_on() -> None:
    # of prometheus-eval 0.1.20: ABSOLUTE_PROMPT, RELATIVE_PROMPT, ABS_SYSTEM_PROMPT, REL_SYSTEM_PROMPT
    names = ("_ABSOLUTE", "_RELATIVE", "_ABSOLUTE_SYSTEM", "_RELATIVE_SYSTEM")
    assert [hashlib.sha256(getattr(prometheus, name).encode()).hexdigest() for name in names] == [
        "edf9508ea2ca3c4f624938634990e8df0e89dba337b3e15311166ff2e3c6c67a",
        "16909d49a4da133a8aa80076b4dc4b9ca3ab402146fff41081c4b56b0e72ee29",
        "526b5b77a2d7eeaf33b21720197b6be536710d867d22cb468b0fb8f6022b62ab",
        "2d7f53af02b6a37c5701ed6a821289874a82615c0a6af9d181dc465b2fb5df20",
    ]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Good. [RESULT] 4", 4),
        ("[RESULT] 1 would be harsh. [RESULT] 5", 5),
        ("fine [RESULT] (3)", 3),
        ("fine [result]: 2.", 2),
        ("Score: 3/5", 3),
        ("so the overall score of 4 out of 5", 4),
        ("[SCORE] 2\n", 2),
        ("[RESULT: 3]", 3),
        ("[RESULT] 7", None),
        ("[RESULT] 0", None),
        ("[RESULT] 45", None),
        ("[RESULT] 4 because", None),
        ("an integer number between 1 and 5", None),
        ("I give it 4", None),
        ("[RESULT] A", None),
        ("", None),
    ],
)
def test_scores_are_read(text: str, score: int | None) -> None:
    assert parse_score(text) == score


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("[RESULT] A", "A"),
        ("[RESULT] A is wrong, so [RESULT] B", "B"),
        ("[RESULT] Response B.", "B"),
        ("[Result: a]", "A"),
        ("[RESULT] A or B", None),
        ("[RESULT] Both", None),
        ("Response A is better", None),
        ("[RESULT] 4", None),
    ],
)
def test_choices_are_read(text: str, choice: str | None) -> None:
    assert parse_choice(text) == choice


def write_answers(path: Path, right: list[bool], **fields) -> Path:
    """Answers as `ic-train evaluate` writes them."""
    with path.open("w") as file:
        for number, correct in enumerate(right):
            value = str(10_000 + number)
            record = {
                "id": f"niah-{number}",
                "task": "niah",
                "question": f"What is the pass key for key{chr(65 + number)}?",
                "reference": value,
                "answer": value if correct else "99",
                "quote": f"The pass key is {value}.",
                "correct": correct,
            }
            file.write(json.dumps({**record, **fields}) + "\n")
    return path


def test_answers_are_scored_against_their_reference(tmp_path: Path) -> None:
    answers = write_answers(tmp_path / "answers.jsonl", [True] * 6 + [False] * 2)
    with answers.open("a") as file:
        file.write('{"id": "perplexity-0", "task": "perplexity"}\n')
    with ScriptedServer(Judge()) as server:
        words = ["judge", str(answers), "--server", server.url, "--out", str(tmp_path / "judged")]
        assert cli.main([*words, "--concurrency", "2"]) == 0
        assert cli.main(words) == 0
    assert len(server.requests) == 8
    assert server.most_at_once <= 2
    (row,) = json.loads((tmp_path / "judged" / "report.json").read_text())["rows"]
    assert row["scores"] == {"1": 2, "2": 0, "3": 0, "4": 0, "5": 6}
    assert (row["mean"], row["good"], row["total"], row["unparsable"]) == (4.0, 6, 8, 0)
    assert (row["exact_agreed"], row["exact_total"]) == (8, 8)
    table = (tmp_path / "judged" / "report.md").read_text()
    assert "not calibrated" in table
    assert "| score 4 or 5 | 6/8 |" in table
    prompt = server.requests[0]["messages"][-1]["content"]
    assert "Input (quoted from the document):\nThe pass key is 1000" in prompt
    assert "###Reference Answer (Score 5):\n1000" in prompt


def test_unparsable_scores_are_counted(tmp_path: Path) -> None:
    answers = write_answers(tmp_path / "answers.jsonl", [True] * 4)
    with ScriptedServer(
        lambda body: "no idea" if "keyA" in body["messages"][-1]["content"] else "[RESULT] 5"
    ) as server:
        assert (
            cli.main(["judge", str(answers), "--server", server.url, "--out", str(tmp_path / "judged")]) == 0
        )
    (row,) = json.loads((tmp_path / "judged" / "report.json").read_text())["rows"]
    assert (row["unparsable"], row["good"], row["total"], row["mean"]) == (1, 3, 4, 5.0)
    assert (row["exact_agreed"], row["exact_total"]) == (3, 4)
    assert "| unparsable | 1/4 |" in (tmp_path / "judged" / "report.md").read_text()
    texts = [one["text"] for one in read_records(tmp_path / "judged" / "judgements.jsonl").values()]
    assert texts.count("no idea") == 1


def test_pairs_are_judged_in_both_orders_and_a_flip_is_a_tie(tmp_path: Path) -> None:
    first = write_answers(tmp_path / "a.jsonl", [True, True, True, False, False, True])
    second = write_answers(tmp_path / "b.jsonl", [False, False, True, True, False, True])

    def judge(body):
        prompt = body["messages"][-1]["content"]
        reference = part(prompt, "Reference Answer")
        right = [is_right(part(prompt, f"Response {place}"), reference) for place in "AB"]
        if "keyF" in prompt:
            return "no verdict"
        # of equals, always the first place
        return f"[RESULT] {'B' if right == [False, True] else 'A'}"

    with ScriptedServer(judge) as server:
        words = ["judge", str(first), "--against", str(second), "--server", server.url]
        assert cli.main([*words, "--out", str(tmp_path / "judged")]) == 0
    assert len(server.requests) == 12
    (row,) = json.loads((tmp_path / "judged" / "report.json").read_text())["rows"]
    assert {name: row[name] for name in ("first", "second", "flip", "unparsable", "total")} == {
        "first": 2,
        "second": 1,
        "flip": 2,
        "unparsable": 1,
        "total": 6,
    }


def test_a_judge_that_dies_half_way_is_asked_for_the_rest_only(tmp_path: Path) -> None:
    answers = write_answers(tmp_path / "answers.jsonl", [True] * 9)
    words = ["judge", str(answers), "--out", str(tmp_path / "judged"), "--retries", "0", "--concurrency", "2"]
    with ScriptedServer(Judge(), lambda number: "hang up" if number >= 4 else None) as server:
        assert cli.main([*words, "--server", server.url]) == 1
    assert not (tmp_path / "judged" / "report.json").exists()
    with ScriptedServer(Judge()) as again:
        assert cli.main([*words, "--server", again.url]) == 0
    assert (len(server.answered), len(again.requests)) == (4, 5)


def test_a_calibration_is_reported_with_its_judges_verdicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = write_answers(tmp_path / "answers.jsonl", [True] * 3)
    calibration = ["--calibration", str(tmp_path / "calibrated")]
    with ScriptedServer(Judge("lenient")) as server:
        shared = ["--server", server.url, "--out"]
        words = ["judge", str(answers), *shared, str(tmp_path / "judged"), *calibration]
        assert cli.main(words) == 2
        assert "has no report.json" in capsys.readouterr().err
        assert cli.main(["judge", "calibrate", *shared, str(tmp_path / "calibrated"), "--pairs", "20"]) == 3
        assert cli.main(words) == 0
    assert "Judge scripted, calibration FAILED." in (tmp_path / "judged" / "report.md").read_text()
    with ScriptedServer(Judge(), id="another") as server:
        assert (
            cli.main(
                ["judge", str(answers), "--server", server.url, "--out", str(tmp_path / "c"), *calibration]
            )
            == 2
        )
    assert (
        "--calibration is of 'scripted'; it must be the calibration of 'another'" in capsys.readouterr().err
    )


def test_answers_with_missing_ids_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_answers(tmp_path / "a.jsonl", [True] * 5)
    second = write_answers(tmp_path / "b.jsonl", [True] * 3)
    with ScriptedServer(Judge()) as server:
        for one, other in ((first, second), (second, first)):
            words = ["judge", str(one), "--against", str(other), "--server", server.url]
            assert cli.main([*words, "--out", str(tmp_path / "judged")]) == 2
            assert f"{second} lacks 2 answers: niah-3, niah-4; " in capsys.readouterr().err
        other = write_answers(tmp_path / "c.jsonl", [True] * 5, quote="another passage")
        words = ["judge", str(first), "--against", str(other), "--server", server.url]
        assert cli.main([*words, "--out", str(tmp_path / "judged")]) == 2
        assert "niah-0 is another question in" in capsys.readouterr().err
    assert server.requests == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"quote": "long " * 2000},
            "the quote of niah-0 has 10000 characters; a judge reads passages of at most 8000",
        ),
        ({"reference": None}, "niah-0 has reference None; a judge needs it as text"),
        ({"answer": 5}, "niah-0 has answer 5; a judge needs it as text"),
        ({"task": "perplexity"}, "has no answers"),
    ],
)
def test_what_no_judge_may_see_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fields, message
) -> None:
    answers = write_answers(tmp_path / "a.jsonl", [True], **fields)
    assert (
        cli.main(["judge", str(answers), "--server", "http://127.0.0.1:9", "--out", str(tmp_path / "j")]) == 2
    )
    assert message in capsys.readouterr().err


def test_rubrics(tmp_path: Path) -> None:
    assert tuple(load_rubric(None)) == RUBRIC_FIELDS
    path = tmp_path / "rubric.yaml"
    path.write_text("\n".join(f"{name}: text of {name}" for name in RUBRIC_FIELDS))
    answers = write_answers(tmp_path / "a.jsonl", [True])
    with ScriptedServer(Judge()) as server:
        words = [
            "judge",
            str(answers),
            "--server",
            server.url,
            "--out",
            str(tmp_path / "judged"),
            "--rubric",
            str(path),
        ]
        assert cli.main(words) == 0
    assert server.requests[0]["messages"][-1]["content"].endswith(
        "###Score Rubrics:\n[text of criteria]\n"
        + "\n".join(f"Score {n}: text of score{n}" for n in range(1, 6))
        + "\n\n###Feedback: "
    )
    path.write_text("criteria: x\nscore1: y\n")
    with pytest.raises(ValueError, match="has criteria, score1; it must have criteria, score1, score2"):
        load_rubric(path)
    with pytest.raises(ValueError, match="does not exist"):
        load_rubric(tmp_path / "none.yaml")
