"""`ic-train data preferences`: what survives a kill and a full disk, and what is refused."""

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from openai_server import ScriptedServer
from preference_pairs import NANO, content, lines_of, make, scripted, words, write_haystack
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ic_train import cli
from ic_train.evaluation.haystack import load_haystack
from ic_train.preferences.haystack import load_training_text
from ic_train.preferences.store import Writer, load_preferences


@pytest.fixture(scope="module")
def haystack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_haystack(tmp_path_factory.mktemp("text"))


def test_the_same_settings_give_the_same_bytes_and_others_are_refused(
    tmp_path: Path, haystack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "one", haystack)
    make(tmp_path / "two", haystack)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    make(tmp_path / "other", haystack, "--seed", "2")
    ours, others = ({line["key"] for line in lines_of(tmp_path / name)} for name in ("one", "other"))
    assert not ours & others
    # whole already: nothing is written anew
    written = (tmp_path / "one" / "tokens.bin").stat().st_mtime_ns
    make(tmp_path / "one", haystack)
    assert (tmp_path / "one" / "tokens.bin").stat().st_mtime_ns == written
    assert cli.main(words(tmp_path / "one", haystack, "--pairs", "7")) == 2
    assert "holds a run with pairs_per_kind_and_length 6, this one has 7" in capsys.readouterr().err


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, haystack: Path) -> None:
    arguments = ["--pairs", "30", "--lengths", "4k"]
    make(tmp_path / "whole", haystack, *arguments)
    dies = f"""
import os, signal
from ic_train import cli
from ic_train.preferences.store import Writer
add, pairs = Writer.add_pair, []
def dies(writer, line):
    add(writer, line)
    pairs.append(line)
    if len(pairs) == 40:
        os.kill(os.getpid(), signal.SIGKILL)
Writer.add_pair = dies
cli.main({words(tmp_path / "killed", haystack, *arguments)!r})
"""
    killed = subprocess.run([sys.executable, "-c", dies], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    lines = tmp_path / "killed" / "pairs.jsonl"
    kept = lines.read_bytes()
    assert 30 <= kept.count(b"\n") <= 40
    with pytest.raises(
        ValueError, match="is not whole: the command that began it goes on; it has no preferences"
    ):
        load_preferences(tmp_path / "killed", 264)
    make(tmp_path / "killed", haystack, *arguments)
    assert lines.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


@pytest.mark.parametrize("kept_bytes", [0, 1, 5_000, 12_345, 30_000])
def test_wherever_a_run_ends_it_goes_on_to_the_same_bytes(
    tmp_path: Path, haystack: Path, kept_bytes: int
) -> None:
    make(tmp_path / "whole", haystack)
    make(tmp_path / "cut", haystack)
    lines = (tmp_path / "cut" / "pairs.jsonl").read_bytes()
    assert kept_bytes < len(lines)
    (tmp_path / "cut" / "pairs.jsonl").write_bytes(lines[:kept_bytes])
    (tmp_path / "cut" / "preferences.json").unlink()
    # tokens are written first, so that there may be more of them, and half of one
    with (tmp_path / "cut" / "tokens.bin").open("ab") as file:
        file.write(b"abc")
    make(tmp_path / "cut", haystack)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_a_full_disk_keeps_what_was_written(tmp_path: Path, haystack: Path) -> None:
    make(tmp_path / "whole", haystack)
    command = [sys.executable, "-m", "ic_train.cli", *words(tmp_path / "full", haystack)]

    def little_room() -> None:
        # what a full disk does to a write, for any file beyond this size
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    done = subprocess.run(command, preexec_fn=little_room, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "full cannot be written: " in done.stderr
    assert "the same command goes on from what is there" in done.stderr
    assert "Traceback" not in done.stderr
    kept = (tmp_path / "full" / "pairs.jsonl").read_bytes()
    assert 0 < kept.count(b"\n") < 30
    make(tmp_path / "full", haystack)
    assert (tmp_path / "full" / "pairs.jsonl").read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    assert content(tmp_path / "full") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--kinds", "single,hard"],
            "--kinds has 'hard'; accepted are single, multi, distractors, corrections, absent",
        ),
        (["--pairs", "0"], "--pairs is 0; it must be at least 1"),
        (["--pairs-per-context", "0"], "--pairs-per-context is 0; it must be at least 1"),
        (["--lengths", "100"], "--lengths has 100; this model takes from 512 on"),
        (["--lengths", "8q"], "--lengths has '8q'; give numbers of tokens"),
        (
            ["--short-tokens", "2k"],
            "--short-tokens is 2048; it must be below the shortest of --lengths (2048)",
        ),
        (["--short-tokens", "some"], "--short-tokens is 'some'; give a number of tokens as 1024 or 1k"),
        (["--short-tokens", "200"], "--short-tokens is 200, of which question and answer take"),
        (
            ["--pairs-per-context", "90", "--kinds", "corrections"],
            "--lengths has 2048, of which question and answer",
        ),
        (["--dtype", "float32"], "--dtype is 'float32'; it has no effect without --model"),
        (["--retries", "2"], "--retries is 2; it has no effect without --server"),
        (["--tokenizer", "ic-tiny"], "--tokenizer is 'ic-tiny'; it cannot be read: "),
        (
            ["--model", "ic-nano", "--lengths", "2M"],
            "--lengths has 2097152; this model takes from 512 to 1048576 (max_p",
        ),
        (
            ["--haystack", "jargon"],
            "--haystack is 'jargon'; it holds text of 'jargon', which evaluation uses",
        ),
        (["--haystack", "nowhere.txt"], "--haystack is 'nowhere.txt'; give a UTF-8 text file, or 'sources'"),
        (["--haystack", "sources"], "--licence is 'PSF-2.0'; it has no effect with --haystack sources"),
        (["--seed", "-1"], "--seed is -1; it must be at least 0"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_made(
    tmp_path: Path, haystack: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(words(tmp_path / "out", haystack, *arguments)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_more_bad_input(tmp_path: Path, haystack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedServer(scripted, max_model_len=1024) as server:
        assert cli.main(words(tmp_path / "out", haystack, "--server", server.url)) == 2
        assert "--lengths has 2048; this model takes from 512 to 1024 (what http" in capsys.readouterr().err
        assert server.requests == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    assert cli.main(words(tmp_path / "mine", haystack)) == 2
    assert "mine exists and holds no preferences; give a new folder" in capsys.readouterr().err
    assert cli.main(["data", "preferences", str(tmp_path / "out"), "--haystack", str(haystack)]) == 2
    assert "--tokenizer is missing" in capsys.readouterr().err
    assert (
        cli.main(
            ["data", "preferences", str(tmp_path / "out"), "--tokenizer", NANO, "--haystack", str(haystack)]
        )
        == 2
    )
    assert "--licence is missing; give that of --haystack" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text(" \n")
    assert cli.main(words(tmp_path / "out", tmp_path / "empty.txt")) == 2
    assert "it holds no text" in capsys.readouterr().err
    # words only, all in lower case
    letters = Tokenizer(models.WordLevel({"pass": 0, "key": 1, "[UNK]": 2}, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="[UNK]").save_pretrained(tmp_path / "words")
    assert cli.main(words(tmp_path / "out", haystack, "--tokenizer", str(tmp_path / "words"))) == 2
    assert "the tokenizer cannot spell '\\nThe pass key for" in capsys.readouterr().err


def test_text_of_the_evaluation_is_found_in_other_files_and_can_be_allowed(tmp_path: Path) -> None:
    path = tmp_path / "mixed.txt"
    path.write_text("Chapter one.\n" * 1000 + load_haystack("jargon")[300_000:400_000])
    with pytest.raises(ValueError, match="holds text of 'jargon', which evaluation uses"):
        load_training_text(str(path), "public-domain")
    assert len(load_training_text(str(path), "public-domain", allow_evaluation_text=True).text) == 113_000


def test_the_default_text_is_that_of_installed_packages_with_their_licences() -> None:
    text = load_training_text("sources", None)
    assert len(text.text) > 20_000_000
    assert "\ufffd" not in text.text[:1_000_000]
    licences = {name.split()[0]: licence for name, licence in text.licence.items()}
    assert licences["python"] == "PSF-2.0"
    assert "Apache" in licences["transformers"]
    assert "unstated" not in licences.values()


def test_what_is_no_whole_folder_of_pairs_is_refused(tmp_path: Path, haystack: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no preferences; it has no preferences\.json"):
        load_preferences(tmp_path / "nothing", 264)
    out = tmp_path / "out"
    make(out, haystack)
    with pytest.raises(
        ValueError, match=r"vocab_size is 200; .* has token ids up to 256: it was made with another"
    ):
        load_preferences(out, 200)
    whole = (out / "tokens.bin").read_bytes()
    (out / "tokens.bin").write_bytes(whole[:-2])
    with pytest.raises(ValueError, match="it is not whole"):
        load_preferences(out, 264)
    with pytest.raises(ValueError, match=r"tokens.bin is damaged: it is shorter than pairs.jsonl says"):
        Writer(out, 264)
    (out / "tokens.bin").write_bytes(whole)
    record = json.loads((out / "preferences.json").read_text())
    (out / "preferences.json").write_text(json.dumps(record | {"format": "ic-train preferences 9"}))
    with pytest.raises(
        ValueError, match=r"format in .* is 'ic-train preferences 9'; accepted: 'ic-train preferences 1'"
    ):
        load_preferences(out, 264)


def test_two_processes_cannot_write_one_folder(
    tmp_path: Path, haystack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, haystack)
    with Writer(tmp_path, 264):
        assert cli.main(words(tmp_path, haystack)) == 2
    assert "is being written by another process" in capsys.readouterr().err


def test_pairs_of_a_context_stay_together(tmp_path: Path, haystack: Path) -> None:
    arguments = ["--kinds", "multi,absent", "--pairs", "12", "--pairs-per-context", "3"]
    pairs = make(tmp_path, haystack, *arguments)
    lines = lines_of(tmp_path)
    splits = [pairs.split(4, seed) for seed in range(8)]
    for train_on, measure in splits:
        assert sorted(train_on + measure) == list(range(24))
        contexts = [{lines[number]["context"][0] for number in chosen} for chosen in (train_on, measure)]
        assert not contexts[0] & contexts[1]
        # one context has 3 pairs, so that 4 need two
        assert len(measure) == 6 and pairs.contexts(measure) == 2
    assert pairs.split(4, seed=0) == splits[0]
    assert len({tuple(measure) for _, measure in splits}) > 1
    assert pairs.split(0, seed=0)[1] == []
    assert len(pairs.split(21, seed=0)[0]) == 3
    with pytest.raises(ValueError, match=r"validation_pairs is 22; .* 24 pairs in 8 contexts"):
        pairs.split(22, seed=0)
