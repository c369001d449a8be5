"""A pytest plugin for machines that have torch, numpy, safetensors and pytest, and little else.

    python -m pytest -p bench.gpu_tests --on cuda --tally FILE tests

``--on cuda`` runs what is marked cuda: the cases whose device is a GPU, and tests made for one. ``--on cpu`` runs the
same tests by their cases on the CPU, to rehearse that. A test file, or a test, that imports a library that is not
installed is skipped by that library's name; without this plugin it is an error. ``--tally FILE`` has a line of JSON
for every test that has ended, so that a run that is killed leaves what it had.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

NEEDED = ("torch", "numpy", "safetensors", "pytest")
OWN = ("pyglow_fast", "bench", "support", "tests")


def missing_library(error: BaseException | None) -> str | None:
    """The library whose absence an error is about, itself or what it was raised from; None if it is another error."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            top = error.name.partition(".")[0]
            return None if top in (*NEEDED, *OWN) else top
        error = error.__cause__
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--on", choices=["cuda", "cpu"], help="only tests that have a case on a GPU: that, or the CPU's")
    parser.addoption("--every", type=int, default=1, metavar="N", help="of those every Nth")
    parser.addoption("--tally", metavar="FILE", help="a line of JSON for every test that has ended")


@pytest.hookimpl(trylast=True)  # after the tests' own conftest has set the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what has no case on a GPU."""
    device = config.getoption("on")
    if device is None:
        return
    chosen = [item for item in items if _has_case(item, device)][:: config.getoption("every")]
    kept = {id(item) for item in chosen}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = chosen


def _has_case(item: pytest.Item, device: str) -> bool:
    """Whether a test is the case of that device, or one for a GPU that has no cases: without a GPU it skips itself."""
    parameter = item.callspec.params.get("device") if hasattr(item, "callspec") else None
    return item.get_closest_marker("cuda") is not None if parameter is None else str(parameter) == device


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Skips what cannot be imported for want of a library."""
    report: Any = yield
    call = getattr(report, "call", None)
    name = missing_library(call.excinfo.value) if call is not None and call.excinfo is not None else None
    if report.failed and name is not None:
        _skip(report, str(collector.path), name)
        del report.call  # else it is handed to debuggers as an error
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Skips a test that imports, while it runs, what is not there."""
    report: Any = yield
    name = None if call.excinfo is None else missing_library(call.excinfo.value)
    if report.failed and name is not None:
        _skip(report, str(item.path), name)
    return report


def _skip(report: Any, path: str, library: str) -> None:
    report.outcome = "skipped"
    report.longrepr = (path, 1, f"Skipped: {library} is not installed")


class _Tally:
    """Writes a line of JSON for each outcome."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("w", encoding="utf-8")

    def _write(self, test: str, outcome: str, reason: str) -> None:
        self._stream.write(json.dumps({"test": test, "outcome": outcome, "reason": reason}) + "\n")
        self._stream.flush()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes the test itself; what is around it, too, where that did not pass."""
        if report.when == "call" or not report.passed:
            self._write(report.nodeid, report.outcome, _reason(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Notes a file that was skipped, or that is broken."""
        if not report.passed:
            self._write(report.nodeid, report.outcome, _reason(report))


def _reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return str(report.longrepr)[-600:]


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("tally")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Tally(Path(path)))


def read_tally(path: Path) -> list[dict[str, str]]:
    """Reads the outcomes; the last line may be cut off where the run was."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def counts(rows: Sequence[dict[str, str]]) -> dict[str, int]:
    """How many tests passed, failed and were skipped; a file that was skipped whole counts as one."""
    found = Counter(row["outcome"] for row in rows)
    return {name: found[name] for name in ("passed", "failed", "skipped")}
