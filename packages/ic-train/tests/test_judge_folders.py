"""What a folder of judgements is good for later: more answers, other answers, another way of asking."""

import hashlib
import json
from pathlib import Path

import pytest
from openai_server import ScriptedServer
from test_judge import Judge, write_answers

from ic_train import cli
from ic_train.evaluation.records import read_records
from ic_train.judge.prometheus import RUBRIC_FIELDS, merged

ROLES = b'{"error": {"message": "Conversation roles must alternate user/assistant/user/assistant/..."}}'


def judge(answers: Path, server: ScriptedServer, out: Path, *arguments: str) -> int:
    return cli.main(["judge", str(answers), "--server", server.url, "--out", str(out), *arguments])


def row_of(folder: Path) -> dict:
    (row,) = json.loads((folder / "report.json").read_text())["rows"]
    return row


@pytest.mark.parametrize("pairs", [False, True])
def test_answers_may_be_added_and_not_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pairs: bool
) -> None:
    answers, out = tmp_path / "answers.jsonl", tmp_path / "judged"
    against = ["--against", str(answers)] if pairs else []
    with ScriptedServer(Judge()) as server:
        for right, asked in (([True] * 3, 3), ([True] * 5, 5)):
            write_answers(answers, right)
            assert judge(answers, server, out, *against) == 0
            assert len(server.requests) == asked * (1 + pairs)
            assert row_of(out)["total"] == asked
        kept = (out / "judgements.jsonl").read_bytes()
        write_answers(answers, [True, False, True, True, True])
        assert judge(answers, server, out, *against) == 2
        assert "has a judgement of niah-1" in capsys.readouterr().err
        # another question under the same id
        write_answers(answers, [True] * 5, quote="another passage")
        assert judge(answers, server, out, *against) == 2
        error = capsys.readouterr().err
        assert "has a judgement of niah-0" in error
        assert "whose question, reference, answer or quote was another then; move the folder away" in error
        assert len(server.requests) == 5 * (1 + pairs)
    assert (out / "judgements.jsonl").read_bytes() == kept


def test_scores_and_pairs_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = write_answers(tmp_path / "answers.jsonl", [True] * 2)
    with ScriptedServer(Judge()) as server:
        assert judge(answers, server, tmp_path / "judged") == 0
        assert judge(answers, server, tmp_path / "judged", "--against", str(answers)) == 2
    assert "holds a run with kind 'absolute', this one has 'pairs'" in capsys.readouterr().err


def test_a_folder_of_an_earlier_version_goes_on_with_the_same_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, out = write_answers(tmp_path / "answers.jsonl", [True] * 3), tmp_path / "judged"
    with ScriptedServer(Judge()) as server:
        assert judge(answers, server, out) == 0
        settings = json.loads((out / "run.json").read_text())
        del settings["kind"]
        settings |= {"answers": hashlib.sha256(answers.read_bytes()).hexdigest(), "against": None}
        (out / "run.json").write_text(json.dumps(settings))
        records = read_records(out / "judgements.jsonl").values()
        lines = [json.dumps({name: one[name] for name in ("id", "verdict", "text")}) for one in records]
        # one that is still missing
        (out / "judgements.jsonl").write_text("".join(f"{line}\n" for line in lines[:2]))
        assert judge(answers, server, out) == 0
        assert len(server.requests) == 4
        write_answers(answers, [True] * 4)
        assert judge(answers, server, out) == 2
    assert "judged holds a run with answers '" in capsys.readouterr().err


def refuses_system(body: dict) -> bool:
    return body["messages"][0]["role"] == "system"


class NoSystem(ScriptedServer):
    """As vLLM with Mistral's first template: a system's message is answered with 400."""

    def __init__(self) -> None:
        super().__init__(
            Judge(), lambda number: (400, ROLES) if refuses_system(self.requests[number]) else None
        )


def test_a_template_without_a_system_gets_its_text_with_the_users(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, out = write_answers(tmp_path / "answers.jsonl", [True] * 3), tmp_path / "judged"
    with NoSystem() as server:
        assert judge(answers, server, out) == 0
        # one try with a message of the system's, whatever the number of requests at a time
        assert len(server.requests) == 4
        separate, joined = server.requests[:2]
        assert joined["messages"] == merged(separate["messages"])
        system, user = (message["content"] for message in separate["messages"])
        assert joined["messages"][0]["content"] == f"{system}\n\n{user}"
        assert capsys.readouterr().err.count("The system's text is sent with the user's from here on.") == 1
        assert row_of(out)["system"] == "merged"
        assert "The system's text was sent with the user's." in (out / "report.md").read_text()
    # what is added later is asked in the same way, also of a server that would take the other
    write_answers(answers, [True] * 5)
    with ScriptedServer(Judge()) as server:
        assert judge(answers, server, out) == 0
        assert [len(body["messages"]) for body in server.requests] == [1, 1]
    assert row_of(out)["system"] == "merged"


def test_judgements_with_a_message_of_the_systems_are_not_mixed_with_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, out = write_answers(tmp_path / "answers.jsonl", [True] * 3), tmp_path / "judged"
    with ScriptedServer(Judge()) as server:
        assert judge(answers, server, out) == 0
    assert row_of(out)["system"] == "separate"
    write_answers(answers, [True] * 5)
    with NoSystem() as server:
        assert judge(answers, server, out) == 1
    error = capsys.readouterr().err
    assert "answered 400: " in error
    assert "Conversation roles must alternate" in error
    assert len(read_records(out / "judgements.jsonl")) == 3


def test_a_judge_is_asked_as_it_was_calibrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers, calibrated = write_answers(tmp_path / "answers.jsonl", [True] * 3), tmp_path / "calibrated"
    rubric = tmp_path / "rubric.yaml"
    rubric.write_text("\n".join(f"{name}: text of {name}" for name in RUBRIC_FIELDS))
    relies = ["--calibration", str(calibrated)]
    with NoSystem() as server:
        calibrate = ["judge", "calibrate", "--server", server.url, "--out", str(calibrated), "--pairs", "20"]
        # too few pairs to show anything
        assert cli.main(calibrate) == 3
        asked = len(server.requests)
        for other, message in (
            (["--rubric", str(rubric)], "was made with rubric {'criteria'"),
            (["--max-tokens", "7"], "was made with max_tokens 1024, this judge has 7"),
        ):
            assert judge(answers, server, tmp_path / "other", *relies, *other) == 2
            assert message in capsys.readouterr().err
        (calibrated / "run.json").rename(tmp_path / "run.json")
        assert judge(answers, server, tmp_path / "other", *relies) == 2
        assert f"--calibration is {str(calibrated)!r}, which has no run.json" in capsys.readouterr().err
        (tmp_path / "run.json").rename(calibrated / "run.json")
        # before anything is asked
        assert len(server.requests) == asked
        assert not (tmp_path / "other").exists()
    with ScriptedServer(Judge()) as server:
        assert judge(answers, server, tmp_path / "judged", *relies) == 0
        assert {len(body["messages"]) for body in server.requests} == {1}
        assert judge(answers, server, tmp_path / "separate") == 0
        assert judge(answers, server, tmp_path / "separate", *relies) == 2
        # a report of judgements is no calibration
        assert judge(answers, server, tmp_path / "other", "--calibration", str(tmp_path / "judged")) == 2
    error = capsys.readouterr().err
    assert "has judgements with the system's text separate, --calibration" in error
    assert "which holds absolute; it must be --out of `ic-train judge calibrate`" in error
    row = row_of(tmp_path / "judged")
    assert (row["calibrated"], row["system"], row_of(calibrated)["system"]) == (False, "merged", "merged")
