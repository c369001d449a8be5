"""What the workers of pytest-xdist share: what several need and none may change is made by the first that asks for it.

No test needs a network.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest

one_of_several = False  # whether this process is a worker of a run; set when pytest is configured


def no_network(*args: object) -> None:
    """Stand in for ``socket.socket.connect``, so that what asks for a network fails."""
    raise OSError("this must do without a network")


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
    with (base / f"{name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed, or the process ends
        done = base / f"{name}.done"
        if not done.exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            done.touch()
    return folder
