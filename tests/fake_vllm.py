"""Stands in for the `vllm` script where a test is about the demo and not about vLLM.

`fake_vllm.py MODE serve MODEL --host HOST --port PORT`; MODE says how it behaves.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ic_train.data.passkey import NEEDLE, QUESTION

CONTEXT_TOKENS = 32768
# the key stands in the question once or more
QUESTION_PATTERN = re.escape(QUESTION).replace(r"\{key\}", r"(\w+)", 1).replace(r"\{key\}", r"\1") + "$"


class Handler(BaseHTTPRequestHandler):
    """Just enough of vLLM's API; finds pass keys by looking for them."""

    mode = ""

    def do_GET(self):
        if self.path == "/health":
            self._answer({})
        else:
            self._answer({"data": [{"id": "fake", "object": "model", "max_model_len": CONTEXT_TOKENS}]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["prompt"]
        question = re.search(QUESTION_PATTERN, prompt)
        if question and self.mode == "dies-answering":
            os._exit(9)
        answer = " what?"
        if question:
            answer = " " + re.search(NEEDLE.format(key=question[1], digits=r"(\d{5})"), prompt)[1]
            if self.mode == "wrong":
                answer = " 00000"
        usage = {"prompt_tokens": len(prompt.encode()), "completion_tokens": 6, "total_tokens": 0}
        choice = {"index": 0, "text": answer, "finish_reason": "stop", "logprobs": None}
        self._answer({"id": "1", "object": "text_completion", "created": 0, "model": "fake",
                      "choices": [choice], "usage": usage})  # fmt: skip

    def log_message(self, *arguments):
        pass

    def _answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main():
    mode, arguments = sys.argv[1], sys.argv[2:]
    print(f"(APIServer pid={os.getpid()}) INFO 01-02 03:04:05 [fake.py:1] loading", flush=True)
    if mode == "dies":
        print("ValueError: no such thing", flush=True)
        sys.exit(3)
    # vLLM, too, is several processes
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    Path(os.environ["FAKE_VLLM_PIDS"]).write_text(f"{os.getpid()} {child.pid}")
    if mode == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    Handler.mode = mode
    port = int(arguments[arguments.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
