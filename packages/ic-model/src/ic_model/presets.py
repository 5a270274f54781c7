"""Named model shapes, read from presets.toml."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Any

from ic_model.configuration import ICConfig


@cache
def _presets() -> dict[str, dict[str, Any]]:
    return tomllib.loads(resources.files("ic_model").joinpath("presets.toml").read_text(encoding="utf-8"))


def preset_names() -> list[str]:
    """The names that `preset` takes."""
    return sorted(_presets())


def preset(name: str) -> ICConfig:
    """The configuration of a named shape.

    Raises:
        ValueError: there is no preset of that name.
    """
    if name not in _presets():
        raise ValueError(f"preset {name!r} is not one of {', '.join(preset_names())}")
    fields = dict(_presets()[name])
    fields.setdefault("q_lora_rank", None)
    return ICConfig(**fields)
