"""Fixtures that every test has, and how the suite runs: ``--full``, ``--share``, one thread a test."""

from __future__ import annotations

import gc
import importlib.util
import os
import zlib
from collections.abc import Iterator

import pytest
import torch
from support import machine
from support.gradients import turn

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
# Files that begin first, since a worker that begins one last keeps all others waiting.
LONG = ("test_other_homes.py", "test_sanitizers.py", "test_channel_maps.py", "test_export.py", "test_gpu_check.py")
LONG += ("test_resume.py", "test_memory.py", "test_pages.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="run the tests marked full, which are left out otherwise, and no others",
    )
    parser.addoption("--share", metavar="K/N", help="run share K of N: each test is in one of them, by its name's hash")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if importlib.util.find_spec("matplotlib") is not None:
        from support.figures import leave_undrawn

        leave_undrawn()
    if hasattr(config, "workerinput"):
        machine.one_of_several = True
        # Taken out of the environment: a pytest that a test starts is no worker.
        for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
            os.environ.pop(name, None)
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Chooses the tests marked full, or all others, and of these a share. Puts first what takes long.

    Tests on a GPU get a mark: ``-m cuda`` chooses the tests whose device is one.
    """
    for item in items:
        if (
            isinstance(item, pytest.Function)
            and hasattr(item, "callspec")
            and item.callspec.params.get("device") == "cuda"
        ):
            item.add_marker("cuda")
    share, shares = map(int, (config.getoption("--share") or "1/1").split("/"))
    chosen, left_out = [], []
    for item in items:
        is_full = item.get_closest_marker("full") is not None
        in_share = zlib.crc32(item.nodeid.encode()) % shares == share - 1
        (chosen if in_share and is_full == config.getoption("--full") else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = chosen
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish() -> None:
    """Leaves what has been imported and collected out of every later collection of garbage: a second each otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _repeatable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts from one seed and one thread, whatever ran before it, and leaves the default dtype as it was.

    Waking a second thread costs 20 times the arithmetic of the tiny models here on a busy machine.
    """
    torch.manual_seed(20180710)
    dtype = torch.get_default_dtype()
    if request.node.get_closest_marker("drawn"):
        monkeypatch.setattr("support.figures.drawing", True)
    yield
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU everywhere, and the GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """In a test for ``both_ways``: "forward", or "inverse", where runs that are called go from latents to data."""
    if request.param == "inverse":
        turn(monkeypatch)
    return str(request.param)
