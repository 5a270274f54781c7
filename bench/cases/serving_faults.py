"""Faults against real servers: each has to end in a clear error or go on, and none may hang."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ic_model.byte_tokenizer import build_byte_tokenizer
from safetensors.torch import load_file, save_file

from bench.cases.serving_engine import on_gpu, random_prompt
from bench.cases.serving_server import Server, ServerFailed, serve

if TYPE_CHECKING:
    from bench.cases.serving import Run

START_WITHIN_S = 240
ENDS_WITHIN_S = 90


class Fault(Exception):
    """What was seen is not what has to be."""


def provoke_all(run: Run) -> None:
    """A row per fault: what was seen, and after how long."""
    wanted = run.chosen([*STARTS, *LIVE])
    for name, provoke in STARTS.items():
        # on a CPU vLLM takes its own backend, whatever is asked for
        if name in wanted and (on_gpu() or provoke is not _other_architecture):
            _provoke(run, name, lambda provoke=provoke: provoke(run))
    with tempfile.TemporaryDirectory() as scratch:
        # the last one ends the server
        live = {name: provoke for name, provoke in LIVE.items() if name in wanted}
        if not live:
            return
        arguments = ["--max-model-len", "131072", *json.loads(run.options.serve)]
        try:
            with serve(
                run.model("ours"), arguments, Path(scratch) / "log", healthy_within_s=START_WITHIN_S
            ) as server:
                for name, provoke in live.items():
                    _provoke(run, name, lambda provoke=provoke: provoke(server))
        except ServerFailed as error:
            run.error("server", str(error))


def _provoke(run: Run, name: str, provoke: Callable[[], str]) -> None:
    print(name, flush=True)
    if run.left_s < 30:
        run.error(name, "no time left; choose faults with --only")
        return
    began = time.monotonic()
    try:
        seen, held = provoke(), True
    except Fault as fault:
        seen, held = str(fault), False
        run.error(name, seen)
    run.add(
        {
            "model": run.options.model,
            "impl": "ours",
            "fault": name,
            "held": held,
            "seen": seen[-600:],
            "seconds": round(time.monotonic() - began, 1),
        }
    )


def _refuses_to_start(run: Run, model: Path, arguments: list[str], message: str) -> str:
    """The line of the server's log that says why it ended."""
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        try:
            given = [*arguments, *json.loads(run.options.serve)]
            with serve(model, given, log, healthy_within_s=START_WITHIN_S):
                raise Fault("the server started")
        except ServerFailed as error:
            text = log.read_text(errors="replace")
            if "exit None" in str(error):
                raise Fault(f"neither started nor ended within {START_WITHIN_S} s") from None
    lines = [line for line in text.splitlines() if message in line]
    if not lines:
        raise Fault(f"it ended, but no line of its log has {message!r}: {text[-1500:]}")
    return lines[-1].strip()


@contextmanager
def _copy(run: Run) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(shutil.copytree(run.model("ours"), Path(scratch) / "model"))


def _truncated_weights(run: Run) -> str:
    with _copy(run) as folder:
        file = folder / "model.safetensors"
        os.truncate(file, file.stat().st_size // 2)
        return _refuses_to_start(run, folder, [], "SafetensorError")


def _missing_tensor(run: Run) -> str:
    with _copy(run) as folder:
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.self_attn.kv_b_proj.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return _refuses_to_start(run, folder, [], "lacks 1 tensors of InfiniteContextForCausalLM")


def _wrong_configuration(run: Run) -> str:
    with _copy(run) as folder:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "qk_rope_head_dim": 63}))
        return _refuses_to_start(run, folder, [], "qk_rope_head_dim is 63; it must be even")


def _wrong_option(run: Run) -> str:
    section = json.dumps({"infinite_context": {"decode": "fast"}})
    return _refuses_to_start(
        run, run.model("ours"), ["--additional-config", section], "is 'fast'; accepted: hopper"
    )


def _wrong_vllm(run: Run) -> str:
    code = "import vllm, ic_vllm_plugin\nvllm.__version__ = '0.99.0'\nic_vllm_plugin.register()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=ENDS_WITHIN_S
    )
    last = done.stderr.strip().splitlines()[-1]
    if "vLLM 0.99.0 is installed" not in last or not done.returncode:
        raise Fault(f"exit {done.returncode}: {last}")
    return last


def _other_architecture(run: Run) -> str:
    """A model with attention of another kind, and our backend asked for by name."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        config = LlamaConfig(
            vocab_size=264, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(scratch)
        build_byte_tokenizer().save_pretrained(scratch)
        return _refuses_to_start(
            run,
            Path(scratch),
            ["--attention-backend", "CUSTOM", "--max-model-len", "1024"],
            "non-MLA not supported",
        )


def _alive(server: Server) -> str:
    status, answer = server.complete([1, 2, 3], timeout_s=ENDS_WITHIN_S, max_tokens=2)
    if status != 200:
        raise Fault(f"afterwards the server answers {status}: {answer}")
    return "the next request was answered"


def _over_the_limit(server: Server) -> str:
    status, answer = server.complete([1] * 131073, max_tokens=1)
    message = answer["error"]["message"]
    if status != 400 or "context length" not in message:
        raise Fault(f"status {status}: {message}")
    return f"status {status}: {message}; {_alive(server)}"


def _thousand_at_once(server: Server) -> str:
    with ThreadPoolExecutor(200) as pool:
        prompts = [random_prompt(20, seed) for seed in range(1000)]
        found = list(pool.map(lambda prompt: server.complete(prompt, max_tokens=4)[0], prompts))
    if found.count(200) != len(found):
        raise Fault(
            f"{len(found) - found.count(200)} of {len(found)} failed, with status {sorted(set(found))}"
        )
    return f"{len(found)} answered; {_alive(server)}"


def _cancelled_mid_prefill(server: Server) -> str:
    """A client that goes away while its long prompt is read."""
    body = json.dumps({"model": server.model, "prompt": random_prompt(120_000, 7), "max_tokens": 64}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        deadline = time.monotonic() + ENDS_WITHIN_S
        while server.metric("vllm:num_requests_running") < 1:
            if time.monotonic() > deadline:
                raise Fault("the request never ran")
            time.sleep(0.05)
    began = time.monotonic()
    while server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting") > 0:
        if time.monotonic() - began > ENDS_WITHIN_S:
            raise Fault(f"the request still runs {ENDS_WITHIN_S} s after its client has gone")
        time.sleep(0.1)
    return f"gone after {time.monotonic() - began:.1f} s; {_alive(server)}"


def _killed_engine(server: Server) -> str:
    """SIGKILL to the engine's process, while a request runs: the server has to end, and the client to be told."""
    engine = _engine_process(server.process.pid)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(
            server.complete, random_prompt(100, 3), ENDS_WITHIN_S, max_tokens=4000, ignore_eos=True
        )
        time.sleep(1.5)
        os.kill(engine, signal.SIGKILL)
        began = time.monotonic()
        status, answer = asked.result()
    if status == 200:
        raise Fault("the request was answered by an engine that is dead")
    code = server.wait(ENDS_WITHIN_S)
    if code is None:
        raise Fault(
            f"the server still runs {ENDS_WITHIN_S} s after its engine was killed; healthy: {server.healthy()}"
        )
    said = str(answer["error"])[:200]
    return (
        f"request: status {status}, {said}; server ended with {code} after {time.monotonic() - began:.1f} s"
    )


def _engine_process(server_pid: int) -> int:
    """The engine among a server's processes: by the name that vLLM gives it, else the one child that can be it.

    vLLM names its processes by setproctitle, which does nothing where an import has changed the first variable of
    the environment.
    """
    named, children = [], []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().partition(") ")
            parent, session = int(rest.split()[1]), int(rest.split()[3])
            command = (stat.parent / "cmdline").read_text()
        except (OSError, ValueError, IndexError):
            continue
        if session == server_pid and ("EngineCor" in name or "EngineCore" in command):
            named.append(int(stat.parent.name))
        if parent == server_pid and "resource_tracker" not in command:
            children.append(int(stat.parent.name))
    if named:
        return min(named)
    if len(children) != 1:
        raise Fault(f"no process of the server is called EngineCore, and it has {len(children)} children")
    return children[0]


STARTS: dict[str, Callable[[Any], str]] = {
    "wrong vLLM version": _wrong_vllm,
    "corrupt checkpoint: truncated": _truncated_weights,
    "corrupt checkpoint: a tensor is missing": _missing_tensor,
    "corrupt checkpoint: configuration": _wrong_configuration,
    "wrong option": _wrong_option,
    "our backend for a model without MLA": _other_architecture,
}
LIVE: dict[str, Callable[[Server], str]] = {
    "request over the limit": _over_the_limit,
    "a thousand short requests at once": _thousand_at_once,
    "request cancelled mid-prefill": _cancelled_mid_prefill,
    "killed engine": _killed_engine,
}
