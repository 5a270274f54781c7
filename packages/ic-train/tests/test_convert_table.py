"""`ic-train convert-table` on a small source: conversion, healing and pass keys of several sizes as one result."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from converted_models import source_folder, text_file
from transformers import AutoTokenizer

from ic_train import cli
from ic_train.convert.table import _Size, _Table
from ic_train.data.text import write_corpus

RECIPE = Path(__file__).parent / "recipes" / "heal.yaml"
SIZES = ("--calibration-samples", "8", "--calibration-tokens", "64", "--evaluation-samples", "2")


def command_of(root: Path, *more: str) -> list[str]:
    return [
        *("convert-table", str(root / "source"), str(root / "work"), "--pairs", "20:8", "12:8"),
        *("--results", str(root / "results"), "--device", "cpu", "--evaluation-tokens", "64", *SIZES, *more),
    ]


def result_of(root: Path, place: int) -> list[dict[str, object]]:
    folder = sorted((root / "results").iterdir(), key=lambda path: path.stat().st_mtime)[place]
    return json.loads((folder / "result.json").read_text())["rows"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("table")
    source = source_folder(root / "source")
    tokenizer = AutoTokenizer.from_pretrained(source)
    write_corpus(root / "corpus", [(text_file(), "public-domain")], tokenizer, tokenizer_name="bytes")
    return root


def test_each_size_is_converted_healed_at_its_rate_and_measured(root: Path) -> None:
    # as the shipped recipe, which is for a GPU
    (root / "heal.yaml").write_text(f"{RECIPE.read_text()}bf16: true\n")
    heal = (
        "--heal-config",
        str(root / "heal.yaml"),
        "--corpora",
        str(root / "corpus"),
        "--heal-seconds",
        "60",
    )
    rates = ("--heal-learning-rates", "0.002", "0.001")
    keys = ("--passkey-tokens", "384", "--passkey-contexts", "1")
    assert cli.main(command_of(root, *heal, *rates, *keys, "--at-once", "2")) == 0
    found = result_of(root, -1)
    asked = [row["model"] for row in found if row.get("task") == "passkey"]
    assert asked == ["source", "source 20+8", "source 20+8 healed", "source 12+8", "source 12+8 healed"]
    rows = {(row.get("kv_lora_rank"), row["stage"]): row for row in found if "stage" in row}
    source = rows[None, "source"]["perplexity"]
    assert rows[20, "converted"]["perplexity_vs_source"] != rows[12, "converted"]["perplexity_vs_source"]
    for rank, rate in ((20, 0.002), (12, 0.001)):
        healed = rows[rank, "healed"]
        assert healed["learning_rate"] == rate and healed["tokens"] > 0
        assert max(line["learning_rate"] for line in healed["loss_log"]) == pytest.approx(rate, rel=0.2)
        assert healed["perplexity_vs_source"] == pytest.approx(healed["perplexity"] / source)
    # what is there is not made again
    trained = (root / "work" / "20-8-healed" / "training.json").stat().st_mtime
    assert cli.main(command_of(root, *heal, *rates, *keys)) == 0
    assert (root / "work" / "20-8-healed" / "training.json").stat().st_mtime == trained
    assert len(result_of(root, -1)) == len(found)


def test_rows_stand_in_the_order_of_the_command(tmp_path: Path) -> None:
    first, second = _Size(20, 8, 60.0, None), _Size(12, 8, 60.0, None)
    table = _Table(tmp_path, 0, {None: [], first: [], second: []})
    counts = {"task": "passkey", "correct": 0, "total": 3, "context_tokens": 384}
    for name, size in (("12", second), ("source", None), ("20", first), ("12 healed", second)):
        table.add([{"model": name, **counts}], size)
    assert table.folder is not None
    rows = json.loads((table.folder / "result.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["source", "20", "12", "12 healed"]


def test_a_size_that_fails_is_named_with_its_log(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ("--passkey-tokens", "64", "--passkey-stages", "converted")
    assert cli.main(command_of(root, *keys, "--pairs", "16:8", "--at-once", "2")) == 2
    said = capsys.readouterr().err
    assert "16-8 failed with status 2: error: context_tokens is 64; 3 pass keys alone need" in said
    assert str(root / "work" / "16-8.log") in said


def test_what_the_others_measured_stays_when_a_size_fails(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "work" / "passkeys-14-8.json").write_text("{")
    keys = ("--passkey-tokens", "384", "--passkey-contexts", "1", "--passkey-stages", "converted")
    assert cli.main(command_of(root, *keys, "--pairs", "14:8", "16:8", "--at-once", "2")) == 2
    assert "14-8 failed with status 2" in capsys.readouterr().err
    rows = result_of(root, -1)
    assert {row.get("kv_lora_rank") for row in rows if row.get("stage") == "converted"} == {16}
    assert [row["model"] for row in rows if row.get("task") == "passkey"] == ["source 16+8"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--pairs", "20-8"), "--pairs has '20-8'; accepted: kv_lora_rank:qk_rope_head_dim"),
        (("--pairs", "20:8", "12:8", "20:8"), "--pairs has 20:8 12:8 20:8; each size once"),
        (("--heal-config", "heal.yaml"), "--corpora must say what to heal on"),
        (
            ("--heal-seconds", "5", "6", "7"),
            "--heal-seconds is .*one number above 0, or one for each of 2 pairs",
        ),
        (("--at-once", "0"), "--at-once is 0; it must be at least 1"),
        (("--heal-learning-rates", "0"), "--heal-learning-rates is .*one number above 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    root: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert cli.main(command_of(root, *more)) == 2
    assert re.search(message, capsys.readouterr().err)
