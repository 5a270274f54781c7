"""Write an embedded checkpoint's model card and loss curve from its training record.

python -m ic_train.model_card packages/ic-model/src/ic_model/checkpoints/ic-nano
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from ic_train.data.passkey import ANSWER, NEEDLE, QUESTION
from ic_train.sft import RECORD_FILE

CURVE_FILE = "training.png"
CARD_FILE = "README.md"

_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [mla, long-context, byte-level]
---
<!-- written by `python -m ic_train.model_card`; change the generator, not this file -->
# ic-nano

A model of {parameters:,} parameters with DeepSeek-V3's Multi-Head Latent Attention that reads bytes and looks up
pass keys in long contexts; how long, the table below says. It exists so that everything in this project can be run
and tested with real weights on any machine. It is no language model to talk to: it has read program sources for a
few minutes, and looking up pass keys is all it was taught.

```python
import ic_model
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = ic_model.checkpoint_path("ic-nano")
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

## Format

One byte is one token. A pass key is hidden as, and asked for with, exactly these words (`\\n` is a line break);
keys are six letters, all upper or all lower case:

| | |
|---|---|
| hidden | `{needle}` |
| asked | `{question}` |
| answered | `{answer}` |

## Retrieval

<!-- results:retrieval -->
<!-- /results -->

Measured by `ic-train evaluate passkey` on a text that was not trained on (the Jargon File, English prose; the
training text is program sources), with keys drawn anew, every key asked for on its own.

## Training

| | |
|---|---|
| command | `{command}` |
| seed | {seed} |
| GPU | {gpu} |
| wall time | {wall_s:.0f} s |
| versions | {versions} |
| precision | {precision} |
| optimizer | {optimizer} |
| scores | the saved query projections are the trained ones times {final_score_factor} (`final_score_factor`) |
| text | {corpus} |
| code | commit {commit} |

![Loss and accuracy over the training steps]({curve})

Stages, in order. Positions jump ahead between needles (position skipping, PoSE, arXiv 2309.10400), so that the
model meets distances far beyond the sequences that it is trained on.

{stages}

The same record in full, with the log of every {logging_steps} steps: `{record}`.

## Limits

Pass keys in the words above only. Text in other words, several questions at once in other forms, or instructions
give nonsense. The configuration admits 1,048,576 tokens, the window of positions that training covers; the
sequences that it was trained on are much shorter, and what holds beyond them is what the table shows.
"""


def write_card(folder: Path) -> None:
    """Write README.md and the curve beside a checkpoint's training record.

    Raises:
        ValueError: the folder has no training record.
    """
    if not (folder / RECORD_FILE).is_file():
        raise ValueError(f"{folder} has no {RECORD_FILE}; the trainer writes it beside the weights")
    record = json.loads((folder / RECORD_FILE).read_text())
    _plot(record, folder / CURVE_FILE)
    logged = [line["step"] for line in record["log"] if "loss" in line]
    card = _CARD.format(
        **{
            name: record[name]
            for name in ("parameters", "command", "seed", "gpu", "wall_s", "precision", "commit")
        },
        final_score_factor=record["final_score_factor"],
        versions=_listed(record["versions"]),
        optimizer=_listed(record["optimizer"]),
        corpus=_corpus(record["corpus"]),
        stages=_stages(record["stages"]),
        needle=_inline(NEEDLE),
        question=_inline(QUESTION),
        answer=_inline(ANSWER),
        curve=CURVE_FILE,
        record=RECORD_FILE,
        logging_steps=logged[0],
    )
    (folder / CARD_FILE).write_text(_with_old_results(card, folder / CARD_FILE))


def _with_old_results(card: str, path: Path) -> str:
    """Keep the results block of an existing card: another program fills it."""
    start, end = "<!-- results:retrieval -->", "<!-- /results -->"
    if not path.is_file() or start not in path.read_text():
        return card
    old = path.read_text()
    block = old[old.index(start) : old.index(end)]
    return card[: card.index(start)] + block + card[card.index(end) :]


def _plot(record: dict[str, Any], path: Path) -> None:
    lines = [line for line in record["log"] if "loss" in line]
    steps = [line["step"] for line in lines]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")
    top.semilogy(steps, [line["loss"] for line in lines])
    top.set_ylabel("loss")
    bottom.plot(steps, [line["answer_accuracy"] for line in lines])
    bottom.set_ylabel("pass keys right")
    bottom.set_xlabel("step")
    bottom.set_ylim(0, 1.02)
    start = 0
    for stage in record["stages"]:
        for axis in (top, bottom):
            axis.axvline(start, color="grey", linewidth=0.5)
        bottom.text(start, 0.04, f" {stage['name']}", fontsize=8)
        start += stage["steps"]
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _stages(stages: list[dict[str, Any]]) -> str:
    rows = [
        "| stage | steps | tokens per sequence | sequences per step | pass keys | positions up to |",
        "|---|---|---|---|---|---|",
    ]
    for stage in stages:
        positions = f"{stage['window_tokens']:,}" if stage["window_tokens"] else "no skipping"
        needles = f"{stage['min_needles']}-{stage['max_needles']}"
        rows.append(
            f"| {stage['name']} | {stage['steps']} | {stage['tokens_per_sequence']:,} | "
            f"{stage['sequences_per_step']} | {needles} | {positions} |"
        )
    return "\n".join(rows)


def _corpus(corpus: dict[str, Any]) -> str:
    sources, digest = _listed(corpus["sources"]), corpus["sha256"][:16]
    return f"{corpus['bytes']:,} bytes of sources of {sources}; sha256 `{digest}...`"


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}".strip() for name, value in values.items())


def _inline(text: str) -> str:
    return text.replace("\n", "\\n").replace("{key}", "KEY").replace("{digits}", "DDDDD")


def main() -> int:
    """Write the card of the folder named on the command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ic_train.model_card", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="checkpoint folder with the trainer's record")
    try:
        write_card(parser.parse_args().folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
