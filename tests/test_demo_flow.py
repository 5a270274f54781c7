"""The demo from its arguments to its exit status, against a stand-in for vLLM."""

import re
import signal

import pytest
from fake_vllm import CONTEXT_TOKENS

from demo.run import main


@pytest.fixture(autouse=True)
def _handlers():
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def demo(bare_checkpoint):
    return lambda *arguments: main(["--model", str(bare_checkpoint), *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "10"], "--tokens is 10; it must be at least 1024"),
        (["--keys", "0"], "--keys is 0; it must be from 1 to 1000"),
        (["--keys", "3", "--question", "why?"], "give one of them"),
        (["--question", " "], "--question is empty"),
        (["--timeout", "0"], "--timeout is 0.0; it must be a number of seconds above 0"),
        (["--port", "70000"], "--port is 70000; it must be from 0 to 65535"),
        (["--seed", "-1"], "--seed is -1; it must be at least 0"),
        (["--tokens", "2000", "--keys", "50"], "at most 28 are accepted"),
        (["--tokens", "1600000"], "--tokens is 1600000; ic-nano's context is 1048576 tokens"),
        (["--document", "none.txt"], "--document is none.txt, which cannot be read: No such file"),
        (["--document", "."], "--document is ., which cannot be read: Is a directory"),
        (["--document", "none.txt", "--tokens", "5000"], "--tokens cuts the shipped document"),
        (["--model", "."], "the model is ., which has no config.json"),
    ],
)
def test_refusals(demo, capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert demo(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "which is empty; it must have some text"),
        (b" \n", "which is empty; it must have some text"),
        (b"\xff\xfe\x00", "which is not UTF-8 text (byte 0 is 0xff)"),
        (b"GIF\x00\x01", "which has zero bytes: a binary file, not UTF-8 text"),
        (b"ab", "--keys is 8; "),
        (b"x" * 1_100_000, "has 1,100,280 tokens; at most 1,048,5"),
    ],
)
def test_documents_that_cannot_be_used(demo, capsys, tmp_path, data, message):
    document = tmp_path / "document.txt"
    document.write_bytes(data)
    assert demo("--document", str(document)) == 2
    assert message in capsys.readouterr().err


def test_all_keys_found(demo, fake_vllm, capsys):
    fake = fake_vllm("right")
    assert demo("--tokens", "20000", "--keys", "5") == 0
    output = capsys.readouterr().out
    assert "5 of 5 right" in output
    assert len(re.findall(r"\d% +pass key for \w{6}\? +(\d{5}) +\1 +right", output)) == 5
    (tokens,) = re.findall(r"KV cache of these ([\d,]+) tokens", output)
    tokens = int(tokens.replace(",", ""))
    assert 19_500 < tokens <= 20_000
    # 4 layers in bfloat16: 4 heads of 128 + 128 numbers, against 256 + 64
    assert re.search(rf"multi-head attention .* 8,192 +{tokens * 8192 / 2**20:.1f} MiB", output)
    assert re.search(rf"latent cache .* 2,560 +{tokens * 2560 / 2**20:.1f} MiB", output)
    assert "68.8% less, both in bfloat16" in output
    assert 'pip install ./packages/ic-model ./packages/ic-train "./packages/ic-vllm-plugin[cuda]"' in output
    assert fake.processes_left() == []


def test_a_wrong_answer_is_a_failure(demo, fake_vllm, capsys):
    fake_vllm("wrong")
    assert demo("--tokens", "2000", "--keys", "2") == 1
    output = capsys.readouterr().out
    assert output.count("WRONG") == 2
    assert "0 of 2 right" in output


def test_keys_are_hidden_in_the_users_document(demo, fake_vllm, capsys, tmp_path):
    fake_vllm("right")
    document = tmp_path / "mine.txt"
    document.write_text("Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.\n" * 50)
    assert demo("--document", str(document), "--keys", "4") == 0
    output = capsys.readouterr().out
    assert "mine.txt" in output
    assert "4 of 4 right" in output


def test_own_questions_need_no_right_answer(demo, fake_vllm, capsys, tmp_path):
    fake_vllm("right")
    document = tmp_path / "mine.txt"
    document.write_text("Nothing to see here.\n")
    assert demo("--document", str(document), "--question", "Who {x}?", "--question", "Why?") == 0
    output = capsys.readouterr().out
    assert re.search(r"question +Who \{x\}\?\n +answer +what\?", output)
    assert "question  Why?" in output
    assert "nothing" in output


def test_a_pass_key_of_the_users_own(demo, fake_vllm, capsys, tmp_path):
    fake_vllm("right")
    document = tmp_path / "mine.txt"
    document.write_text("Once upon a time.\nThe pass key for MYWORD is 13579.\nThe end.\n")
    assert demo("--document", str(document), "--question", "What is the pass key for MYWORD?") == 0
    assert re.search(r"answer +13579", capsys.readouterr().out)


def test_a_document_longer_than_the_servers_context_is_refused(demo, fake_vllm, capsys):
    fake = fake_vllm("right")
    assert demo("--tokens", "40000") == 2
    assert f"the server's context on this machine is {CONTEXT_TOKENS:,} tokens" in capsys.readouterr().err
    assert fake.processes_left() == []


def test_a_server_that_dies_while_it_answers(demo, fake_vllm, capsys):
    fake = fake_vllm("dies-answering")
    assert demo("--tokens", "2000", "--keys", "1") == 3
    assert re.search(
        r"the server ended by itself|the connection to the server broke", capsys.readouterr().err
    )
    assert fake.processes_left() == []
