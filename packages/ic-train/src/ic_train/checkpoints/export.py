"""Make a plain Hugging Face folder of a training checkpoint.

python -m ic_train.checkpoints.export runs/ic-1b-32k/checkpoint-500 ic-1b-32k
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ic_train.checkpoints.folders import COMPLETE
from ic_train.long_context.arguments import LongContextModelArguments
from ic_train.long_context.models import add_adapters, build_model, save_model
from ic_train.runs import RUN_FILE


def main(arguments: list[str] | None = None) -> int:
    """Export; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ic_train.checkpoints.export",
        description="Make a plain Hugging Face folder, in bfloat16, of a training checkpoint.",
    )
    parser.add_argument("checkpoint", type=Path, help="a folder checkpoint-N of a run")
    parser.add_argument("folder", type=Path, help="where the model goes")
    options = parser.parse_args(arguments)
    try:
        export(options.checkpoint, options.folder)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {options.folder}")
    return 0


def export(checkpoint: Path, folder: Path) -> None:
    """Write weights (adapters merged), configuration and tokenizer.

    Args:
        checkpoint: whole, saved by any number of ranks.
        folder: to write to.

    Raises:
        ValueError: it is no whole checkpoint, or cannot be read.
    """
    if not (checkpoint / COMPLETE).is_file():
        raise ValueError(f"{checkpoint} has no {COMPLETE}: it is no checkpoint, or its save was interrupted")
    arguments = LongContextModelArguments(**json.loads((checkpoint / RUN_FILE).read_text()))
    model: Any = add_adapters(build_model(arguments), arguments)
    weights = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    state = {"model": weights}
    try:
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    except (Exception, CheckpointException) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{checkpoint} cannot be read: {reason[-1]}") from error
    save_model(folder, arguments, state["model"])


if __name__ == "__main__":
    sys.exit(main())
