"""The demo as a user starts it, with the real vLLM and the embedded checkpoint."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


# a user's environment, not what tests of the plugin set for engines in this process
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}


def test_demo_finds_every_pass_key():
    result = subprocess.run(
        [sys.executable, "-m", "demo", "--tokens", "4096", "--keys", "4", "--timeout", "400"],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=590,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 of 4 right" in result.stdout
    assert len(re.findall(r"(\d{5}) +\1 +right", result.stdout)) == 4
