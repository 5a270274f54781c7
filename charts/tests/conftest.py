"""Fixtures for all tests of the chart. Modules beside this one are imported by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# pytest's importlib mode adds no folder to the path by itself
for folder in (Path(__file__).parent, Path(__file__).parents[1] / "tools"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import chart_tools  # noqa: E402  (found through the line above)


@pytest.fixture(scope="session")
def helm() -> chart_tools.Tools:
    """Real Helm 4 and kubectl: `helm.helm`, `helm.kubectl`."""
    return chart_tools.tools()


@pytest.fixture(scope="session")
def render(helm: chart_tools.Tools) -> Callable[..., list[dict[str, Any]]]:
    """`chart_tools.render`."""
    return chart_tools.render
