"""Recipes: YAML files with the values of a command's arguments."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

import yaml


def read_recipe(path: str | Path, known: Container[str] | None = None) -> dict[str, Any]:
    """The keys and values of a recipe.

    Args:
        path: of the file.
        known: keys that something reads; default: any.

    Raises:
        ValueError: it cannot be read, is no mapping, or has a key that nothing reads. The message names the file.
    """
    try:
        recipe = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config {path} cannot be read: {error}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"config {path} holds {type(recipe).__name__}; accepted: lines of `key: value`")
    unknown = [] if known is None else sorted(str(key) for key in recipe if key not in known)
    if unknown:
        raise ValueError(f"config {path} has unknown keys {unknown}")
    return recipe
