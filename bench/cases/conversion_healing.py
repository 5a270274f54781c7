"""From free texts and a source to the table of healed conversions and ten chats, in one command.

    python -m bench.cases.healing_texts TEXTS
    python -m bench.cases.conversion_healing SOURCE TEXTS WORK -- --device cuda --at-once 3 --heal-seconds 900

SOURCE is what `ic-train convert` takes, with a chat template. It answers questions first (`vllm run-batch`), while
the texts become a corpus and the first size is converted. Then all sizes are healed and measured by `ic-train
convert-table`, to which words after `--` go, and the model of `--chat` answers ten questions beside the source as
soon as it is healed. Every step that is done is left out when the same command runs again. Logs are in WORK.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ic_train.convert.source import open_source
from ic_train.convert.table import PAIRS
from ic_train.heal import load_source_model

from bench.cases.healing_texts import HELD_OUT, PACKAGES

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "packages" / "ic-train" / "recipes" / "ic-135m" / "heal.yaml"
# prose and technical text; what the default calibrates on, the Jargon File, is judged on here
CALIBRATION = ("linux-doc-6.12", "debian-handbook", "anarchism", "wordnet-base")
PASSKEY_TOKENS = ("512", "1024", "2048", "4096")
# of convert-table: what a conversion depends on, each with one value
CONVERSION_FLAGS = (
    "--device", "--seed",
    "--calibration-samples", "--calibration-tokens", "--evaluation-samples", "--evaluation-tokens",
)  # fmt: skip
# beside a healing
CHAT_MEMORY = "0.3"
POLL_S = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    options = _parser().parse_args(given[:end])
    try:
        Run(options, given[end + 1 :]).everything()
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


class Run:
    """The steps, each a command with its log.

    Args:
        options: of the command line.
        words: for `ic-train convert-table`.

    Raises:
        ValueError: the texts are not those of `bench.cases.healing_texts`.
    """

    def __init__(self, options: argparse.Namespace, words: Sequence[str]) -> None:
        self.options = options
        self.words = list(words)
        self.work: Path = options.work
        self.texts: Path = options.texts
        sources = self.texts / "sources.json"
        if not sources.is_file():
            raise ValueError(
                f"{sources} is not there; `python -m bench.cases.healing_texts {self.texts}` makes it"
            )
        self.packages = [row["package"] for row in json.loads(sources.read_text())]
        if HELD_OUT not in self.packages:
            raise ValueError(f"{sources} has no {HELD_OUT}, which is judged on")
        self.model = self.work / "source-model"
        self.work.mkdir(parents=True, exist_ok=True)

    def everything(self) -> None:
        """All steps.

        Raises:
            ValueError: one failed; its log is named.
        """
        once(self.model, self._write_source)
        with ThreadPoolExecutor() as pool:
            jobs = [
                pool.submit(self._documents),
                pool.submit(self._answers),
                pool.submit(self._convert_first),
            ]
        for job in jobs:
            job.result()
        ended = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            chat = pool.submit(self._chat, ended)
            try:
                self._run("table", *self._table(), *self.words)
            finally:
                ended.set()
            chat.result()
        print(f"results: {self.options.results}", flush=True)

    def _write_source(self, target: Path) -> None:
        """The folder that vLLM loads, with its tokenizer."""
        load_source_model(self.options.source).save_pretrained(target)
        open_source(self.options.source).tokenizer.save_pretrained(target)

    def _documents(self) -> None:
        words = [
            word
            for name in self.packages
            if name != HELD_OUT
            for word in ("--from", self.texts / f"{name}.txt", PACKAGES[name].licence)
        ]
        self._corpus("documents", *words)

    def _answers(self) -> None:
        """The source's answers as chats; without questions there are none."""
        if not self.options.questions:
            return
        batch, asked = self.work / "answers-batch.jsonl", self.work / "questions.jsonl"
        lines = (self.texts / "questions.jsonl").read_text().splitlines(keepends=True)
        asked.write_text("".join(lines[: self.options.questions]))

        def ask(target: Path) -> None:
            vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main", "run-batch", "-i", asked, "-o", target]
            flags = shlex.split(self.options.vllm_flags)
            self._run("answers", *vllm, "--model", self.model, "--served-model-name", "source", *flags)
            # it ends with status 0 when its engine has died, too
            if failed := unanswered(target):
                raise ValueError(f"{failed} questions have no answer; why is in {self.work / 'answers.log'}")

        once(batch, ask)
        join = [sys.executable, "-m", "bench.cases.healing_texts", self.texts, "--answers", batch]
        self._run("chats-text", *join, "--tokenizer", self.model)
        self._corpus("chats", "--from", self.texts / "answers.jsonl", self.options.licence)

    def _corpus(self, name: str, *words: str | Path) -> None:
        if not (self.work / name).is_dir():
            command = [sys.executable, "-m", "ic_train.cli", "data", "text", self.work / name]
            self._run(name, *command, "--tokenizer", self.model, *words)

    def _convert_first(self) -> None:
        """While the GPU has little else to do."""
        first = self.options.pairs[0]
        if (self.work / "models" / first.replace(":", "-") / "conversion.json").is_file():
            return
        command = self._table(heal=False)
        words = zip(["", *self.words], self.words, strict=False)
        command += [word for before, word in words if word in CONVERSION_FLAGS or before in CONVERSION_FLAGS]
        self._run("first", *command, "--pairs", first, "--results", self.work / "first")

    def _table(self, *, heal: bool = True) -> list[str | Path]:
        texts = [self.texts / f"{name}.txt" for name in CALIBRATION if name in self.packages]
        command = [sys.executable, "-m", "ic_train.cli", "convert-table", self.options.source]
        command += [
            self.work / "models",
            "--calibration",
            *texts,
            "--held-out",
            self.texts / f"{HELD_OUT}.txt",
        ]
        if heal:
            corpora = [path for path in (self.work / "documents", self.work / "chats") if path.is_dir()]
            command += ["--pairs", *self.options.pairs, "--heal-config", self.options.recipe]
            command += ["--corpora", *corpora, "--results", self.options.results]
            command += ["--passkey-tokens", *PASSKEY_TOKENS]
        return command

    def _chat(self, ended: threading.Event) -> None:
        if not self.options.chat:
            return
        healed = self.work / "models" / f"{self.options.chat.replace(':', '-')}-healed"
        while not (healed / "training.json").is_file():
            if ended.wait(POLL_S) and not (healed / "training.json").is_file():
                raise ValueError(f"{healed} was not healed: --chat is {self.options.chat!r}")
        command = [sys.executable, "-m", "bench.cases.conversion_chat", f"source={self.model}"]
        command += [f"healed={healed}", "--results", self.options.results]
        self._run("chat", *command, "--", "--gpu-memory-utilization", CHAT_MEMORY)

    def _run(self, name: str, *words: str | Path) -> None:
        command, log = [str(word) for word in words], self.work / f"{name}.log"
        print(f"{name}: {shlex.join(command[1:])}", flush=True)
        started = time.monotonic()
        with log.open("w") as out:
            status = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
        if status:
            said = log.read_text().strip().splitlines()[-1:]
            # at once: what runs beside it may take long
            print(f"{name}: failed, see {log}", flush=True)
            raise ValueError(f"{name} failed with status {status}: {' '.join(said)}; more in {log}")
        print(f"{name}: took {time.monotonic() - started:.0f} s", flush=True)


def unanswered(batch: Path) -> int:
    """Requests without an answer in what `vllm run-batch` wrote."""
    rows = map(json.loads, batch.read_text().splitlines())
    return sum((row.get("response") or {}).get("status_code") != 200 for row in rows)


def once(target: Path, make: Callable[[Path], None]) -> None:
    """Make a file or folder under another name first, so that a part of it is never taken for all of it."""
    if target.exists():
        return
    partial = target.with_name(f"{target.name}.partial")
    if partial.is_dir():
        shutil.rmtree(partial)
    make(partial)
    partial.rename(target)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.cases.conversion_healing", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="Hugging Face folder or .gguf file")
    add("texts", type=Path, metavar="TEXTS", help="of bench.cases.healing_texts")
    add("work", type=Path, metavar="WORK", help="folder for models, corpora and logs")
    # the one with a bar first: it is healed longest
    default = ["128:64", *(pair for pair in PAIRS if pair != "128:64")]
    add("--pairs", nargs="+", default=default, metavar="C:R", help=f"default: {' '.join(default)}")
    add("--recipe", type=Path, default=RECIPE, metavar="FILE", help="of ic_train.heal (default: ic-135m's)")
    add(
        "--questions",
        type=int,
        default=1500,
        metavar="N",
        help="that the source answers; 0: none (default: 1500)",
    )
    add("--licence", default="Apache-2.0", help="of the source, and so of its answers (default: Apache-2.0)")
    add(
        "--vllm-flags",
        default="--max-model-len 2048 --gpu-memory-utilization 0.4",
        metavar="WORDS",
        help="of vllm run-batch, as one word",
    )
    add("--chat", default="128:64", metavar="C:R", help="of the healed model that chats; '' for none")
    add("--results", type=Path, default=Path("bench/results"), metavar="DIR")
    return parser


if __name__ == "__main__":
    sys.exit(main())
