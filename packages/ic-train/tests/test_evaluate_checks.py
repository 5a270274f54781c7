"""What could not be asked to the end is found before anything is, and before the folder is held."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from ic_model import ICForCausalLM, checkpoint_path
from ic_model.byte_tokenizer import build_byte_tokenizer
from ic_model.presets import preset
from openai_server import ScriptedServer, reader

from ic_train import cli
from ic_train.evaluation.haystack import load_haystack
from ic_train.evaluation.tasks import TASKS, Context, Plan, check_room, contexts

TOKENIZER = build_byte_tokenizer()
NANO = str(checkpoint_path("ic-nano"))


def plan(**fields) -> Plan:
    chosen = {"num_questions": 6, "keys_per_context": 4, "seed": 3, **fields}
    return Plan(haystack=load_haystack("jargon"), tokenizer=TOKENIZER, **chosen)


def run(server: ScriptedServer, out: Path, *arguments: str) -> int:
    words = ["evaluate", "--server", server.url, "--tokenizer", NANO, "--out", str(out), "--questions", "12"]
    return cli.main([*words, *arguments])


def test_a_length_without_room_leaves_the_folder_free(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--suite", "niah,corrections", "--lengths", "2k,4k"]
    with ScriptedServer(reader) as server:
        # niah has room for so many, and would be asked first
        assert run(server, tmp_path / "out", *words, "--keys-per-context", "30") == 2
        assert server.requests == []
        error = capsys.readouterr().err
        assert "--lengths has 2048, of which question and answer take 160; corrections: " in error
        assert "ask for fewer keys per context" in error
        assert run(server, tmp_path / "out", *words, "--keys-per-context", "12") == 0


@pytest.mark.parametrize("task", TASKS)
def test_room_at_a_million_tokens_is_found_without_making_them(task: str) -> None:
    made = []

    def build(plan: Plan, tokens: int, number: int, names: list[str]) -> Context:
        made.append(tokens)
        return TASKS[task].build(plan, tokens, number, names)

    wanted = plan(keys_per_context=40, num_questions=80)
    check_room(replace(TASKS[task], build=build), wanted, 2**20)
    assert max(made) < 16_384
    # what has no room when it is made has none before
    with pytest.raises(ValueError, match=rf"--lengths has 300, .*; {task}: context_tokens is \d+; .*need"):
        check_room(TASKS[task], wanted, 300)
    tokens = max(made) + 160
    check_room(TASKS[task], wanted, tokens)
    assert all(len(context.token_ids) <= tokens for context in contexts(TASKS[task], wanted, tokens, bool))


def test_the_last_context_is_seen_to_where_room_is_scarce() -> None:
    def build(plan: Plan, tokens: int, number: int, names: list[str]) -> Context:
        if tokens < 1800 + 10 * number:
            raise ValueError(f"context {number} needs more")
        return Context(token_ids=[], questions=[])

    task = replace(TASKS["niah"], build=build)
    with pytest.raises(ValueError, match=r"--lengths has 1965, .*context 1 needs more"):
        check_room(task, plan(), 1965)
    check_room(task, plan(), 1970)


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_an_answer_of_a_chat_model_may_be_a_sentence_of_its_own(tmp_path: Path, api: str) -> None:
    with ScriptedServer(reader) as server:
        words = ["--suite", "passkey,niah,multivalue,distractors", "--keys-per-context", "6"]
        assert run(server, tmp_path, *words, "--lengths", "2k", "--api", api) == 0
    asked = list(dict.fromkeys(body["max_tokens"] for body in server.requests))
    assert asked == ([48] if api == "chat" else [12, 36, 24])
    # answers of both limits do not stand in one folder
    settings = json.loads((tmp_path / "run.json").read_text())
    assert settings.get("answer_tokens") == (48 if api == "chat" else None)


def test_what_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, torn, out = tmp_path / "empty", tmp_path / "torn", str(tmp_path / "out")
    empty.mkdir()
    config = preset("ic-nano")
    config.num_hidden_layers = 1
    ICForCausalLM(config).save_pretrained(torn)
    TOKENIZER.save_pretrained(torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with ScriptedServer(reader) as server:
        served = ["evaluate", "--server", server.url, "--tokenizer", str(empty), "--out", out]
        for words, option, folder in (
            (["evaluate", str(empty), "--out", out], "MODEL", empty),
            (["evaluate", str(torn), "--out", out], "MODEL", torn),
            (["evaluate", "passkey", "--model", str(empty)], "--model", empty),
            (served, "--tokenizer", empty),
        ):
            assert cli.main(words) == 2
            error = capsys.readouterr().err
            assert f"error: {option} is '{folder}'; it cannot be read: " in error
            assert error.rstrip().rpartition(": ")[2]
    assert server.requests == []
    (tmp_path / "nothing.txt").touch()
    words = ["evaluate", NANO, "--haystack", str(tmp_path / "nothing.txt"), "--out", out]
    assert cli.main(words) == 2
    assert "nothing.txt', which is empty; give a file with text" in capsys.readouterr().err
    assert not Path(out).exists()
