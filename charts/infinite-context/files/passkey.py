"""What `helm test` runs: hide pass keys in a text, ask the server for each, exit 0 when all are found.

Standard library only, and no part of the project: it tests what a client sees.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import string
import sys
import time
import urllib.error
import urllib.request

# as the project's models learn it; any other model completes the sentence as well
NEEDLE = "\nThe pass key for {name} is {digits}.\n"
QUESTION = "\nQuestion: pass key for {name}? Answer: The pass key for {name} is"
FILLER = (
    "The ship left the harbour before dawn. ",
    "Nobody in the village had seen the river so low. ",
    "A letter from the north took eleven days. ",
    "They counted the sacks of grain twice and wrote the number down. ",
    "In the evening the wind turned and the lamps went out. ",
)
ANSWER_TOKENS = 8


def document(size_bytes: int, keys: dict[str, str], chance: random.Random) -> str:
    """Filler of about a size, with the needles spread evenly over it."""
    share = size_bytes // (len(keys) + 1)
    parts = []
    for name, digits in keys.items():
        parts += [_filler(share, chance), NEEDLE.format(name=name, digits=digits)]
    return "".join([*parts, _filler(share, chance)])


def _filler(size_bytes: int, chance: random.Random) -> str:
    text = ""
    while len(text) < size_bytes:
        text += chance.choice(FILLER)
    return text[:size_bytes]


def complete(url: str, model: str, prompt: str, timeout_s: float) -> str:
    """The server's greedy continuation of a prompt."""
    body = {"model": model, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return json.load(answer)["choices"][0]["text"]


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 when every key was found."""
    parser = argparse.ArgumentParser(description="Ask a server for pass keys hidden in a text.")
    parser.add_argument("--url", required=True, help="of the server, without /v1")
    parser.add_argument("--model", required=True)
    parser.add_argument("--document-bytes", type=int, default=4000)
    parser.add_argument("--keys", type=int, default=3)
    parser.add_argument("--timeout-seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=None, help="default: another text every time")
    options = parser.parse_args(arguments)
    chance = random.Random(options.seed)
    keys: dict[str, str] = {
        "".join(chance.choices(string.ascii_uppercase, k=6)): "".join(chance.choices(string.digits, k=5))
        for _ in range(options.keys)
    }
    text = document(options.document_bytes, keys, chance)
    deadline = time.monotonic() + options.timeout_seconds
    found = 0
    for name, digits in keys.items():
        left = deadline - time.monotonic()
        if left <= 0:
            sys.stderr.write(f"not answered within --timeout-seconds {options.timeout_seconds:g}\n")
            return 1
        try:
            answer = complete(options.url, options.model, text + QUESTION.format(name=name), left)
        except urllib.error.HTTPError as error:
            sys.stderr.write(
                f"{options.url} answered {error.code}: {error.read().decode(errors='replace')[:500]}\n"
            )
            return 1
        except OSError as error:
            sys.stderr.write(f"{options.url} cannot be reached: {error}\n")
            return 1
        right = answer.strip().startswith(digits)
        found += right
        sys.stdout.write(
            f"pass key for {name}: {digits}, answered {answer.strip()!r}: {'right' if right else 'WRONG'}\n"
        )
    sys.stdout.write(f"{found} of {len(keys)} right in {len(text)} bytes\n")
    return 0 if found == len(keys) else 1


if __name__ == "__main__":
    sys.exit(main())
