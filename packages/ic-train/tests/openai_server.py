"""An HTTP server with OpenAI's API whose answers and failures are scripted: failures that real servers do not
produce on demand, and judges with planted biases."""

import json
import re
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Failure = Callable[[int], tuple[int, bytes] | str | None]


class ScriptedServer:
    """Listens on loopback while in use.

    Args:
        answer: the text for a request's body.
        fails: for the number of a request (from 0), None, a status with a body, or "hang up".
        together: so many requests have to be in at once before any is answered, however slow the machine; for
            clients that are to ask so many at once. A client that never does is answered after 10 seconds each.
        port: 0 for any free one.
        model: fields of what /v1/models says, as max_model_len.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], str],
        fails: Failure = lambda number: None,
        *,
        together: int = 1,
        port: int = 0,
        **model: Any,
    ):
        self.answer, self.fails = answer, fails
        self.requests: list[dict[str, Any]] = []
        self.answered: list[dict[str, Any]] = []
        self.most_at_once = self._at_once = 0
        self._together, self._were_together = together, threading.Event()
        self._lock = threading.Lock()
        self._model = {"id": "scripted", "object": "model", "owned_by": "tests", "created": 0, **model}
        self._http = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> "ScriptedServer":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                self._send(200, json.dumps({"object": "list", "data": [server._model]}).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    number = len(server.requests)
                    server.requests.append(body)
                    server._at_once += 1
                    server.most_at_once = max(server.most_at_once, server._at_once)
                    if server._at_once >= server._together:
                        server._were_together.set()
                try:
                    self._answer(body, server.fails(number))
                finally:
                    with server._lock:
                        server._at_once -= 1

            def _answer(self, body: dict[str, Any], failure: tuple[int, bytes] | str | None) -> None:
                if failure == "hang up":
                    self.close_connection = True
                    return
                if failure:
                    assert isinstance(failure, tuple)
                    self._send(*failure)
                    return
                server._were_together.wait(timeout=10)
                # long enough for those who would be too many to come in
                time.sleep(0.005)
                text = server.answer(body)
                chat = {"message": {"role": "assistant", "content": text}}
                choice = chat if self.path.endswith("/chat/completions") else {"text": text}
                with server._lock:
                    server.answered.append(body)
                choice |= {"index": 0, "finish_reason": "stop", "logprobs": None}
                self._send(
                    200,
                    json.dumps(
                        {"id": "x", "object": "o", "created": 0, "model": "scripted", "choices": [choice]}
                    ).encode(),
                )

            def _send(self, status: int, data: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                # openai waits so long before it tries again
                self.send_header("Retry-After-Ms", "10")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        return Handler


def reader(body: dict[str, Any]) -> str:
    """Answers by reading the context, as a model that finds everything; for byte tokenizers and for chat."""
    text = body["messages"][-1]["content"] if "messages" in body else bytes(body["prompt"]).decode()
    document, _, asked = text.rpartition("\nQuestion: ")
    if not document:
        return " " + re.findall(r"The pass key is (\d+)\. Remember it\.", text)[0] + ".\n"
    key = re.findall(r"pass keys? for (\w+)", asked)[0]
    return " " + ", ".join(re.findall(rf"The pass key for {key} is (\d+)", document)) + ".\n"


if __name__ == "__main__":
    with ScriptedServer(reader, port=int(sys.argv[1]), max_model_len=8192):
        threading.Event().wait()
