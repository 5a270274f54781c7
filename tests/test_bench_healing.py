"""Texts for healing: what is taken out of each kind of file, the questions, and chats made of the answers."""

import json

import pytest
from ic_model.byte_tokenizer import build_byte_tokenizer

from bench.cases import healing_texts
from bench.cases.healing_texts import extract, write_questions

NOUNS = """  1 a licence
00000001 03 n 02 sea 0 ocean 0 000 | a division of an ocean or a large body of salt water, partially enclosed
00000002 03 n 01 ship 0 000 | a vessel that carries passengers or freight
"""
RANKED = (
    "sea%1:17:00:: 1 9\nship%1:06:00:: 1 5\nwrite%2:36:00:: 1 7\nwarm%3:00:00:: 1 3\nodd!%1:00:00:: 1 8\n"
)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        (
            "page.html",
            "<head>no</head><nav>no</nav><h1>One</h1><p>two\n three &amp; four</p><pre>a\n  b</pre>",
            "One\n\ntwo three & four\n\na\n b",
        ),
        (
            "perl.pod",
            "=head1 NAME\n\nSee L<the page|perlfunc> and C<print>.\n",
            "NAME\n\nSee the page and print.",
        ),
        ("data.noun", NOUNS.splitlines()[2], "ship: a vessel that carries passengers or freight"),
        ("notes.rst", "  kept as it is \n", "kept as it is"),
    ],
)
def test_text_of_each_kind_of_file(name, content, text):
    assert extract(name, content) == text


def make_questions(folder):
    words = folder / "wordnet"
    words.mkdir()
    (words / "data.noun").write_text(NOUNS)
    (words / "cntlist.rev").write_text(RANKED)
    target = folder / "questions.jsonl"
    write_questions(words, target, number=40, seed=1)
    return [json.loads(line) for line in target.read_text().splitlines()]


def test_questions_are_requests_of_common_words(tmp_path):
    requests = make_questions(tmp_path)
    asked = [request["body"]["messages"][0]["content"] for request in requests]
    assert len(asked) == 40 and len(set(asked)) > 20
    assert [request["custom_id"] for request in requests] == [str(place) for place in range(40)]
    assert not any("odd!" in question or "{" in question for question in asked)
    assert any("sea" in question and "ship" in question for question in asked)


def test_chats_are_questions_with_their_answers(tmp_path, capsys):
    requests = make_questions(tmp_path)
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "source")
    answered = [
        {
            "custom_id": str(place),
            "response": {"body": {"choices": [{"message": {"content": f"answer {place}"}}]}},
        }
        for place in (3, 0)
    ]
    batch = tmp_path / "batch.jsonl"
    batch.write_text(
        "".join(json.dumps(line) + "\n" for line in [*answered, {"custom_id": "1", "response": None}])
    )
    arguments = [str(tmp_path), "--answers", str(batch)]
    assert healing_texts.main([*arguments, "--tokenizer", str(tmp_path / "source")]) == 0
    assert "2 chats, 38 questions without an answer" in capsys.readouterr().out
    chats = [json.loads(line)["text"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    questions = [request["body"]["messages"][0]["content"] for request in requests]
    assert chats == [f"<user>{questions[0]}<assistant>answer 0", f"<user>{questions[3]}<assistant>answer 3"]
    assert healing_texts.main(arguments) == 2
    assert "--tokenizer must be the folder" in capsys.readouterr().err


def test_what_cannot_be_fetched_is_named(tmp_path, capsys, monkeypatch):
    assert healing_texts.main([str(tmp_path), "--packages", "novels"]) == 2
    assert "--packages has 'novels'; accepted: anarchism" in capsys.readouterr().err
    monkeypatch.setitem(healing_texts.PACKAGES, "no-such-package", healing_texts.PACKAGES["anarchism"])
    assert healing_texts.main([str(tmp_path), "--packages", "no-such-package"]) == 2
    assert "no-such-package cannot be fetched: E: " in capsys.readouterr().err
