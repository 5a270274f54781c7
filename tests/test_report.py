"""Tables in documents are what bench/results says."""

import json

import pytest

from bench.report import NO_ROWS, ROOT, load_rows, render, stale_documents

ROW = {
    "model": "ic-nano", "engine": "transformers", "kv_dtype": "bfloat16", "task": "passkey",
    "context_tokens": 131072, "correct": 255, "total": 256,
}  # fmt: skip
RESULT = {
    "topic": "passkey",
    "command": "x",
    "commit": "0" * 40,
    "gpu": "H100",
    "versions": {},
    "rows": [ROW],
}


def _write(results, name, result):
    (results / name).mkdir(parents=True)
    (results / name / "result.json").write_text(json.dumps(result))


def test_no_document_is_out_of_date():
    assert stale_documents() == [], "run `hatch run report`"


def test_every_committed_result_loads():
    rows = load_rows(ROOT / "bench" / "results")
    assert rows
    assert all(
        0 <= row["correct"] <= row["total"] == len(row["samples"])
        for row in rows
        if row.get("task") == "passkey"
    )


def test_table(tmp_path):
    results = tmp_path / "bench" / "results"
    _write(results, "20260101-h100-passkey", RESULT | {"rows": [ROW | {"correct": 1}]})
    _write(
        results, "20260102-h100-passkey", RESULT | {"rows": [ROW, ROW | {"model": "other"}, {"op": "rope"}]}
    )
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- results:retrieval model=ic-nano -->\nold\n<!-- /results -->\nafter\n")
    assert stale_documents(tmp_path) == [document]
    assert stale_documents(tmp_path, write=True) == [document]
    assert stale_documents(tmp_path) == []
    text = document.read_text()
    assert text.startswith("before\n<!-- results:retrieval model=ic-nano -->\n| model ")
    assert text.endswith("\n<!-- /results -->\nafter\n")
    (line,) = [line for line in text.splitlines() if "20260102" in line]
    assert "| ic-nano | 131,072 | 255 of 256 | 99.6% (97.8% to 99.9%) |" in line
    assert "20260101" not in text, "an older measurement of the same"
    assert "other" not in text


def test_without_rows():
    text = "<!-- results:retrieval -->\n<!-- /results -->\n"
    assert NO_ROWS in render(text, [], "README.md")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- results:speed -->\n<!-- /results -->\n", "README.md has a table 'speed'; it must be one of"),
        ("<!-- results:retrieval -->\n", "README.md has a results mark that is malformed"),
    ],
)
def test_bad_marks(text, message):
    with pytest.raises(ValueError, match=message):
        render(text, [], "README.md")


def test_a_file_that_is_no_result(tmp_path):
    _write(tmp_path, "20260101-h100-passkey", {"topic": "passkey", "rows": []})
    with pytest.raises(ValueError, match="is no result: it has no command, commit, gpu, versions"):
        load_rows(tmp_path)
