"""The server that the demo starts: how its failures look, and that it always ends."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demo.progress import Progress, last_log_message
from demo.server import Server, ServerError, choose_port


@pytest.fixture
def progress():
    return Progress(io.StringIO())


def test_a_server_that_dies_shows_the_end_of_its_log(fake_vllm, progress, tmp_path):
    fake_vllm("dies")
    with pytest.raises(ServerError) as caught, Server(tmp_path) as server:
        server.wait_until_healthy(30, progress)
    message = str(caught.value)
    assert "ended by itself with exit status 3" in message
    assert "| ValueError: no such thing" in message
    log = Path(re.search(r"whole log: (\S+)", message)[1])
    assert "ValueError: no such thing" in log.read_text()
    log.unlink()


def test_a_server_that_hangs_is_given_up_and_killed(fake_vllm, progress, tmp_path):
    fake = fake_vllm("hangs")
    message = "not healthy after 2 s; --timeout SECONDS gives it longer"
    with pytest.raises(ServerError, match=message), Server(tmp_path, stop_grace_s=0.5) as server:
        fake.wait_for_start()
        server.wait_until_healthy(2, progress)
    assert fake.processes_left() == []
    server.log.unlink()


def test_a_healthy_server_is_stopped_with_its_children(fake_vllm, progress, tmp_path):
    fake = fake_vllm("right")
    with Server(tmp_path) as server:
        server.wait_until_healthy(30, progress)
        assert last_log_message(server.log) == "loading"
    assert fake.processes_left() == []
    assert not server.log.exists()


def test_the_log_is_kept_when_asked_for(fake_vllm, progress, tmp_path):
    fake_vllm("right")
    with Server(tmp_path, keep_log=True) as server:
        server.wait_until_healthy(30, progress)
    assert "loading" in server.log.read_text()
    server.log.unlink()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_signal_to_the_demo_leaves_the_server(fake_vllm, bare_checkpoint, tmp_path, number):
    fake = fake_vllm("hangs")
    program = (
        "import demo.server, pathlib, sys; from demo.run import main; "
        f"demo.server.vllm_executable = lambda: pathlib.Path({str(fake.script)!r}); "
        "demo.server.STOP_GRACE_S = 0.5; sys.exit(main())"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    demo = subprocess.Popen(
        [sys.executable, "-c", program, "--model", str(bare_checkpoint), "--tokens", "2000"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    fake.wait_for_start()
    demo.send_signal(number)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode in (128 + number, -number), output
    assert "Traceback" not in output
    assert fake.processes_left() == []
    kept = list(tmp_path.glob("infinite-context-demo-*.log"))
    assert kept == [] or number == signal.SIGKILL


def test_a_busy_port_is_refused():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(ServerError, match=rf"--port is {port}, which cannot be used \(.* in use\)"):
            choose_port(port)


def test_plain_progress_does_not_repeat_itself():
    stream = io.StringIO()
    progress = Progress(stream)
    for _ in range(3):
        progress.show("loading")
        time.sleep(0.01)
    progress.done("healthy")
    assert [line.split(" s  ")[1] for line in stream.getvalue().splitlines()] == ["loading", "healthy"]
