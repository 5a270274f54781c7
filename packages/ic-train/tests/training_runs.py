"""Small long-context training runs on the CPU: a model, a corpus, and many runs per process start.

Importing PyTorch and transformers takes longer than a run, so that one launch works through a list of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ic_model import ICConfig, ICForCausalLM
from ic_model.byte_tokenizer import build_byte_tokenizer

from ic_train.data.text import write_corpus

PACKAGE = Path(__file__).parent.parent
RECIPES = Path(__file__).parent / "recipes"
WORKER = Path(__file__).parent / "training_worker.py"
FSDP_ON_CPU = PACKAGE / "accelerate" / "cpu.yaml"
# of a module whose fixture's runs take minutes: pytest's own limit is for one test with its fixtures
PATIENT = pytest.mark.timeout(1200)
# text that does not change: committed values depend on it
WORDS = (PACKAGE / "LICENSE").read_text().split()


@dataclass(frozen=True)
class Run:
    """One run: its output folder's name, flags after the toy recipe's, and which trainer, "sft" or "dpo"."""

    name: str
    flags: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    module: str = "sft"


def toy_config(**changes: Any) -> ICConfig:
    fields = {
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "eos_token_id": 256,
    }
    return ICConfig(**{**fields, **changes})


def make_toys(root: Path) -> dict[str, Path]:
    """A model with random weights and a corpus of documents of very different lengths."""
    root.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    rows = []
    for _ in range(300):
        words = draw.choice([5, 10, 20, 60, 150])
        start = draw.randrange(len(WORDS) - words)
        rows.append(json.dumps({"text": " ".join(WORDS[start : start + words])}))
    (root / "documents.jsonl").write_text("\n".join(rows))
    tokenizer = build_byte_tokenizer()
    sources = [(str(root / "documents.jsonl"), "Apache-2.0")]
    write_corpus(root / "corpus", sources, tokenizer, tokenizer_name="bytes")
    torch.manual_seed(0)
    ICForCausalLM(toy_config()).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return {"model": root / "model", "corpora": root / "corpus", "runs": root / "runs"}


def flags_of(toys: dict[str, Path], run: Run) -> list[str]:
    recipe, name = {"sft": ("text.yaml", "corpora"), "dpo": ("dpo.yaml", "preferences")}[run.module]
    return [
        *("--config", str(RECIPES / recipe), "--model", str(toys["model"]), f"--{name}", str(toys[name])),
        *("--output_dir", str(toys["runs"] / run.name), *run.flags),
    ]


def launch_all(
    toys: dict[str, Path], launches: list[tuple[int | str, list[Run]]], timeout_s: int = 1100
) -> dict[str, str]:
    """Run launches of so many processes, each with its runs one after the other; the errors by name.

    More than one process shard; "1 sharded" is one that does, too, as on a single GPU. The limit is for a busy
    machine: a module whose runs may come near pytest's own has `PATIENT`.
    """
    plan = toys["runs"] / f"plan-{launches[0][1][0].name}.json"
    plan.parent.mkdir(exist_ok=True)
    listed = [
        {
            "processes": int(str(processes).split()[0]),
            "sharded": processes != 1,
            "config": str(FSDP_ON_CPU),
            "runs": [asdict(run) | {"flags": flags_of(toys, run)} for run in runs],
        }
        for processes, runs in launches
    ]
    plan.write_text(json.dumps(listed))
    log, done = plan.with_suffix(".log"), plan.with_suffix(".done.json")
    with log.open("wb") as said:
        worker = subprocess.Popen(
            [sys.executable, str(WORKER), str(plan)],
            stdout=said,
            stderr=said,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,
        )
        try:
            worker.wait(timeout=timeout_s)
        finally:
            # the ranks that it forked, too, should it not have ended by itself
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
    assert done.is_file(), log.read_text(errors="replace")[-9000:]
    return json.loads(done.read_text())


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The lines with a loss of a run's metrics; of a resumed run the last of each step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return list({line["step"]: line for line in lines if "loss" in line}.values())


def values(folder: Path, name: str) -> list[float]:
    return [step[name] for step in steps_of(folder)]
