"""Runs cases of engine_cases.py in one process, and greedy tokens from transformers to compare with."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from ic_model import ICForCausalLM
from served_models import users_environment


def run_cases(
    cases: dict[str, dict[str, Any]], *, timeout_s: float = 420, environment: dict[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """A result per case, by its name."""
    process = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("engine_cases.py"))],
        input=json.dumps(list(cases.values())),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=users_environment() | (environment or {}),
    )
    lines = [line[7:] for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == len(cases), process.stdout[-4000:] + process.stderr[-4000:]
    return {name: json.loads(line) for name, line in zip(cases, lines, strict=True)}


def run_apart(
    cases: dict[str, dict[str, Any]], *, at_once: int, timeout_s: float = 420
) -> dict[str, dict[str, Any]]:
    """As `run_cases`, each in a process of its own, as a server is; a few at a time.

    In one process they would not all start: vLLM 0.26 runs n-gram drafts in its first model runner, which forbids
    CUDA graphs for the process when it has captured its own, and its second one, which dense models get, never
    allows them.
    """
    with ThreadPoolExecutor(at_once) as pool:
        found = pool.map(lambda name: run_cases({name: cases[name]}, timeout_s=timeout_s), cases)
        return {name: result for one in found for name, result in one.items()}


def greedy(
    folder: Path, prompts: list[list[int]], new_tokens: int, *, device: str = "cpu"
) -> list[list[int]]:
    """Greedy tokens of transformers in float32."""
    model = ICForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        with torch.inference_mode():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens
            )
        found.append(output[0, len(prompt) :].tolist())
    return found
