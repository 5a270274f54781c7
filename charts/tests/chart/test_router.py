"""The router's rendered configuration in a real HAProxy, in front of servers that say who they are.

Debian 12 has HAProxy 2.6, the chart's image 3.2. Two things are replaced for it: `hash-key`, which came with 3.0,
and the look-up in the cluster's DNS. The servers stand in for vLLM: one that drains or is overloaded on command.
"""

import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from chart_tools import one, render
from podman_tools import install_packages

REPLICAS = 3


class Replica(ThreadingHTTPServer):
    """Answers with its number; `status` is what it answers."""

    daemon_threads = True

    def handle_error(self, *_):
        """A health check that hangs up is no error."""

    def __init__(self, number):
        super().__init__(("127.0.0.1", 0), Handler)
        self.number, self.status, self.seen = number, 200, 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._answer(200 if self.path == "/health" else self.server.status)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen += 1
        self._answer(self.server.status)

    def _answer(self, status):
        body = str(self.server.number).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def replicas():
    servers = [Replica(number) for number in range(REPLICAS)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield servers
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def configuration():
    return one(render(set={"router.enabled": True}), "ConfigMap", "ic-infinite-context-router")["data"][
        "haproxy.cfg"
    ]


@pytest.fixture(scope="module")
def router(replicas, configuration, tmp_path_factory):
    """URL of the API and of the metrics."""
    install_packages({"/usr/sbin/haproxy": "haproxy"})
    ports = {"8080": free_port(), "8405": free_port()}
    for port, free in ports.items():
        configuration = configuration.replace(f"bind :{port}", f"bind 127.0.0.1:{free}")
    configuration = configuration.replace(" hash-key addr-port", "")
    (template,) = re.findall(r"^ *server-template .*$", configuration, re.MULTILINE)
    servers = [
        f"    server replica{server.number} 127.0.0.1:{server.server_address[1]}" for server in replicas
    ]
    file = tmp_path_factory.mktemp("router") / "haproxy.cfg"
    file.write_text(configuration.replace(template, "\n".join(servers)))
    haproxy = shutil.which("haproxy") or "/usr/sbin/haproxy"
    check = subprocess.run(
        [haproxy, "-c", "-f", str(file)], capture_output=True, text=True, check=False, timeout=30
    )
    assert check.returncode == 0, check.stderr
    process = subprocess.Popen([haproxy, "-db", "-f", str(file)], stdout=subprocess.DEVNULL)
    url, metrics = (f"http://127.0.0.1:{port}" for port in ports.values())
    try:
        deadline = time.monotonic() + 20
        while get(f"{url}/router-ready")[0] != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield url, metrics
    finally:
        process.terminate()
        process.wait(20)


def get(url, body=None, **headers):
    request = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""
    except OSError:
        return 0, ""


def ask(url, document, question, **headers):
    body = json.dumps({"messages": [{"role": "user", "content": document + question}], "model": "m"}).encode()
    status, number = get(f"{url}/v1/chat/completions", body, **headers)
    assert status == 200
    return number


def test_questions_about_one_document_go_to_one_replica(router):
    url, _ = router
    replicas = Counter()
    for number in range(40):
        document = f"Document {number}. " * 400
        answers = {ask(url, document, f"question {index}") for index in range(4)}
        assert len(answers) == 1
        replicas[answers.pop()] += 1
    assert len(replicas) == REPLICAS and min(replicas.values()) >= 4, replicas


def test_a_sessions_name_decides_whatever_the_body(router):
    url, _ = router
    answers = {ask(url, f"{index} different", "", **{"X-Session-Id": "tenant-7"}) for index in range(12)}
    assert len(answers) == 1
    assert (
        len({ask(url, "same", "", **{"X-Session-Id": f"tenant-{index}"}) for index in range(40)}) == REPLICAS
    )


def test_large_documents_pass_whole(router):
    url, _ = router
    assert ask(url, "x" * 8_000_000, "?") == ask(url, "x" * 8_000_000, "another question")


def test_what_a_full_queue_refuses_goes_to_another_replica(router, replicas):
    url, _ = router
    home = replicas[int(ask(url, "short", "?"))]
    home.status = 503
    try:
        assert ask(url, "short", "?") != str(home.number)
    finally:
        home.status = 200


def test_a_request_that_breaks_an_engine_does_not_visit_the_others(router, replicas):
    url, _ = router
    for server in replicas:
        server.status, server.seen = 500, 0
    try:
        assert get(f"{url}/v1/completions", b'{"prompt": "poison"}')[0] == 500
        assert sum(server.seen for server in replicas) == 1
    finally:
        for server in replicas:
            server.status = 200


def test_requests_move_on_when_their_replica_is_gone(router, replicas):
    url, _ = router
    home = replicas[int(ask(url, "moving", "?"))]
    home.shutdown()
    home.server_close()
    # also before the health check has noticed
    assert ask(url, "moving", "?") != str(home.number)


def test_metrics_are_on_their_own_port_only(router):
    url, metrics = router
    assert get(f"{url}/metrics")[0] == 404
    status, text = get(f"{metrics}/metrics")
    assert status == 200 and 'haproxy_server_status{proxy="replicas"' in text


def test_every_router_maps_documents_to_addresses_not_to_slots(configuration):
    # numbers of slots differ from one router to the next: DNS gives no order
    assert "hash-key addr-port" in configuration
    assert "ic-infinite-context-replicas.default.svc.cluster.local:8000" in configuration


def test_a_limit_on_a_replicas_load_is_the_users_choice(configuration):
    assert "hash-balance-factor" not in configuration
    limited = render(set={"router.enabled": True, "router.maxLoadPercent": 150})
    assert (
        "hash-balance-factor 150"
        in one(limited, "ConfigMap", "ic-infinite-context-router")["data"]["haproxy.cfg"]
    )
