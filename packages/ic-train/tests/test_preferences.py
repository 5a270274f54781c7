"""`ic-train data preferences`: what pairs say, who gave the wrong answer, what survives a kill and a full disk."""

import inspect
import json
import re
import resource
import signal
import subprocess
import sys
import time
import typing
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from ic_model import checkpoint_path
from ic_model.byte_tokenizer import build_byte_tokenizer
from openai_server import ScriptedServer
from smollm2_tokenizer import smollm2_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ic_train import cli
from ic_train.evaluation.hard_sets import KINDS, Asked, Fact
from ic_train.evaluation.haystack import load_haystack
from ic_train.evaluation.wordings import is_held_out
from ic_train.preferences.answers import FAULTS, fault_of
from ic_train.preferences.haystack import load_training_text
from ic_train.preferences.store import Preferences, Writer, load_preferences

NANO = str(checkpoint_path("ic-nano"))
# program text, as ic-nano was trained on
TEXT = inspect.getsource(typing) + inspect.getsource(inspect)


@pytest.fixture(scope="module")
def haystack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sources.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("smollm2")
    smollm2_tokenizer().save_pretrained(folder)
    return {"bytes": NANO, "smollm2": str(folder)}


def words(out: Path, haystack: Path, *arguments: str) -> list[str]:
    chosen = ["data", "preferences", str(out), "--haystack", str(haystack), "--licence", "PSF-2.0"]
    # the last of an option counts
    return [*chosen, "--tokenizer", NANO, "--lengths", "2k", "--pairs", "6", *arguments]


def make(out: Path, haystack: Path, *arguments: str) -> Preferences:
    assert cli.main(words(out, haystack, *arguments)) == 0
    return load_preferences(out, 49_152)


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]


def content(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("tokens.bin", "pairs.jsonl", "preferences.json")}


def stated(text: str, key: str) -> list[str]:
    """Values of a name in the order of a document, read as a person would."""
    return re.findall(rf"[Tt]he pass key for {key} is (?:no longer \d+; it is )?(\d+)\.", text)


def first_number(answer: str) -> str | None:
    found = re.search(r"\d+", answer)
    return found[0] if found else None


@pytest.mark.parametrize("name", ["bytes", "smollm2"])
def test_right_answers_are_right_and_wrong_ones_are_wrong_in_their_way(
    tmp_path: Path, haystack: Path, tokenizers: dict[str, str], name: str
) -> None:
    tokenizer: PreTrainedTokenizerBase = {"bytes": build_byte_tokenizer, "smollm2": smollm2_tokenizer}[name]()
    arguments = ["--tokenizer", tokenizers[name], "--lengths", "2k,4k", "--pairs", "13"]
    pairs = make(tmp_path / "out", haystack, *arguments, "--pairs-per-context", "5", "--short-tokens", "900")
    lines = lines_of(tmp_path / "out")
    assert len(pairs) == len(lines) == len(KINDS) * 2 * 13
    assert len({pair.id for pair in pairs}) == len(pairs)
    faults: dict[str, Counter] = {kind: Counter() for kind in KINDS}
    for pair, line in zip(pairs, lines, strict=True):
        long, short = tokenizer.decode(pair.prompt_ids), tokenizer.decode(pair.short_prompt_ids)
        question = line["question"].strip()
        assert long.strip().endswith(question) and short.strip().endswith(question)
        document, summary = long[: long.rindex(question)], short[: short.rindex(question)]
        key = re.findall(r"pass key for ([A-Za-z]+(?: [A-Z][a-z]+)?)\?", question)[-1]
        assert not is_held_out(key)
        longest = max(len(pair.chosen_ids), len(pair.rejected_ids))
        assert pair.context_tokens - 70 <= len(pair.prompt_ids) + longest <= pair.context_tokens
        assert 900 - 70 <= len(pair.short_prompt_ids) + longest <= 900
        assert pair.prompt_ids.dtype == pair.chosen_ids.dtype == np.int64
        for ids, text in ((pair.chosen_ids, line["chosen"]), (pair.rejected_ids, line["rejected"])):
            assert ids[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(ids[:-1]) == text
        chosen, rejected, fault = line["chosen"], line["rejected"], line["fault"]
        values = stated(document, key)
        assert stated(summary, key) == values
        faults[pair.kind][fault] += 1
        assert pair.rejected_source == "made"
        if pair.kind == "absent":
            assert values == [] and key not in document and pair.depth is None
            assert first_number(chosen) is None and "not in the document" in chosen
        else:
            assert first_number(chosen) == values[-1]
            assert len(values) == (2 if pair.kind == "corrections" else 1)
            quote = chosen.strip().split("\n")[-1] if name == "bytes" else chosen.split('"')[1]
            assert document.count(quote) == summary.count(quote) == 1
            assert document.index(quote) / len(document) == pytest.approx(pair.depth, abs=0.15)
        wrong = first_number(rejected)
        known = re.findall(r"pass key for [A-Za-z ]+ is (?:no longer \d+; it is )?(\d+)\.", document)
        if fault == "refused":
            assert wrong is None and "not in the document" in rejected
            continue
        # of the same form as a right one
        assert rejected.count(wrong) == 2
        if fault == "truncated":
            assert values[-1].startswith(wrong) and 2 <= len(wrong) < 5
        elif fault == "invented":
            assert len(wrong) == 5 and wrong not in known
        elif fault == "outdated":
            assert wrong == values[0] != values[-1]
        else:
            # a near-duplicate's, which stands in the short context, too
            assert wrong in known and wrong not in values and wrong in summary
    # every fault of every kind
    assert {kind: set(counted) for kind, counted in faults.items()} == {
        kind: set(listed) for kind, listed in FAULTS.items()
    }
    record = pairs.record
    assert record["pairs_by_kind"] == dict.fromkeys(sorted(KINDS), 26)
    assert record["pairs_by_length"] == {"2048": 65, "4096": 65}
    assert record["pairs_by_source"] == {"made": 130}
    assert record["licence"] == {"sources.txt": "PSF-2.0"}
    # contexts that are shared are stored once
    assert record["tokens"] < 0.6 * sum(len(pair.prompt_ids) + len(pair.short_prompt_ids) for pair in pairs)
    assert pairs.prompt_tokens.tolist() == [len(pair.prompt_ids) for pair in pairs]
    used = max(
        int(ids.max())
        for pair in pairs
        for ids in (pair.prompt_ids, pair.short_prompt_ids, pair.chosen_ids, pair.rejected_ids)
    )
    assert record["largest_token_id"] == used < len(tokenizer)


def test_single_facts_stand_at_every_depth(tmp_path: Path, haystack: Path) -> None:
    pairs = make(tmp_path, haystack, "--kinds", "single", "--pairs", "10", "--lengths", "2k,4k")
    for tokens in (2048, 4096):
        depths = [pair.depth for pair in pairs if pair.context_tokens == tokens]
        assert sorted(int(depth * 10) for depth in depths) == list(range(10))


def test_a_pair_with_a_context_of_its_own_has_distractors_all_the_same(
    tmp_path: Path, haystack: Path
) -> None:
    make(tmp_path, haystack, "--pairs-per-context", "1", "--pairs", "12")
    lines = lines_of(tmp_path)
    assert len({tuple(line["context"]) for line in lines}) == 60
    assert {line["kind"] for line in lines if line["fault"] == "distractor"} == {*KINDS} - {"single"}


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
    command = [sys.executable, "-m", "ic_train.cli", *words(tmp_path / "killed", haystack, *arguments)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        lines, deadline = tmp_path / "killed" / "pairs.jsonl", time.monotonic() + 120
        while not lines.is_file() or lines.read_bytes().count(b"\n") < 30:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    kept = lines.read_bytes()
    assert 30 <= kept.count(b"\n") < 150
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


def test_a_models_own_wrong_answers_are_taken(tmp_path: Path, haystack: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    arguments = ["--model", "ic-nano", "--dtype", "float32", "--device", "cpu", "--pairs", "8"]
    arguments += ["--lengths", "1k", "--short-tokens", "600"]
    pairs = make(tmp_path, haystack, *arguments, "--kinds", "single,corrections,absent")
    torch.set_num_threads(threads)
    sources = {kind: Counter() for kind in ("single", "corrections", "absent")}
    for pair, line in zip(pairs, lines_of(tmp_path), strict=True):
        sources[pair.kind][pair.rejected_source] += 1
        if pair.rejected_source == "model":
            # one line, as answers have in these words
            assert re.fullmatch(r" \d+\.?\n", line["rejected"])
            assert first_number(line["rejected"]) != first_number(line["chosen"])
            if line["fault"] == "distractor":
                assert (
                    first_number(line["rejected"]) in bytes(pair.short_prompt_ids.astype(np.uint8)).decode()
                )
    # it finds every key, has no notion of a correction, and knows no absence
    assert sources["single"] == {"made": 8}
    assert sources["corrections"]["model"] >= 1
    assert sources["absent"] == {"model": 8}
    assert pairs.record["model"] == "ic-nano" and len(pairs.record["weights"]) == 64


def scripted(body) -> str:
    """Takes the first value of a name, and says where there is none the first of all values."""
    document, _, asked = bytes(body["prompt"]).decode().rpartition("\nQuestion: ")
    key = re.findall(r"for (\w+)\?", asked)[0]
    return f" {(stated(document, key) or stated(document, '[a-zA-Z]+'))[0]}.\nand so on"


def test_a_server_that_dies_half_way_is_asked_only_for_the_rest(
    tmp_path: Path, haystack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--kinds",
        "multi,corrections,absent",
        "--pairs",
        "9",
        "--pairs-per-context",
        "3",
        "--retries",
        "0",
    ]
    with ScriptedServer(scripted, max_model_len=8192) as server:
        make(tmp_path / "whole", haystack, *arguments, "--server", server.url)
        assert len(server.requests) == 27
    assert [line["fault"] for line in lines_of(tmp_path / "whole") if line["kind"] != "multi"] == [
        *["outdated"] * 9,
        *["distractor"] * 9,
    ]
    record = json.loads((tmp_path / "whole" / "preferences.json").read_text())
    assert record["pairs_by_source"] == {"made": 9, "model": 18}
    assert all(
        line["rejected"].count("\n") == 1 for line in lines_of(tmp_path / "whole") if line["kind"] != "multi"
    )
    with ScriptedServer(
        scripted, lambda number: "hang up" if number >= 13 else None, max_model_len=8192
    ) as dying:
        assert cli.main(words(tmp_path / "died", haystack, *arguments, "--server", dying.url)) == 1
    assert "the same command asks for the rest" in capsys.readouterr().err
    kept = lines_of(tmp_path / "died")
    assert len(kept) == 12
    with ScriptedServer(scripted, max_model_len=8192) as server:
        make(tmp_path / "died", haystack, *arguments, "--server", server.url)
        assert len(server.requests) == 27 - len(kept)
    assert content(tmp_path / "died") == content(tmp_path / "whole")


def test_faults_of_a_models_answers() -> None:
    def fact(key: str, value: str, slot: int) -> Fact:
        return Fact(key=key, value=value, sentence=f"\nThe pass key for {key} is {value}.\n", slot=slot)

    old, new, near, far = (
        fact("ab", "11111", 0),
        fact("ab", "22222", 1),
        fact("ac", "33333", 2),
        fact("x", "44444", 3),
    )
    asked = Asked(key="ab", fact=new, outdated=old, others=(near,))
    absent = Asked(key="aq", fact=None, outdated=None, others=(near,))
    elsewhere = {one.value: one for one in (old, new, near, far)}
    found = {
        " 22222.": None,
        "It was 11111; it is 22222.": None,
        " 11111.": "outdated",
        " 33333.": "distractor",
        " 44444.": "distractor",
        " 222.": "truncated",
        " 222222.": "invented",
        " 55555.": "invented",
        "It is not in the document.": "refused",
        "Hello": "no number",
        "": "no number",
    }
    assert {answer: fault_of(answer, asked, elsewhere) for answer in found} == found
    found = {
        "It is not in the document.": None,
        "It is not there, but that of ac is 33333.": None,
        "Hello": None,
        " 33333.": "distractor",
        " 55555.": "invented",
    }
    assert {answer: fault_of(answer, absent, elsewhere) for answer in found} == found


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
