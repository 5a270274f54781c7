"""How long the client waits at a server's word."""

import asyncio
import http.server
import threading
from collections.abc import Iterator

import pytest

from ic_train.evaluation.client import Client, ServerError


class Busy(http.server.BaseHTTPRequestHandler):
    """Refuses at first, and names how long to wait; then serves one model."""

    protocol_version = "HTTP/1.1"
    wait_s = "0"
    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        busy = self.asked == 1
        body = b'{"error": {"message": "later"}}' if busy else b'{"object": "list", "data": [{"id": "one"}]}'
        self.send_response(429 if busy else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if busy:
            self.send_header("Retry-After", self.wait_s)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Busy.asked = 0
    busy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    threading.Thread(target=busy.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{busy.server_address[1]}"
    busy.shutdown()
    busy.server_close()


async def served(url: str) -> str:
    async with Client(url) as client:
        return (await client.served_model()).name


def test_a_short_wait_is_kept_to_and_a_long_one_ends_the_run(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Busy, "wait_s", "121")
    with pytest.raises(ServerError, match=r"answered 429 \(Retry-After: 121\): .*later") as caught:
        asyncio.run(served(url))
    assert (caught.value.status, Busy.asked) == (429, 1)
    monkeypatch.setattr(Busy, "wait_s", "0.01")
    Busy.asked = 0
    assert asyncio.run(served(url)) == "one"
    assert Busy.asked == 2
