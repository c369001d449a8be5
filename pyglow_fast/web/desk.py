"""Holds the runs that are served, and what each visitor works on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyglow_fast._errors import expect
from pyglow_fast.studio import File, Grid, OpenRun, Picked, Subject
from pyglow_fast.studio.opened import find_run
from pyglow_fast.train import RunFolder


class Shelf:
    """The runs below the folders that were named, and no others, each at its newest checkpoint."""

    def __init__(self, folders: Sequence[str], best: bool = False, device: str = "auto") -> None:
        self.folders, self.best, self.device = tuple(folders), best, device
        self._opened: dict[str, tuple[Any, OpenRun]] = {}  # with the stamp of the checkpoint
        self._lock = threading.Lock()
        for name in folders:
            expect(bool(_runs_in(name)), "runs", "the folder of a run (with config.toml), or of several", repr(name))

    def names(self) -> list[str]:
        """List the folders of the runs that there are now, as they were named."""
        return list(dict.fromkeys(run for name in self.folders for run in _runs_in(name)))

    def open(self, name: str) -> OpenRun:
        """Open the run in the folder ``name`` at its newest checkpoint; the same object until there is another."""
        with self._lock:
            if name not in self._opened:  # else every drag would list the folders of all runs
                known = self.names()
                expect(name in known, "run", f"one of {', '.join(known)}", repr(name))
            folder, best = find_run(name, self.best)
            last, stamp = self._opened.get(name), folder.stamp(best)
            if last is None or last[0] != stamp:
                images = None if last is None else last[1].images
                self._opened[name] = last = (stamp, OpenRun.open(name, self.best, self.device, images))
            return last[1]


def _runs_in(name: str) -> list[str]:
    """``name`` if it is a run, else the runs that are directly in it, sorted."""
    if find_run(name)[0].exists:
        return [name]
    inside = sorted(Path(name).iterdir()) if Path(name).is_dir() else []
    return [str(path) for path in inside if RunFolder(path).exists]


class Chosen:
    """An image that was chosen, with its latents, which are taken once for a checkpoint."""

    def __init__(self, picked: Picked, opened: OpenRun) -> None:
        self._picked, self._opened = picked, opened
        self._subject: Subject | None = None

    def subject(self, opened: OpenRun) -> Subject:
        """Take its latents by the newest checkpoint, which draws other samples."""
        if self._subject is None or opened is not self._opened:
            if opened is not self._opened and not isinstance(self._picked.image, File):
                self._picked = opened.pick(self._picked.image, self._picked.label)
            self._opened, self._subject = opened, Subject(opened, self._picked)
        return self._subject


class Desk:
    """What one visitor works on: a run, the image under edit, samples, both ends of a path; no two share one."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf, self.lock = shelf, threading.RLock()
        self.run: str | None = None
        self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Desk:
        return Desk(self._shelf)  # a copy is for a new visitor

    def clear(self) -> None:
        """Forget all that belongs to the run."""
        self.shown: OpenRun | None = None  # the checkpoint that the page is about
        self.filled: dict[Any, OpenRun] = {}  # tabs that were looked at, each with the checkpoint that it is about
        self.offered: list[int] = []  # numbers of the held-out images to choose from
        self.grid: Grid | None = None
        self.edited: Chosen | None = None
        self.ends: list[Chosen | None] = [None, None]
        self.scored = False  # whether uploads were scored
        self.strip = ""  # the commands that write the path's strip

    def opened(self) -> OpenRun:
        """Open the run at its newest checkpoint."""
        expect(self.run is not None, "run", "a run to be chosen", None)
        return self._shelf.open(str(self.run))

    def is_another(self, opened: OpenRun) -> bool:
        """Whether this is no newer checkpoint of what the page is about, but another run, of which nothing is shown."""
        last = self.shown
        same = last is not None and (last.name, last.images) == (opened.name, opened.images)
        return not same or last is None or last.model.config != opened.model.config

    def has(self, opened: OpenRun) -> bool:
        """Whether this run is the chosen one: what was computed for another must not come to the page."""
        return self.run == opened.name

    def subject(self, opened: OpenRun) -> Subject:
        """The image under edit, with its latents."""
        with self.lock:
            if self.edited is None:
                raise ValueError("image: expected an image to edit, found none; choose one above")
            return self.edited.subject(opened)

    def subjects(self, opened: OpenRun) -> list[Subject]:
        """Both ends of the path, with their latents; fewer where one was not chosen."""
        with self.lock:
            return [end.subject(opened) for end in self.ends if end is not None]
