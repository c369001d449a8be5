"""Holds the runs that are served, and what each visitor works on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyglow_fast._core.errors import expect
from pyglow_fast.app.studio import Grid, OpenRun, Subject
from pyglow_fast.app.studio.opened import find_run
from pyglow_fast.train import RunFolder


class Shelf:
    """The runs below the folders that were named, and no others, each at its best checkpoint, or at its ``last``."""

    def __init__(self, folders: Sequence[str], last: bool = False, device: str = "auto") -> None:
        self.folders, self.last, self.device = tuple(folders), last, device
        self._opened: dict[str, tuple[Any, OpenRun]] = {}  # with the stamp of the checkpoint
        self._lock = threading.Lock()
        for name in folders:
            expect(bool(_runs_in(name)), "runs", "the folder of a run (with config.toml), or of several", repr(name))

    def names(self) -> list[str]:
        """List the folders of the runs that there are now, as they were named."""
        return list(dict.fromkeys(run for name in self.folders for run in _runs_in(name)))

    def open(self, name: str) -> OpenRun:
        """Open the run in the folder ``name``; the same object until there is another checkpoint."""
        with self._lock:
            known = self.names()
            expect(name in known, "run", f"one of {', '.join(known)}", repr(name))
            folder, best = find_run(name, self.last)
            kept, stamp = self._opened.get(name), folder.stamp(best)
            if kept is None or kept[0] != stamp:
                self._opened[name] = kept = (stamp, OpenRun.open(name, self.last, self.device))
            return kept[1]


def _runs_in(name: str) -> list[str]:
    """``name`` if it is a run, else the runs that are directly in it, sorted."""
    if find_run(name)[0].exists:
        return [name]
    inside = sorted(Path(name).iterdir()) if Path(name).is_dir() else []
    return [str(path) for path in inside if RunFolder(path).exists]


class Visitor:
    """The state of one visitor: a run, the image under edit, samples, both ends of a path. No two visitors share it."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._clear(None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Visitor:
        return Visitor(self._shelf)  # a copy is for a new visitor

    def _clear(self, opened: OpenRun | None) -> None:
        self._opened = opened
        self.filled: set[Any] = set()  # tabs that were looked at
        self.offered: list[int] = []  # numbers of the held-out images to choose from
        self.grid: Grid | None = None
        self.edited: Subject | None = None
        self.ends: list[Subject | None] = [None, None]
        self.scored = False  # whether uploads were scored
        self.strip = ""  # the commands that write the path's strip

    def choose(self, name: str) -> OpenRun:
        """Open a run, and forget all that belongs to the one before."""
        self._clear(None)
        self._clear(self._shelf.open(name))
        return self.opened()

    def opened(self) -> OpenRun:
        """Return the run that was chosen."""
        if self._opened is None:
            raise ValueError("run: expected a run to be chosen, found none")
        return self._opened

    def has(self, opened: OpenRun) -> bool:
        """Tell whether this is still the run the visitor has chosen: results of another must not reach the page."""
        return self._opened is opened
