"""Fixtures for all tests of the chart. Modules beside this one are imported by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chart_tools
import pytest


@pytest.fixture(scope="session")
def helm() -> chart_tools.Tools:
    """Real Helm 4 and kubectl: `helm.helm`, `helm.kubectl`."""
    return chart_tools.tools()


@pytest.fixture(scope="session")
def render(helm: chart_tools.Tools) -> Callable[..., list[dict[str, Any]]]:
    """`chart_tools.render`."""
    return chart_tools.render
