"""RULER out of lm-eval: the prompts are those of its own loop, and the run is like that of any other suite."""

import asyncio
import functools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import lm_eval
import numpy as np
import pytest
from ic_model import checkpoint_path
from lm_eval.tasks import TaskManager
from lm_eval.tasks.ruler import (
    common_utils,
    cwe_utils,
    fwe_utils,
    niah_utils,
    prepare_niah,
    qa_utils,
    vt_utils,
)
from openai_server import ScriptedServer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ic_train import cli
from ic_train.evaluation import ruler_tasks
from ic_train.evaluation.client import Client, ServedModel
from ic_train.evaluation.engines import Server
from ic_train.evaluation.haystack import load_haystack
from ic_train.evaluation.records import read_records
from ic_train.evaluation.ruler import check_ruler, ruler_contexts
from ic_train.evaluation.ruler_tasks import RULER_TASKS, RulerPlan, ruler_settings
from ic_train.evaluation.run import Run, evaluate
from ic_train.evaluation.tasks import Plan

HAYSTACK = load_haystack("jargon")
OFFLINE = [name for name, task in RULER_TASKS.items() if not task.data]


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of words, as a model of language has one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([HAYSTACK[:200_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


TOKENIZER = train_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, and small files in the formats of SQuAD and HotpotQA."""
    path = tmp_path_factory.mktemp("ruler")
    TOKENIZER.save_pretrained(path / "tokenizer")
    words = HAYSTACK.split()
    paragraphs = [
        {
            "context": f"{' '.join(words[60 * n : 60 * n + 60])} Town {n} was founded by Person {n}.",
            "qas": [
                {
                    "question": f"Who founded Town {n}?",
                    "answers": [{"text": f"Person {n}"}, {"text": f"by Person {n}"}],
                    "is_impossible": False,
                },
                {"question": "?", "answers": [], "is_impossible": True},
            ],
        }
        for n in range(40)
    ]
    articles = [{"title": str(n), "paragraphs": paragraphs[n : n + 4]} for n in range(0, 40, 4)]
    (path / "squad.json").write_text(json.dumps({"data": articles}))
    hotpot = [
        {
            "question": f"Who founded Town {n}?",
            "answer": f"Person {n}",
            "context": [[f"Town {n}", [paragraphs[n]["context"]]], ["Other", ["A second document."]]],
        }
        for n in range(40)
    ]
    (path / "hotpot.json").write_text(json.dumps(hotpot))
    return path


def plan(folder: Path | None = None, **fields) -> RulerPlan:
    data = {name: folder / f"{name}.json" for name in ("squad", "hotpot")} if folder else {}
    chosen = {
        "haystack": HAYSTACK,
        "haystack_name": "jargon",
        "tokenizer": TOKENIZER,
        "num_questions": 3,
        "seed": 5,
        **fields,
    }
    return RulerPlan(data=data, **chosen)


def start_random() -> None:
    random.seed(7)
    np.random.seed(7)
    cwe_utils.RNG.seed(7)


@functools.cache
def task_manager(folder: Path, tokens: int) -> TaskManager:
    """It reads the files of all tasks there are."""
    return TaskManager(metadata={"max_seq_lengths": [tokens], "tokenizer": str(folder / "tokenizer")})


def of_lm_eval(name: str, folder: Path, patch: pytest.MonkeyPatch, tokens: int):
    """What lm-eval itself makes of a task, with the same random numbers for every prompt; and its sizes."""
    kind = name.removeprefix("ruler_").split("_")[0]
    module = {"vt": vt_utils, "cwe": cwe_utils, "fwe": fwe_utils, "qa": qa_utils}.get(kind, prepare_niah)
    units, examples = [], []
    generate, vartrack = module.generate_input_output, vt_utils.sys_vartrack_w_noise_random

    def seeded(*arguments, **named):
        place = 1 if kind == "qa" else 0
        units.append(named.get("num_words") if kind == "fwe" else arguments[place])
        start_random()
        return generate(*arguments, **named)

    def with_example(**named):
        examples.append(named.get("icl_example"))
        return vartrack(**named)

    with patch.context() as here:
        for used in (niah_utils, vt_utils, cwe_utils, fwe_utils, qa_utils, common_utils):
            # else lm-eval loads another copy of it
            here.setattr(used, "__mtime__", Path(used.__file__).stat().st_mtime_ns, raising=False)
        here.setattr(module, "generate_input_output", seeded)
        here.setattr(vt_utils, "sys_vartrack_w_noise_random", with_example)
        # 500 samples otherwise
        here.setattr(module, "tqdm", lambda samples, **named: list(samples)[:1])
        fetch = niah_utils.get_haystack
        here.setattr(
            niah_utils,
            "get_haystack",
            lambda type_haystack: plan().words if type_haystack == "essay" else fetch(type_haystack),
        )
        data = {"squad": folder / "squad.json", "hotpot": folder / "hotpot.json"}
        here.setattr(
            qa_utils,
            "download_json",
            lambda url: json.loads(data["squad" if "SQuAD" in url else "hotpot"].read_text()),
        )
        task = task_manager(folder, tokens).load([name])["tasks"][name]
        task.build_all_requests(limit=1, rank=0, world_size=1)
    return task, units, examples[-1] if examples else None


@pytest.mark.parametrize("name", RULER_TASKS)
def test_a_prompt_is_what_lm_eval_makes_of_the_same_random_numbers(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, tokens = RULER_TASKS[name], 2048
    task, units, example = of_lm_eval(name, folder, monkeypatch, tokens)
    ((asked, settings),) = [request.args for request in task.instances]
    ours = plan(folder)
    if example:
        ours.vt_example = f"{example['input']} {' '.join(example['outputs'])}\n\n"
    start_random()
    prompt = own.build(ours, tokens, units[-1], 0)
    assert prompt.text + own.delimiter + prompt.answered == asked
    assert settings["max_gen_toks"] == own.answer_tokens
    assert (settings["until"], settings["do_sample"], settings["temperature"]) == ([], False, 0.0)
    (doc,) = task.test_docs()
    assert list(prompt.outputs) == doc["outputs"]
    for answer in (
        " and ".join(prompt.outputs).upper(),
        f" {prompt.outputs[0]}.",
        f"\x00{prompt.outputs[-1]}",
        "no idea",
        "",
    ):
        score = own.score(answer, prompt.outputs)
        assert score == task.process_results(doc, [answer])[str(tokens)]
        assert isinstance(score, bool) == (len(prompt.outputs) == 1)


def test_another_release_of_lm_eval_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lm_eval.__version__ == ruler_tasks.LM_EVAL_VERSION
    with monkeypatch.context() as here:
        ruler_tasks.library.cache_clear()
        here.setattr(ruler_tasks.metadata, "version", lambda name: "0.9")
        with pytest.raises(
            ValueError, match=r"lm_eval is 0.9; ruler is held to 0.4.13: pip install 'ic-train"
        ):
            ruler_settings(plan())

        def missing(name: str) -> str:
            raise ruler_tasks.metadata.PackageNotFoundError(name)

        here.setattr(ruler_tasks.metadata, "version", missing)
        with pytest.raises(
            ValueError, match=r"--suite has ruler, which needs lm-eval: pip install 'ic-train\["
        ):
            ruler_settings(plan())
    assert ruler_settings(plan())["lm_eval"] == lm_eval.__version__


@pytest.mark.parametrize("name", RULER_TASKS)
def test_prompts_are_as_long_as_fits_and_measured_a_few_times(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, task, ours = 4096 if "_qa_" in name else 32768, RULER_TASKS[name], plan(folder)
    read = []
    ids = RulerPlan.ids
    monkeypatch.setattr(RulerPlan, "ids", lambda self, text: read.append(ids(self, text)) or read[-1])
    contexts = list(ruler_contexts(task, ours, tokens, lambda name: True))
    lengths = [len(context.token_ids) + task.answer_tokens for context in contexts]
    assert max(lengths) <= tokens
    # a unit is a document there
    assert min(lengths) > (0.95 if "_qa_" in name else 0.98) * tokens
    # linear: no more than some whole prompts to find the size, and one or two per sample
    assert sum(map(len, read)) < 10 * tokens
    for context in contexts:
        (question,) = context.questions
        text = TOKENIZER.decode(context.token_ids)
        assert text.endswith(question.asked[-100:])
        assert all(output in text for output in question.expected)
        if question.depth is not None:
            assert text.index(question.expected[0]) / len(text) == pytest.approx(question.depth, abs=0.01)
            assert question.expected[0] in question.quote


@pytest.mark.parametrize("name", ["niah_multikey_2", "ruler_vt", "ruler_cwe", "ruler_fwe"])
def test_a_sample_is_the_same_whatever_else_is_made(name: str) -> None:
    every = list(ruler_contexts(RULER_TASKS[name], plan(), 2048, lambda name: True))
    random.seed(1)
    cwe_utils.RNG.seed(1)
    state = random.getstate(), np.random.get_state()[1].tolist(), cwe_utils.RNG.getstate()
    (one,) = ruler_contexts(RULER_TASKS[name], plan(), 2048, lambda wanted: wanted == f"{name}-2048-2")
    assert (random.getstate(), np.random.get_state()[1].tolist(), cwe_utils.RNG.getstate()) == state
    assert one.questions == every[2].questions
    assert len({context.questions[0].expected for context in every}) == 3
    (other,) = ruler_contexts(RULER_TASKS[name], plan(seed=6, num_questions=1), 2048, lambda name: True)
    assert other.questions[0].expected != every[0].questions[0].expected


def reader(body: dict) -> str:
    """Finds needles; of several values, one."""
    text = TOKENIZER.decode(body["prompt"])
    asked = text.rpartition("The special magic ")[2]
    found = re.findall(r"for (\S+) is: ([\w-]+)\.", text)
    return next((f" {value}." for key, value in found if key in asked), " none")


def run(server: ScriptedServer, folder: Path, out: Path, *arguments: str) -> int:
    words = ["evaluate", "--server", server.url, "--tokenizer", str(folder / "tokenizer"), "--out", str(out)]
    return cli.main([*words, "--questions", "4", "--lengths", "1k,2k", *arguments])


def test_a_run_is_reported_and_resumed_like_any_other(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = ["--suite", "niah_single_1,niah_multivalue,niah_multikey_1", "--concurrency", "2"]
    with ScriptedServer(reader, lambda number: "hang up" if number >= 9 else None) as server:
        assert run(server, folder, tmp_path, *suite, "--retries", "0") == 1
    assert len(server.answered) == 9
    with ScriptedServer(reader, together=2, max_model_len=2048) as again:
        assert run(again, folder, tmp_path, *suite) == 0
        assert len(again.requests) == 15
        # other lengths, suites and tasks may come to it
        assert run(again, folder, tmp_path, *suite[:1], "niah_single_1,passkey", "--lengths", "1k") == 0
        assert again.most_at_once == 2
        assert run(again, folder, tmp_path, *suite, "--api", "chat") == 2
        assert "holds a run with api 'completions', this one has 'chat'" in capsys.readouterr().err
    asked = {tuple(body["prompt"]) for body in server.answered + again.requests}
    assert len(asked) == 28
    assert max(len(body["prompt"]) + body["max_tokens"] for body in again.requests) <= 2048
    found = read_records(tmp_path / "answers.jsonl")
    assert {record["correct"] for name, record in found.items() if "multivalue" in name} == {0.25}
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [(row["task"], row["context_tokens"], row["correct"], row["shares"]) for row in rows[:1]] == [
        ("niah_single_1", 1024, 4, False)
    ]


def test_shares_have_their_own_note_and_a_heat_map_where_there_is_a_depth(
    tmp_path: Path, folder: Path
) -> None:
    with ScriptedServer(reader) as server:
        assert run(server, folder, tmp_path, "--suite", "niah_multivalue,niah_single_3") == 0
    table = (tmp_path / "report.md").read_text()
    assert "| niah_multivalue | 1,024 | 1/4 [4.6%, 69.9%] |" in table
    assert "| niah_single_3 | 2,048 | 4/4 [51.0%, 100.0%] |" in table
    assert "niah_multivalue: each answer counts by the share of its parts" in table
    assert (tmp_path / "niah_single_3.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "niah_multivalue.png").exists()


def test_answers_of_ruler_can_be_judged(tmp_path: Path, folder: Path) -> None:
    with ScriptedServer(reader) as server:
        assert (
            run(server, folder, tmp_path / "a", "--suite", "niah_single_1,ruler_fwe", "--lengths", "1k") == 0
        )
    with ScriptedServer(lambda body: "[RESULT] 5") as judge:
        answers = str(tmp_path / "a" / "answers.jsonl")
        assert cli.main(["judge", answers, "--server", judge.url, "--out", str(tmp_path / "judged")]) == 0
    prompt = judge.requests[0]["messages"][-1]["content"]
    assert re.search(r"What is the special magic number for \S+ mentioned in the provided text\?", prompt)
    assert "One of the special magic numbers for" in prompt
    (row,) = json.loads((tmp_path / "judged" / "report.json").read_text())["rows"]
    # shares are no exact match
    assert (row["total"], row["exact_total"], row["exact_agreed"]) == (8, 4, 4)


def test_ruler_is_all_tasks_whose_data_is_there(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--suite", "ruler", "--questions", "1", "--lengths", "1k"]
    with ScriptedServer(reader) as server:
        assert run(server, folder, tmp_path / "a", *words) == 0
        assert "ruler_qa_squad (--squad FILE: SQuAD 2.0, dev-v2.0.json)" in capsys.readouterr().out
        data = ["--squad", str(folder / "squad.json"), "--hotpot", str(folder / "hotpot.json")]
        assert run(server, folder, tmp_path / "b", *words, *data) == 0
        assert "not asked" not in capsys.readouterr().out
    for name, tasks in (("a", OFFLINE), ("b", list(RULER_TASKS))):
        rows = json.loads((tmp_path / name / "report.json").read_text())["rows"]
        assert [row["task"] for row in rows] == tasks
    assert json.loads((tmp_path / "a" / "ruler.json").read_text())["lm_eval"] == lm_eval.__version__
    table = (tmp_path / "b" / "report.md").read_text()
    assert f"by lm-eval {lm_eval.__version__}, with jargon for its essays" in table
    # the data may come later, and stay as it is
    with ScriptedServer(reader) as server:
        assert run(server, folder, tmp_path / "a", *words, *data) == 0
        assert len(server.requests) == 2
        assert run(server, folder, tmp_path / "a", *words, "--squad", str(folder / "hotpot.json")) == 2
        (folder / "other.json").write_text(
            (folder / "squad.json").read_text().replace("Person 1", "Person 0")
        )
        assert run(server, folder, tmp_path / "a", *words, "--squad", str(folder / "other.json")) == 2
    assert "holds a run with squad '" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--suite", "ruler_qa_squad"],
            "--suite has ruler_qa_squad; give its data as --squad FILE (SQuAD 2.0, dev",
        ),
        (["--suite", "ruler", "--hotpot", "none.json"], "--hotpot is 'none.json', which does not exist"),
        (["--suite", "niah", "--squad", "SQUAD"], "--squad is given; it has no effect without --suite ruler"),
        (["--suite", "ruler", "--tokenizer", "ic-nano"], "tokenizer has 264 tokens: RULER asks in English"),
        (
            ["--suite", "ruler_vt", "--lengths", "512"],
            "--lengths has 512; ruler_vt with this model takes from",
        ),
        (
            ["--suite", "ruler_cwe", "--lengths", "1M"],
            "--lengths has 1048576; ruler_cwe with this model takes from",
        ),
        (["--suite", "ruler_qa_squad", "--squad", "SQUAD"], "--squad has 40 of them"),
        (["--suite", "ruler_qa_squad", "--squad", "HOTPOT"], "which lm-eval cannot read"),
        (
            ["--suite", "niah_single_1", "--lengths", "4M"],
            "--lengths has 4194304; this model takes from 512 to",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_and_nothing_is(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    files = {"SQUAD": str(folder / "squad.json"), "HOTPOT": str(folder / "hotpot.json")}
    words = [files.get(word, word) for word in arguments]
    with ScriptedServer(lambda body: "", max_model_len=1_048_576) as server:
        status = run(server, folder, tmp_path, "--questions", "41", *words)
    assert status == 2
    assert message in capsys.readouterr().err
    assert server.requests == []
    # the next command may have other settings
    assert not (tmp_path / "run.json").exists()


def test_a_length_that_a_task_of_ruler_does_not_take_leaves_that_task_out(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--questions", "1", "--lengths", "512,1k", "--suite"]
    with ScriptedServer(reader) as server:
        assert run(server, folder, tmp_path / "named", *words, "ruler,ruler_vt") == 2
        assert "--lengths has 512; ruler_vt with this model takes from" in capsys.readouterr().err
        assert server.requests == []
        assert run(server, folder, tmp_path / "out", *words, "ruler") == 0
        shown = capsys.readouterr()
        asked = len(server.requests)
        assert run(server, folder, tmp_path / "out", *words, "ruler") == 0
        assert len(server.requests) == asked
    (note,) = re.findall(r"not asked: ruler_vt at 512 tokens: with this model takes from \d+ on", shown.err)
    assert f"{note}.\n" in shown.out
    assert f"{note}.\n" in (tmp_path / "out" / "report.md").read_text()
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    found = [(row["task"], row["context_tokens"]) for row in rows]
    left_out = [(name, tokens) for name in OFFLINE for tokens in (512, 1024) if (name, tokens) not in found]
    assert ("ruler_vt", 512) in left_out
    assert ("niah_single_1", 512) in found
    assert len(re.findall("^not asked: .* at 512 tokens", shown.err, re.MULTILINE)) == len(left_out)


def test_the_whole_of_ruler_is_asked_at_a_million_tokens_but_for_its_few_words() -> None:
    left_out = check_ruler(plan(), OFFLINE, [4096, 1_048_576], optional=OFFLINE)
    assert list(left_out) == [("ruler_cwe", 1_048_576)]
    assert re.fullmatch(r"with this model takes from \d+ to \d+", left_out["ruler_cwe", 1_048_576])


def test_nothing_that_can_be_asked_is_refused(tmp_path: Path) -> None:
    wanted = Run(
        folder=tmp_path / "out",
        plan=Plan(haystack=HAYSTACK, tokenizer=TOKENIZER, num_questions=1, keys_per_context=1, seed=1),
        suites=OFFLINE,
        lengths_tokens=[64],
        texts=1,
        labels={},
        settings={},
        ruler=plan(),
        optional=OFFLINE,
    )
    with ScriptedServer(reader) as server:
        engine = Server(Client(server.url), ServedModel(name="", max_tokens=None, engine=""), TOKENIZER)
        with pytest.raises(
            ValueError, match=r"--lengths has 64; .* takes from .*, and no other task takes it"
        ):
            asyncio.run(evaluate(wanted, engine))
    assert not wanted.folder.exists()


def test_every_question_has_to_have_room_for_its_documents(tmp_path: Path, folder: Path) -> None:
    entries = json.loads((folder / "hotpot.json").read_text())
    entries[2]["context"][0][1] = [" ".join(HAYSTACK.split()[:1000])]
    (tmp_path / "hotpot.json").write_text(json.dumps(entries))
    ours = plan()
    ours.data["hotpot"] = tmp_path / "hotpot.json"
    # the others have: it would be found when they are answered
    with pytest.raises(ValueError, match="--lengths has 1024; ruler_qa_hotpot with this model takes from"):
        check_ruler(ours, ["ruler_qa_hotpot"], [1024])
    ours.num_questions = 2
    assert check_ruler(ours, ["ruler_qa_hotpot"], [1024]) == {}


def test_ic_nano_in_process_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(checkpoint_path("ic-nano"))
    assert cli.main(["evaluate", folder, "--suite", "ruler", "--out", str(tmp_path)]) == 2
    assert "ic-nano knows bytes, and the words of niah only" in capsys.readouterr().err
    assert not (tmp_path / "answers.jsonl").exists()


def test_sentences_are_split_without_nltks_data(monkeypatch: pytest.MonkeyPatch) -> None:
    split = prepare_niah.cached_sent_tokenize
    assert split("It is so. Is it? It is.") == ["It is so.", "Is it?", "It is."]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything here is local: what lm-eval fetches would be found by this."""
    import requests

    def refuse(*arguments, **named):
        raise AssertionError(f"the network was asked for {arguments}")

    monkeypatch.setattr(requests, "get", refuse)
    yield
