"""The scripts that the chart mounts: the pass key test when the server is wrong, and the download."""

import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from chart_tools import CHART

PASSKEY = [sys.executable, str(CHART / "files" / "passkey.py"), "--model", "m"]
DATA = bytes(range(256)) * 4096


class Handler(BaseHTTPRequestHandler):
    """Answers every question with 00000, and serves a file in ranges."""

    requests: list = []
    broken = False

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).requests.append((dict(self.headers), json.loads(body)))
        self._send(200, json.dumps({"choices": [{"text": " 00000.\n"}]}).encode())

    def do_GET(self):
        type(self).requests.append((dict(self.headers), self.path))
        if self.path == "/missing":
            self._send(404, b"")
            return
        start = (
            int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if "Range" in self.headers else 0
        )
        if start >= len(DATA):
            self._send(416, b"")
            return
        part = DATA[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[: len(part) // 2] if type(self).broken else part)
        type(self).broken = False
        self.close_connection = True

    def _send(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    Handler.requests, Handler.broken = [], False
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def run(command, **environment):
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={"PATH": "", **environment}
    )


def test_wrong_answers_fail_the_test_and_the_key_is_sent(url):
    done = run([*PASSKEY, "--url", url, "--seed", "1"], API_KEY="secret")
    assert done.returncode == 1
    assert "WRONG" in done.stdout and "0 of 3 right" in done.stdout
    headers, body = Handler.requests[0]
    assert headers["Authorization"] == "Bearer secret"
    assert body["prompt"].count("The pass key for") == 4, "three needles and the start of the answer"


def test_a_server_that_is_not_there_fails_the_test():
    done = run([*PASSKEY, "--url", "http://127.0.0.1:9"])
    assert done.returncode == 1 and "cannot be reached" in done.stderr


def download(url, folder, sha256=None, name="model.bin", path="/file", **environment):
    files = folder / "files.json"
    digest = sha256 or hashlib.sha256(DATA).hexdigest()
    files.write_text(json.dumps([{"url": url + path, "sha256": digest, "name": name}]))
    script = str(CHART / "files" / "download.py")
    return run(
        [sys.executable, script, "--files", str(files), "--folder", str(folder / "model"), "--tries", "2"],
        **environment,
    )


def test_a_file_is_fetched_once_and_its_sum_checked(url, tmp_path):
    done = download(url, tmp_path, name="sub/model.bin", DOWNLOAD_TOKEN="t")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / "sub" / "model.bin").read_bytes() == DATA
    assert Handler.requests[0][0]["Authorization"] == "Bearer t"
    assert "there already" in download(url, tmp_path, name="sub/model.bin").stdout
    assert len(Handler.requests) == 1


def test_a_connection_that_breaks_is_taken_up_where_it_broke(url, tmp_path):
    Handler.broken = True
    done = download(url, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "broke off after" in done.stderr
    assert Handler.requests[1][0]["Range"] == f"bytes={len(DATA) // 2}-"
    assert (tmp_path / "model" / "model.bin").read_bytes() == DATA


def test_another_sum_leaves_nothing_and_names_both(url, tmp_path):
    done = download(url, tmp_path, sha256="0" * 64)
    assert done.returncode == 1
    assert hashlib.sha256(DATA).hexdigest() in done.stderr and "0" * 64 in done.stderr
    assert list((tmp_path / "model").iterdir()) == []


def test_a_refusal_is_named(url, tmp_path):
    done = download(url, tmp_path, path="/missing")
    assert done.returncode == 1 and "answered 404" in done.stderr
