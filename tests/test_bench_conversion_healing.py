"""The command from texts to healed conversions, on a small source: its own steps, and that it goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from converted_models import source_folder, text_file

from bench.cases import conversion_healing

ROOT = Path(__file__).parents[1]
TRAIN_TESTS = ROOT / "packages" / "ic-train" / "tests"
SIZES = "--calibration-samples 8 --calibration-tokens 64 --evaluation-samples 2 --evaluation-tokens 64"
PASSKEYS = "--passkey-tokens 384 --passkey-contexts 1 --passkey-stages healed"


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    texts = tmp_path / "texts"
    texts.mkdir()
    packages = ["linux-doc-6.12", "git-doc", "jargon-text"]
    for name in packages:
        (texts / f"{name}.txt").write_text(Path(text_file()).read_text())
    (texts / "sources.json").write_text(json.dumps([{"package": name} for name in packages]))
    source = source_folder(tmp_path / "source")
    own = [
        str(source),
        str(texts),
        str(tmp_path / "work"),
        "--pairs",
        "20:8",
        "--questions",
        "0",
        "--chat",
        "",
    ]
    own += ["--recipe", str(TRAIN_TESTS / "recipes" / "heal.yaml"), "--results", str(tmp_path / "results")]
    return [*own, "--", "--device", "cpu", *SIZES.split(), *PASSKEYS.split(), "--heal-seconds", "60"]


def test_every_step_runs_once(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert conversion_healing.main(arguments) == 0
    (folder,) = (tmp_path / "results").iterdir()
    rows = json.loads((folder / "result.json").read_text())["rows"]
    stages = [row["stage"] for row in rows if "stage" in row]
    assert (stages[0], stages[-2:]) == ("source", ["converted", "healed"])
    work = tmp_path / "work"
    sources = json.loads((work / "documents" / "corpus.json").read_text())["sources"]
    assert [Path(one["path"]).stem for one in sources] == ["linux-doc-6.12", "git-doc"]
    assert sources[0]["licence"] == "GPL-2.0-only"
    capsys.readouterr()
    # again, with a chat of a model that is not healed: what is there stays
    made = (work / "models" / "20-8-healed" / "training.json").stat().st_mtime
    assert conversion_healing.main([word or "12:8" for word in arguments]) == 2
    said = capsys.readouterr()
    assert "12-8-healed was not healed: --chat is '12:8'" in said.err
    assert not any(f"{step}: -m" in said.out for step in ("first", "documents")), "it was done again"
    assert (work / "models" / "20-8-healed" / "training.json").stat().st_mtime == made


def test_a_step_that_fails_is_named_with_its_log(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["20-8" if word == "20:8" else word for word in arguments]
    # the step before is not what fails
    (tmp_path / "work" / "documents").mkdir(parents=True)
    assert conversion_healing.main(wrong) == 2
    said = capsys.readouterr().err
    assert "first failed with status 2: error: --pairs has '20-8'" in said
    assert str(tmp_path / "work" / "first.log") in said


def test_texts_of_another_kind_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert conversion_healing.main([sys.prefix, str(tmp_path), str(tmp_path / "work")]) == 2
    assert f"`python -m bench.cases.healing_texts {tmp_path}` makes it" in capsys.readouterr().err


def test_requests_that_failed_are_counted(tmp_path: Path) -> None:
    rows = [
        {"custom_id": "0", "response": {"status_code": 200, "body": {}}},
        {"custom_id": "1", "response": {"status_code": 500, "body": None}, "error": {}},
        {"custom_id": "2", "response": None},
    ]
    batch = tmp_path / "batch.jsonl"
    batch.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert conversion_healing.unanswered(batch) == 2
