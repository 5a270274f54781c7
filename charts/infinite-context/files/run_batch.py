"""Run `vllm run-batch` over a folder, in chunks, so that a killed job goes on where it stopped.

    python3 run_batch.py --folder /data --chunk-requests 1000 -- vllm run-batch --model MODEL

Below the folder: `in/*.jsonl` are requests in OpenAI's batch format; for each of these files, `out/` has one of
answers and `dead/` one of requests that cannot be answered; `work/` is ours. A request is finished once it stands
in out/ or dead/, and is never run again. What a kill can cost is the chunk that was running.

A request that takes the engine down is found by halving: after a crash, what was in the chunk runs in chunks of
half the size, until the guilty one stands alone; alone it gets its tries and is then dead. Before anything is
blamed on a request, an empty batch shows that the engine starts at all. Standard library only.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

# 4xx that may go away by themselves: request timeout, too many requests
RETRIED_4XX = (408, 429)
DEAD_LETTERS_STATUS = 3


class EngineError(Exception):
    """The engine does not start, whatever the requests."""


class Stopped(Exception):
    """SIGTERM: the pod is being removed."""


@dataclass(frozen=True)
class Request:
    """Where a well-formed request stands."""

    custom_id: str
    line: int
    offset: int


@dataclass
class Tries:
    """What happened to a request that is not finished: crashes in its chunk, of these alone, and server errors."""

    crashes: int = 0
    alone: int = 0
    errors: int = 0


@dataclass
class Batch:
    """One input file with its outputs and its state on the disk."""

    source: Path
    out: Path
    dead: Path
    work: Path
    tries: dict[str, Tries] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, source: Path) -> Batch:
        """Make the folders, repair a line that was half written, and read the state."""
        batch = cls(
            source, folder / "out" / source.name, folder / "dead" / source.name, folder / "work" / source.stem
        )
        for path in (batch.out, batch.dead, batch.work / "state"):
            path.parent.mkdir(parents=True, exist_ok=True)
        for path in (batch.out, batch.dead):
            drop_torn_line(path)
        if batch.state.is_file():
            batch.tries = {key: Tries(**value) for key, value in json.loads(batch.state.read_text()).items()}
        return batch

    @property
    def state(self) -> Path:
        """File of the tries."""
        return self.work / "tries.json"

    def save(self) -> None:
        """Write the tries, as a whole or not at all."""
        text = json.dumps({key: vars(value) for key, value in self.tries.items()})
        write_whole(self.state, text)

    def pending(self) -> list[Request]:
        """Requests that are neither answered nor dead. What is malformed is buried here."""
        answered = {entry["custom_id"] for entry in entries(self.out)}
        dead_lines = {entry["line"] for entry in entries(self.dead)}
        seen: set[str] = set()
        found, malformed = [], []
        for line, offset, text in lines_of(self.source):
            if not text.strip() or line in dead_lines:
                # a dead request keeps its id: another line with it is still a duplicate
                seen |= id_of(text)
                continue
            request, problem = parse(text)
            if not problem and request["custom_id"] in seen:
                problem = f"custom_id {request['custom_id']!r} is used by an earlier line"
            if problem:
                malformed.append(dead_letter(line, text, problem))
                continue
            seen.add(request["custom_id"])
            if request["custom_id"] not in answered:
                found.append(Request(request["custom_id"], line, offset))
        append(self.dead, malformed)
        return found

    def text(self, request: Request) -> str:
        """The line of a request."""
        with self.source.open("rb") as file:
            file.seek(request.offset)
            return file.readline().decode("utf-8").rstrip("\r\n")

    def bury(self, request: Request, reason: str, response: Any = None) -> None:
        """Write a dead letter."""
        append(self.dead, [dead_letter(request.line, self.text(request), reason, response)])
        self.tries.pop(request.custom_id, None)


def parse(text: str) -> tuple[dict[str, Any], str]:
    """A request, or what is wrong with it. One bad line would make vLLM refuse its whole file."""
    try:
        request = json.loads(text)
    except ValueError as error:
        return {}, f"not JSON: {error}"
    if not isinstance(request, dict):
        return {}, f"a JSON {type(request).__name__}; wanted an object"
    for key, kind in (("custom_id", str), ("method", str), ("url", str), ("body", dict)):
        if not isinstance(request.get(key), kind):
            wanted = "an object" if kind is dict else "a string"
            return {}, f"{key} is {json.dumps(request.get(key))[:80]}; wanted {wanted}"
    if request["method"] != "POST":
        return {}, f"method is {request['method']!r}; accepted: POST"
    return request, ""


def id_of(text: str) -> set[str]:
    """The id of a line that may be anything."""
    request, problem = parse(text) if text.strip() else ({}, "empty")
    return set() if problem else {request["custom_id"]}


def lines_of(path: Path) -> Iterator[tuple[int, int, str]]:
    """Number, byte offset and text of each line; bytes that are no UTF-8 are kept visible."""
    with path.open("rb") as file:
        offset = 0
        for number, line in enumerate(file, start=1):
            yield number, offset, line.decode("utf-8", "backslashreplace").rstrip("\r\n")
            offset += len(line)


def dead_letter(line: int, request: str, reason: str, response: Any = None) -> dict[str, Any]:
    """What stands in dead/."""
    return {"line": line, "reason": reason, "response": response, "request": request}


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON lines of a file that may not exist."""
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    yield json.loads(line)


def complete_entries(path: Path) -> list[dict[str, Any]]:
    """The same for a file whose writer may have been killed: without a last line that has no end."""
    drop_torn_line(path)
    return list(entries(path))


def drop_torn_line(path: Path) -> None:
    """Cut off what a kill left behind the last line's end."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        keep = size
        while keep and _byte_before(file, keep) != b"\n":
            keep -= 1
        if keep < size:
            file.truncate(keep)


def _byte_before(file: IO[bytes], position: int) -> bytes:
    file.seek(position - 1)
    return file.read(1)


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add lines, on the disk before this returns."""
    if rows:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step."""
    new = path.with_suffix(".new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


class Runner:
    """Runs the batches of a folder.

    Args:
        command: `vllm run-batch` with its flags; `-i` and `-o` are added.
        chunk_requests: requests per start of the engine.
        max_attempts: tries for a request that fails by a server error, or alone takes the engine down.
    """

    def __init__(self, command: list[str], *, chunk_requests: int, max_attempts: int) -> None:
        self.command = command
        self.chunk_requests = chunk_requests
        self.max_attempts = max_attempts
        self._engine: subprocess.Popen[bytes] | None = None
        # whether the engine has been seen to work since the last time that it did not
        self._works = False

    def run(self, batch: Batch) -> Counter[str]:
        """Finish a batch; how many of its requests are answered and dead."""
        # a result that was written and not yet taken when the last job was killed
        self._take(batch, {request.custom_id: request for request in batch.pending()})
        while pending := batch.pending():
            chunk = self._next_chunk(batch, pending)
            if chunk:
                self._run_chunk(batch, chunk, left=len(pending))
        batch.state.unlink(missing_ok=True)
        return Counter(answered=sum(1 for _ in entries(batch.out)), dead=sum(1 for _ in entries(batch.dead)))

    def _next_chunk(self, batch: Batch, pending: list[Request]) -> list[Request]:
        """The next requests: those with the fewest crashes first, so that suspects hold nobody up."""
        crashes = min(batch.tries.get(request.custom_id, Tries()).crashes for request in pending)
        size = max(1, self.chunk_requests >> crashes)
        chunk = [
            request for request in pending if batch.tries.get(request.custom_id, Tries()).crashes == crashes
        ][:size]
        first = batch.tries.get(chunk[0].custom_id, Tries())
        if len(chunk) == 1 and first.alone >= self.max_attempts:
            self._check_engine(batch)
            batch.bury(
                chunk[0], f"the engine ended without an answer, {first.alone} times with this request alone"
            )
            batch.save()
            return []
        return chunk

    def _run_chunk(self, batch: Batch, chunk: list[Request], *, left: int) -> None:
        say(f"{batch.source.name}: {len(chunk)} requests of {left} that are left")
        write_whole(batch.work / "chunk.jsonl", "".join(batch.text(request) + "\n" for request in chunk))
        (batch.work / "result.jsonl").unlink(missing_ok=True)
        # counted before the engine runs: it may take this process down with it
        self._count_crash(batch, chunk, 1)
        try:
            status = self._run_engine(batch.work / "chunk.jsonl", batch.work / "result.jsonl")
        except Stopped:
            self._count_crash(batch, chunk, -1)
            raise
        if status != 0:
            say(f"{batch.source.name}: the engine ended with status {status}")
            try:
                if not self._works:
                    self._check_engine(batch)
            except (EngineError, Stopped):
                self._count_crash(batch, chunk, -1)
                raise
            return
        self._works = True
        self._count_crash(batch, chunk, -1)
        self._take(batch, {request.custom_id: request for request in chunk}, whole=True)

    def _count_crash(self, batch: Batch, chunk: list[Request], number: int) -> None:
        for request in chunk:
            tries = batch.tries.setdefault(request.custom_id, Tries())
            tries.crashes += number
            tries.alone += number * (len(chunk) == 1)
        batch.tries = {key: tries for key, tries in batch.tries.items() if tries != Tries()}
        batch.save()

    def _take(self, batch: Batch, wanted: dict[str, Request], *, whole: bool = False) -> None:
        """Move results to where they belong. `whole`: what has no result counts as a server error."""
        result = batch.work / "result.jsonl"
        answers, failures = [], {}
        for entry in complete_entries(result):
            request = wanted.pop(str(entry.get("custom_id")), None)
            if request is None:
                continue
            if succeeded(entry):
                answers.append(entry)
            else:
                failures[request] = entry
        append(batch.out, answers)
        for entry in answers:
            batch.tries.pop(entry["custom_id"], None)
        if whole:
            failures |= dict.fromkeys(wanted.values())
        for request, entry in failures.items():
            self._count_error(batch, request, entry)
        batch.save()
        result.unlink(missing_ok=True)

    def _count_error(self, batch: Batch, request: Request, entry: dict[str, Any] | None) -> None:
        status = ((entry or {}).get("response") or {}).get("status_code")
        tries = batch.tries.setdefault(request.custom_id, Tries())
        tries.errors += 1
        if isinstance(status, int) and 400 <= status < 500 and status not in RETRIED_4XX:
            batch.bury(request, f"refused with status {status}", entry)
        elif tries.errors >= self.max_attempts:
            batch.bury(request, f"status {status} after {tries.errors} tries", entry)

    def _check_engine(self, batch: Batch) -> None:
        """An empty batch: fails when the engine does not start.

        Raises:
            EngineError: it does not.
        """
        say("checking with an empty batch that the engine starts")
        empty = batch.work / "empty.jsonl"
        empty.write_text("")
        status = self._run_engine(empty, batch.work / "empty-result.jsonl")
        self._works = status == 0
        if status != 0:
            raise EngineError(
                f"the engine does not start (status {status}), so no request is to blame; see above"
            )

    def _run_engine(self, source: Path, target: Path) -> int:
        """The engine's exit status.

        Raises:
            Stopped: SIGTERM came.
        """
        stopped = []

        def stop(*_: object) -> None:
            stopped.append(True)
            if self._engine is not None:
                self._engine.terminate()

        before = signal.signal(signal.SIGTERM, stop)
        try:
            # a group of its own, so that nothing of it outlives it
            self._engine = subprocess.Popen(
                [*self.command, "-i", str(source), "-o", str(target)], process_group=0
            )
            if stopped:
                self._engine.terminate()
            status = self._engine.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
            kill_group(self._engine)
            self._engine = None
        if stopped:
            raise Stopped
        return status


def kill_group(process: subprocess.Popen[bytes] | None) -> None:
    """End what a process may have left behind: an engine whose front end died still holds the GPU."""
    if process is not None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def succeeded(entry: dict[str, Any]) -> bool:
    """Whether a result is an answer."""
    response = entry.get("response") or {}
    return entry.get("error") is None and response.get("status_code") == 200


def say(text: str) -> None:
    """One line to the log, at once."""
    sys.stdout.write(f"run_batch: {text}\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 finished, 1 to be tried again, 3 finished with dead letters where that is a failure."""
    parser = argparse.ArgumentParser(description="Run `vllm run-batch` over a folder, restartable.")
    parser.add_argument("--folder", type=Path, required=True, help="with in/*.jsonl")
    parser.add_argument("--chunk-requests", type=int, default=1000)
    parser.add_argument("--max-attempts", type=int, default=3)
    parser.add_argument("--fail-on-dead-letters", action="store_true")
    parser.add_argument("command", nargs="+", help="vllm run-batch with its flags, after --")
    options = parser.parse_args(arguments)
    for name in ("chunk_requests", "max_attempts"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; accepted: 1 or more")
    sources = sorted((options.folder / "in").glob("*.jsonl"))
    (options.folder / "work").mkdir(parents=True, exist_ok=True)
    with (options.folder / "work" / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"another job works on {options.folder}; not started")
            return 1
        runner = Runner(
            options.command, chunk_requests=options.chunk_requests, max_attempts=options.max_attempts
        )
        total: Counter[str] = Counter()
        try:
            for source in sources:
                counts = runner.run(Batch.open(options.folder, source))
                say(f"{source.name}: {counts['answered']} answered, {counts['dead']} dead")
                total += counts
        except EngineError as error:
            say(str(error))
            return 1
        except Stopped:
            say("stopped by SIGTERM; the next job goes on here")
            return 128 + signal.SIGTERM
    say(f"{len(sources)} files: {total['answered']} answered, {total['dead']} dead")
    return DEAD_LETTERS_STATUS if options.fail_on_dead_letters and total["dead"] else 0


if __name__ == "__main__":
    sys.exit(main())
