"""A pytest plugin for machines that have torch, numpy, safetensors and pytest, and little else.

    python -m pytest -p bench.gpu_tests -m cuda tests

A test file that imports a library that is not installed is skipped by that library's name; without this plugin it is
an error. With ``--until`` tests that have not begun by then are skipped, and the exit code is PARTLY.
With ``--out`` a file has the tests that have begun, which a process that follows one that died leaves out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_questions import Row, earlier, is_broken
from bench.gpu_stages import LATE, PARTLY
from bench.harness import write_json

NEEDED = ("torch", "numpy", "safetensors", "pytest", "pyglow_fast", "bench", "support", "tests")  # or it is an error
_LATE = pytest.StashKey[int]()  # how many tests were
_BEGUN = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the time."""
    parser.addoption("--until", type=float, default=float("inf"), help="skip what has not begun by time.monotonic()")
    parser.addoption("--out", type=Path, help="JSON file of the tests that have begun")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what an earlier process has begun."""
    begun = config.stash[_BEGUN] = earlier(config.getoption("--out"))
    items[:] = [item for item in items if {"case": item.nodeid} not in begun]


def _keep(config: pytest.Config, ended: bool) -> None:
    if out := config.getoption("--out"):
        write_json(out, {}, config.stash[_BEGUN], ended=ended)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what is too late."""
    if time.monotonic() > item.config.getoption("--until"):
        item.config.stash[_LATE] = item.config.stash.get(_LATE, 0) + 1
        pytest.skip("the time was over")
    item.config.stash[_BEGUN].append({"case": item.nodeid})
    _keep(item.config, ended=False)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tells how many tests there was time for."""
    _keep(session.config, ended=not session.shouldstop)
    late, of = session.config.stash.get(_LATE, 0), session.testscollected
    if late:
        session.config.get_terminal_writer().line(f"\n{LATE} {of - late} of {of}")
        session.exitstatus = session.exitstatus or PARTLY


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Skips a file that imports a library that is not installed."""
    report: Any = yield
    error = report.call.excinfo.value if report.failed else None
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__
    name = "" if error is None else (error.name or "").partition(".")[0]
    if name not in ("", *NEEDED):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 1, f"Skipped: {name} is not installed")
        del report.call  # else it is handed to debuggers as an error
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Ends the session where a fault has left the GPU unusable."""
    report: Any = yield
    if report.failed and torch.cuda.is_initialized() and is_broken(torch.device("cuda")):
        item.session.shouldstop = "a fault has left the GPU unusable"
    return report
