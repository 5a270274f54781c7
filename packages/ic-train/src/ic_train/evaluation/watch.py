"""Run a server that ends when the program that wanted it is gone, whatever ended that one.

python watch.py FD WORD...: FD is a pipe's end for reading, whose other end only that program holds; when that
closes, everything in this process group is stopped. It is run as a file, and imports the standard library only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

STOP_S = 20


def main(pipe: int, words: list[str]) -> int:
    """Run the words; their exit status."""
    # the group is told to end by its own starter, too, and then this one waits for the server. A handler, unlike
    # SIG_IGN, does not pass on to it
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        server = subprocess.Popen(words)
    except OSError as error:
        print(f"{words[0]} cannot be run: {error}", file=sys.stderr)
        return 127
    gone = threading.Event()

    def watch() -> None:
        os.read(pipe, 1)
        gone.set()
        os.killpg(0, signal.SIGTERM)
        time.sleep(STOP_S)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    status = server.wait()
    if gone.is_set():
        # its children may outlive a server that is told to end
        os.killpg(0, signal.SIGKILL)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
