"""Text comes in an order that names alone decide, and its origin is recorded."""

from pathlib import Path

import pytest

from ic_train.data.corpus import load_corpus


def folder(root: Path) -> Path:
    for name in ("a/one.py", "b/two.md", "b/three.py", "b/picture.png", "site-packages/other.py"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    return root


def test_text_files_are_read_and_others_are_not(tmp_path: Path) -> None:
    text = load_corpus([str(folder(tmp_path))]).text.tobytes().decode()
    assert {line for line in text.splitlines() if line} == {"# a/one.py", "# b/two.md", "# b/three.py"}


def test_the_order_does_not_depend_on_where_or_when_files_were_written(tmp_path: Path) -> None:
    first, second = tmp_path / "first" / "root", tmp_path / "second" / "root"
    assert load_corpus([str(folder(first))]).sha256 == load_corpus([str(folder(second))]).sha256


def test_the_default_is_the_environments_own_packages() -> None:
    corpus = load_corpus(max_mb=1)
    assert {"python", "torch", "transformers"} <= set(corpus.sources)
    assert len(corpus.text) == 1_000_000
    assert len(corpus.sha256) == 64


def test_missing_paths_and_folders_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"corpus paths \['/no/such'\] do not exist"):
        load_corpus(["/no/such"])
    with pytest.raises(ValueError, match="no text found in"):
        load_corpus([str(tmp_path)])
