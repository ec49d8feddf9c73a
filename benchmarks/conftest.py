"""``pytest benchmarks/ --benchmark``: measures, prints a table, stores JSON and a chart under ``benchmarks/results``.

pytest-benchmark does the timing. A measurement is refused if the fused layer and its peer disagree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report import Measurement, write_report

RESULTS = Path(__file__).parent / "results"
_measurements: list[Measurement] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="run the benchmarks and write their report")
    parser.addoption(
        "--benchmark-report", default="cpu", help="name of the report under benchmarks/results (default: cpu)"
    )
    parser.addoption(
        "--benchmark-again",
        action="store_true",
        help="measure what is selected (-k) a second time, and keep the faster run of each in the report",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--benchmark"):
        skip = pytest.mark.skip(reason="benchmarks run with --benchmark")
        for item in items:
            item.add_marker(skip)


@pytest.fixture
def record() -> list[Measurement]:
    """Where a benchmark leaves its measurement."""
    return _measurements


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    if not _measurements:
        return
    if exitstatus != 0:
        terminalreporter.write_line("a benchmark failed: no report written")
        return
    name, again = config.getoption("--benchmark-report"), config.getoption("--benchmark-again")
    table = write_report(_measurements, RESULTS, name, again=again)
    terminalreporter.write_line(table)
