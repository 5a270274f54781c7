"""For all tests of the repository: where the time goes, and no test is skipped in CI."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import pytest

_seconds: dict[str, float] = defaultdict(float)
_counts: dict[str, int] = defaultdict(int)
_skipped: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add a test's phases to its part of the repository."""
    part = _part(report.nodeid)
    _seconds[part] += report.duration
    _counts[part] += report.when == "call"
    if report.skipped and not hasattr(report, "wasxfail"):
        _skipped.append(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a skipped test is a failure: whatever it was to show has not been shown."""
    if _skipped and os.environ.get("CI") and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Seconds per part, fixtures included."""
    terminalreporter.section("seconds per part")
    for part, seconds in sorted(_seconds.items()):
        terminalreporter.write_line(f"{seconds:7.1f} s  {_counts[part]:4d} tests  {part}")
    if _skipped and os.environ.get("CI"):
        terminalreporter.write_line(f"failed: {len(_skipped)} skipped in CI", red=True)


def _part(nodeid: str) -> str:
    parts = Path(nodeid.split("::")[0]).parts
    return "/".join(parts[:2]) if parts[0] == "packages" else parts[0]
