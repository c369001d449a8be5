"""How tests share a machine: one thread each, side by side, and those marked ``alone`` while no other test runs.

Side by side they run in the workers of pytest-xdist. Each test holds a lock as a reader, those marked ``alone`` as its
writer; who waits for the lock keeps the gate closed, so that a writer is not overtaken for ever. What several workers
need and none may change is made by the first that asks for it, see :func:`made_once`. No test needs a network.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MACHINE_THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
one_of_several = False  # whether this process is a worker of a run; set when pytest is configured


def no_network(*args: object) -> None:
    """Stand in for ``socket.socket.connect``, so that what asks for a network fails."""
    raise OSError("this must do without a network")


@contextmanager
def locked(path: Path, mode: int) -> Iterator[None]:
    """Hold a file's lock, ``fcntl.LOCK_SH`` among readers or ``fcntl.LOCK_EX`` alone; it ends with the process too."""
    with path.open("a") as file:
        fcntl.flock(file, mode)
        yield


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that ``make`` fills, once for all workers of a run. A ``make`` that fails is tried again by the next.

    Args:
        factory: pytest's.
        name: of the folder; the same name is the same folder.
        make: is given the empty folder.
    """
    base = factory.getbasetemp()
    if one_of_several:
        base = base.parent
    folder = base / name
    with locked(base / f"{name}.lock", fcntl.LOCK_EX):
        done = base / f"{name}.done"
        if not done.exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            done.touch()
    return folder


class Turns:
    """A pytest plugin of a worker: whose turn it is."""

    def __init__(self, folder: Path) -> None:
        self._gate, self._room = folder / "gate", folder / "room"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        mode = fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH
        with self._room.open("a") as room:
            with locked(self._gate, fcntl.LOCK_EX):
                fcntl.flock(room, mode)
            return (yield)
