"""`ic-train evaluate`: contexts, scores and reports, and every failure of a server."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ic_model import ICForCausalLM, checkpoint_path
from ic_model.byte_tokenizer import build_byte_tokenizer
from ic_model.presets import preset
from openai_server import ScriptedServer, reader
from transformers import LlamaConfig, LlamaForCausalLM

from ic_train import cli
from ic_train.evaluation import client
from ic_train.evaluation.command import parse_lengths
from ic_train.evaluation.generation import PrefixReader
from ic_train.evaluation.haystack import load_haystack
from ic_train.evaluation.records import Records, read_records
from ic_train.evaluation.report import compare, difference_interval
from ic_train.evaluation.tasks import TASKS, Plan, all_numbers_in, contexts, first_number_is
from ic_train.evaluation.wordings import PLAIN

TOKENIZER = build_byte_tokenizer()
NANO = str(checkpoint_path("ic-nano"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    # models this small gain nothing from a second thread, and wait for it on a busy machine
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_FIRST_PAUSE_S", 0.01)


def small_model() -> ICForCausalLM:
    config = preset("ic-nano")
    config.num_hidden_layers = 1
    return ICForCausalLM(config)


def plan(**fields) -> Plan:
    chosen = {"num_questions": 6, "keys_per_context": 4, "seed": 3, **fields}
    return Plan(haystack=load_haystack("jargon"), tokenizer=TOKENIZER, **chosen)


def run(server: ScriptedServer, out: Path, *arguments: str) -> int:
    words = ["evaluate", "--server", server.url, "--tokenizer", NANO, "--out", str(out), "--questions", "12"]
    return cli.main([*words, "--keys-per-context", "6", "--lengths", "2k", *arguments])


def answers(out: Path) -> dict:
    return read_records(out / "answers.jsonl")


def test_the_pass_key_stands_in_the_published_words() -> None:
    made = list(contexts(TASKS["passkey"], plan(), 2048, lambda name: True))
    assert len(made) == 6
    for context in made:
        (question,) = context.questions
        text = bytes(context.token_ids).decode()
        # within a filler sentence of the wished length, question and answer apart
        assert 2048 - 160 - 100 < len(context.token_ids) <= 2048 - 160
        lines = text.split("\n")
        assert lines[0].startswith(
            "There is an important info hidden inside a lot of irrelevant text. Find it and"
        )
        assert (
            lines[2]
            == f"The pass key is {question.expected[0]}. Remember it. {question.expected[0]} is the pass key."
        )
        assert set(lines[1] + lines[3]) <= set(
            "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
        )
        assert text.index(lines[2]) / len(text) == pytest.approx(question.depth, abs=1e-3)
        assert question.text == "\nWhat is the pass key? The pass key is"
    depths = [context.questions[0].depth for context in made]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] > 0.8
    assert depths[-1] < 0.25


@pytest.mark.parametrize("task", ["niah", "multivalue"])
def test_contexts_hold_every_answer_and_share_their_prefix(task: str) -> None:
    made = list(contexts(TASKS[task], plan(), 4096, lambda name: True))
    assert [len(context.questions) for context in made] == [4, 2]
    for context in made:
        text = bytes(context.token_ids).decode()
        assert len(context.token_ids) <= 4096 - 160
        for question in context.questions:
            assert len(question.expected) == (3 if task == "multivalue" else 1)
            for passage, value in zip(question.quote.split("\n"), question.expected, strict=True):
                assert text.count(passage) == 1
                assert passage.endswith(f"is {value}.")
            prompt = [*context.token_ids, *TOKENIZER(question.text)["input_ids"]]
            assert TASKS[task].score(reader({"prompt": prompt}), question.expected)


def test_only_contexts_with_missing_questions_are_made() -> None:
    every = [
        question.id
        for context in contexts(TASKS["niah"], plan(), 2048, lambda name: True)
        for question in context.questions
    ]
    (made,) = contexts(TASKS["niah"], plan(), 2048, lambda name: name == every[5])
    assert [question.id for question in made.questions] == [every[5]]
    assert len(set(every)) == 6


@pytest.mark.parametrize("task", TASKS)
def test_a_length_without_room_is_refused(task: str) -> None:
    with pytest.raises(ValueError, match=r"context_tokens is \d+; .*need"):
        list(contexts(TASKS[task], plan(keys_per_context=50, num_questions=50), 300, lambda name: True))


def test_scores() -> None:
    assert first_number_is(" 123. 45", ("123",))
    assert not first_number_is(" 1234", ("123",))
    assert not first_number_is(" 45, 123", ("123",))
    assert not first_number_is(" none", ("123",))
    assert all_numbers_in("2 and 1", ("1", "2"))
    assert not all_numbers_in("12", ("1", "2"))


@pytest.mark.parametrize("kind", ["infinite-context", "llama"])
def test_reading_on_from_a_kept_prefix_changes_no_answer(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=264,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            eos_token_id=256,
        )
        model = LlamaForCausalLM(config).eval()
    else:
        model = small_model().eval()
    generator = torch.Generator().manual_seed(1)
    base = torch.randint(0, 256, (120,), generator=generator).tolist()
    prompts = [base + [1, 2, 3], base + [1, 2, 9, 9, 9], base, base[:50] + [7] * 30, base + [1, 2, 3]]
    shared = PrefixReader(model, chunk_tokens=32)
    for prompt in prompts:
        alone = PrefixReader(model).complete(prompt, max_tokens=6)
        # an answer that ends early leaves a cache that the next one can go on from
        early = shared.complete(prompt, max_tokens=6, is_over=lambda answer: len(answer) == 2)
        assert early == alone[:2]
        assert shared.complete(prompt, max_tokens=6) == alone
    wanted = model.generate(torch.tensor([base]), max_new_tokens=6, do_sample=False, eos_token_id=256)[
        0, 120:
    ]
    assert shared.complete(base, max_tokens=6) == [token for token in wanted.tolist() if token != 256]


def test_a_server_is_measured_and_the_report_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ScriptedServer(reader, max_model_len=8192) as server:
        assert run(server, tmp_path / "a", "--suite", "passkey,niah,multivalue", "--concurrency", "3") == 0
        assert server.most_at_once <= 3
        assert len(server.requests) == 36
        # the same call again: nothing is asked, the same report comes out
        report = (tmp_path / "a" / "report.md").read_text()
        assert run(server, tmp_path / "a", "--suite", "passkey,niah,multivalue", "--concurrency", "3") == 0
        assert len(server.requests) == 36
    assert {body["temperature"] for body in server.requests} == {0}
    assert (tmp_path / "a" / "report.md").read_text() == report
    assert "| passkey | 2,048 | 12/12 [75.8%, 100.0%] |" in report
    assert "fewer than 200 questions" in report
    rows = json.loads((tmp_path / "a" / "report.json").read_text())["rows"]
    assert [(row["task"], row["correct"], row["total"]) for row in rows] == [
        ("passkey", 12, 12),
        ("niah", 12, 12),
        ("multivalue", 12, 12),
    ]
    assert rows[0]["model"] == "scripted"
    assert rows[0]["engine"] == "tests"
    for task in ("passkey", "niah"):
        assert (tmp_path / "a" / f"{task}.png").read_bytes().startswith(b"\x89PNG")
    assert "report.md" in capsys.readouterr().out


def test_wrong_answers_count_as_wrong_and_200_give_a_percentage(tmp_path: Path) -> None:
    def often_wrong(body):
        answer = reader(body)
        return answer if int(answer.strip(" .\n")) % 4 else " 0"

    with ScriptedServer(often_wrong) as server:
        arguments = ["--suite", "niah", "--questions", "200", "--keys-per-context", "25", "--api", "chat"]
        assert run(server, tmp_path, *arguments) == 0
    found = answers(tmp_path)
    wrong = [record for record in found.values() if int(record["reference"]) % 4 == 0]
    assert [record["correct"] for record in wrong] == [False] * len(wrong)
    right = 200 - len(wrong)
    assert sum(record["correct"] for record in found.values()) == right
    report = (tmp_path / "report.md").read_text()
    assert f"| {right}/200 = {right / 2:.1f}% [" in report
    assert "fewer than" not in report


def test_a_chat_server_is_asked_in_plain_language_without_a_template(tmp_path: Path) -> None:
    with ScriptedServer(lambda body: "It is not in the document.") as server:
        arguments = ["--suite", "absent", "--questions", "4", "--keys-per-context", "2", "--api", "chat"]
        assert run(server, tmp_path, *arguments) == 0
    messages = [body["messages"] for body in server.requests]
    assert len(messages) == 4
    for message in messages:
        # the server's own template comes around it
        assert [part["role"] for part in message] == ["user"]
        assert message[0]["content"].startswith(PLAIN.before)
        assert message[0]["content"].endswith("say that it is not in the document.")
    assert all(record["correct"] for record in answers(tmp_path).values())


def test_a_server_that_dies_half_way_loses_and_repeats_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def dies(number: int) -> str | None:
        return "hang up" if number >= 7 else None

    with ScriptedServer(reader, dies) as server:
        assert run(server, tmp_path, "--suite", "niah", "--concurrency", "2", "--retries", "1") == 1
    assert len(server.answered) == 7
    error = capsys.readouterr().err
    assert "does not answer" in error
    assert "the same command asks for the rest" in error
    kept = answers(tmp_path)
    assert len(kept) == 7
    assert not (tmp_path / "report.json").exists()
    # killed in the middle of a line
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"id": "niah-2048-1-')
    with ScriptedServer(reader) as again:
        assert run(again, tmp_path, "--suite", "niah", "--concurrency", "2") == 0
    assert len(again.requests) == 5
    asked = [tuple(body["prompt"]) for body in server.answered + again.requests]
    assert len(set(asked)) == 12
    found = answers(tmp_path)
    assert list(found)[:7] == list(kept)
    assert len(found) == 12
    assert json.loads((tmp_path / "report.json").read_text())["rows"][0]["correct"] == 12


@pytest.mark.parametrize(
    "failure",
    [
        (429, b'{"error": {"message": "slow down"}}'),
        (503, b"no upstream"),
        (200, b"<html>no JSON</html>"),
        (200, b'{"choices": []}'),
        "hang up",
    ],
)
def test_failures_that_pass_are_retried(tmp_path: Path, failure) -> None:
    with ScriptedServer(reader, lambda number: failure if number in (0, 3, 4) else None) as server:
        assert run(server, tmp_path, "--suite", "niah", "--concurrency", "2") == 0
    assert len(server.requests) == 15
    assert len(server.answered) == 12
    assert all(record["correct"] for record in answers(tmp_path).values())


@pytest.mark.parametrize(
    ("failure", "message", "tries"),
    [
        ((429, b'{"error": {"message": "slow down"}}'), "answered 429", 3),
        ((200, b"<html>no JSON</html>"), "gave no usable answer in 3 tries", 3),
        ((400, b'{"error": {"message": "too long for me"}}'), "too long for me", 1),
    ],
)
def test_failures_that_stay_end_the_run_after_bounded_tries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], failure, message, tries
) -> None:
    with ScriptedServer(reader, lambda number: failure) as server:
        assert run(server, tmp_path, "--suite", "niah", "--retries", "2") == 1
    assert len(server.requests) == tries
    assert message in capsys.readouterr().err
    assert answers(tmp_path) == {}


def test_a_server_that_is_too_slow_is_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = threading.Event()

    def slow(body):
        held.wait(20)
        return ""

    with ScriptedServer(slow) as server:
        assert run(server, tmp_path, "--suite", "niah", "--retries", "0", "--timeout-s", "0.3") == 1
        held.set()
    assert "does not answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "2k,16k"], r"--lengths has 16384; this model takes from 512 to 8192 (what http"),
        (["--lengths", "100"], "--lengths has 100; this model takes from 512 to 8192"),
        (["--lengths", "4x"], "--lengths has '4x'; give numbers of tokens"),
        (
            ["--suite", "niah,longbench"],
            "--suite has 'longbench'; accepted are passkey, niah, multivalue, distractors, ",
        ),
        (["--suite", "perplexity"], "--suite has perplexity, which is measured in process"),
        (["--questions", "0"], "--questions is 0; it must be at least 1"),
        (["--concurrency", "0"], "--concurrency is 0; it must be at least 1"),
        (["--timeout-s", "0"], "--timeout-s is 0.0; it must be above 0"),
        (["other"], "model is 'other'; "),
        (["--dtype", "float32"], "--dtype is 'float32'; it has no effect with --server"),
        (
            ["--server", "localhost:8000"],
            "--server is 'localhost:8000'; it must start with http:// or https://",
        ),
        (["--tokenizer", "ic-tiny"], "--tokenizer is 'ic-tiny' and the served model is 'scripted'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with ScriptedServer(reader, max_model_len=8192) as server:
        words = ["evaluate", "--server", server.url, "--tokenizer", NANO, "--out", str(tmp_path)]
        assert cli.main([*words, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert server.requests == []


def test_a_length_beyond_the_model_in_process_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "ic-nano", "--lengths", "2M", "--out", str(tmp_path)]) == 2
    assert (
        "--lengths has 2097152; this model takes from 512 to 1048576 (max_position_embeddings of ic-nano)"
        in capsys.readouterr().err
    )
    assert cli.main(["evaluate", "ic-nano", "--api", "chat", "--out", str(tmp_path)]) == 2
    assert "--api is 'chat'; it has no effect without --server" in capsys.readouterr().err
    assert cli.main(["evaluate", "--out", str(tmp_path)]) == 2
    assert "MODEL is missing" in capsys.readouterr().err


def test_another_run_in_the_same_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ScriptedServer(reader) as server:
        assert run(server, tmp_path, "--suite", "niah") == 0
        assert run(server, tmp_path, "--suite", "niah", "--seed", "5") == 2
        assert (
            "holds a run with seed 1000, this one has 5; give the same, or another --out"
            in capsys.readouterr().err
        )
        # more lengths are the same run, wider
        assert run(server, tmp_path, "--suite", "niah", "--lengths", "2k,3k") == 0
    assert len(server.requests) == 24


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    with (
        Records(tmp_path / "answers.jsonl"),
        pytest.raises(ValueError, match="is being written by another process"),
    ):
        Records(tmp_path / "answers.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "a"}\nnonsense\n', "line 2 is not JSON"),
        ('{"answer": "x"}\n', "line 1 has no id"),
        ('["id"]\n', "line 1 has no id"),
        ('{"id": "a"}\n{"id": "a"}\n', "line 2 repeats the id 'a'"),
    ],
)
def test_a_broken_file_of_answers_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_records(path)
    with pytest.raises(ValueError, match=message):
        Records(path)
    assert path.read_text() == text


def row(correct: int, total: int) -> dict:
    return {"task": "niah", "context_tokens": 4096, "correct": correct, "total": total}


def test_runs_are_compared_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Newcombe 1998, table II, example (a): 56/70 and 48/80
    assert difference_interval((48, 80), (56, 70)) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    for name, correct in (("before", 100), ("after", 180)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps({"rows": [row(correct, 200)]}))
    assert cli.main(["evaluate", "compare", str(tmp_path / "before"), str(tmp_path / "after")]) == 0
    table = capsys.readouterr().out
    assert "| task | context tokens | before | after | after - before |" in table
    assert (
        "| 100/200 = 50.0% [43.1%, 56.9%] | 180/200 = 90.0% [85.1%, 93.4%] "
        "| +40.0 [+31.5, +47.7] points, independent |" in table
    )
    few = compare({"a": [row(5, 10)], "b": [row(9, 10)]})
    assert "%" not in few.split("|")[8].split("[")[0]
    assert "+40.0 [" not in few
    assert cli.main(["evaluate", "compare", str(tmp_path)]) == 2
    assert "report.json does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "lengths"), [("4k,32K", [4096, 32768]), ("1M", [1048576]), ("8k,600", [600, 8192])]
)
def test_lengths(text: str, lengths: list[int]) -> None:
    assert parse_lengths(text) == lengths


def test_a_later_checkpoint_of_the_same_name_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "evaluate",
        str(tmp_path / "model"),
        "--suite",
        "niah,perplexity",
        "--lengths",
        "1k",
        "--questions",
        "3",
    ]
    words += ["--keys-per-context", "3", "--texts", "1", "--dtype", "float32", "--out", str(tmp_path / "out")]
    for seed, status in ((0, 0), (0, 0), (1, 2)):
        torch.manual_seed(seed)
        small_model().save_pretrained(tmp_path / "model")
        TOKENIZER.save_pretrained(tmp_path / "model")
        assert cli.main(words) == status
    assert "holds a run with weights" in capsys.readouterr().err
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert [(row["task"], row["model"], row["engine"]) for row in rows] == [
        ("niah", "model", "transformers"),
        ("perplexity", "model", "transformers"),
    ]
    # random weights know nothing: every byte of 264 is about as likely
    assert 200 < rows[1]["perplexity"] < 350
    assert len(answers(tmp_path / "out")) == 4
