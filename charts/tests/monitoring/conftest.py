"""Fixtures of the monitoring tests: Prometheus' programs, the chart's objects, one stack for the session."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

import monitoring_programs
import monitoring_stack

EVERYTHING = {
    "monitoring.enabled": True,
    "monitoring.dcgm.enabled": True,
    "monitoring.scrape.batch": True,
    "monitoring.certificate.source": "traefik",
}


@pytest.fixture(scope="session")
def programs() -> monitoring_programs.Programs:
    """Debian's Prometheus and Alertmanager."""
    return monitoring_programs.programs()


@pytest.fixture(scope="session")
def monitored(render: Callable[..., Any]) -> Callable[..., list[dict[str, Any]]]:
    """The chart's objects with all of monitoring on, and further values."""

    def with_values(**options: Any) -> list[dict[str, Any]]:
        return render(set=EVERYTHING | options.pop("set", {}), **options)

    return with_values


@pytest.fixture(scope="session")
def stack(
    programs: monitoring_programs.Programs,
    monitored: Callable[..., list[dict[str, Any]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[monitoring_stack.Stack]:
    """A vLLM server, Prometheus and Alertmanager, which run the rules and monitors of the chart."""
    objects = monitored(set=monitoring_stack.LIVE_VALUES)
    with monitoring_stack.Stack(programs, objects, tmp_path_factory.mktemp("stack")) as running:
        yield running
