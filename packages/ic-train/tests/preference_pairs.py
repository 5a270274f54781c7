"""What the tests of preference pairs share: a text, the command, and a reader of documents."""

import inspect
import json
import re
import typing
from pathlib import Path

from ic_model import checkpoint_path

from ic_train import cli
from ic_train.preferences.store import Preferences, load_preferences

NANO = str(checkpoint_path("ic-nano"))


def write_haystack(folder: Path) -> Path:
    """Program text, as ic-nano was trained on."""
    path = folder / "sources.txt"
    path.write_text(inspect.getsource(typing) + inspect.getsource(inspect))
    return path


def words(out: Path, haystack: Path, *arguments: str) -> list[str]:
    """The command's words; the last of an option counts."""
    chosen = ["data", "preferences", str(out), "--haystack", str(haystack), "--licence", "PSF-2.0"]
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


def scripted(body) -> str:
    """Takes the first value of a name, and says where there is none the first of all values."""
    document, _, asked = bytes(body["prompt"]).decode().rpartition("\nQuestion: ")
    key = re.findall(r"for (\w+)\?", asked)[0]
    return f" {(stated(document, key) or stated(document, '[a-zA-Z]+'))[0]}.\nand so on"
