"""Checkpoints that come with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

EMBEDDED = ("ic-nano",)


def checkpoint_path(name: str) -> Path:
    """The folder of an embedded checkpoint: config.json, model.safetensors, tokenizer.json.

    Raises:
        ValueError: there is no embedded checkpoint of that name.
    """
    if name not in EMBEDDED:
        raise ValueError(f"checkpoint {name!r} is not one of {', '.join(EMBEDDED)}")
    return Path(str(resources.files("ic_model.checkpoints").joinpath(name)))
