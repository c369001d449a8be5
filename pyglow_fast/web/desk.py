"""Holds the runs that are served, and what each visitor works on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyglow_fast._errors import expect
from pyglow_fast.studio import Grid, OpenRun, Picked, Subject
from pyglow_fast.train import RunFolder


class Shelf:
    """The runs below the folders that were named, and no others, each at its newest checkpoint.

    Args:
        folders: folders of runs, and folders that hold the folders of runs.
        best: serve the checkpoints with the best held-out bits/dim rather than the newest.
        device: cpu, cuda, cuda:N or auto.
        shipped: the name of the model that comes with the package, and its folder, of which the best is served.
        options: others of :meth:`~pyglow_fast.studio.OpenRun.open`.

    Raises:
        ValueError: a folder that is neither.
    """

    def __init__(
        self,
        folders: Sequence[str],
        best: bool = False,
        device: str = "auto",
        shipped: tuple[str, str] = ("", ""),
        **options: Any,
    ) -> None:
        self.folders, self.best, self.device, self._options = tuple(folders), best, device, options
        self._shipped = shipped
        self._opened: dict[str, tuple[Any, OpenRun]] = {}  # with the stamp of the checkpoint
        self._lock = threading.Lock()
        for name in folders:
            found = self._runs_in(name)
            expect(bool(found), "runs", "the folder of a run (with config.toml), or of several", repr(name))

    def names(self) -> list[str]:
        """List the folders of the runs that there are now, as they were named."""
        return list(dict.fromkeys(run for name in self.folders for run in self._runs_in(name)))

    def open(self, name: str) -> OpenRun:
        """Open the run in the folder ``name`` at its newest checkpoint; the same object until there is another.

        Raises:
            ValueError: no run of that name is served; it has no checkpoint yet, or none that is whole.
        """
        with self._lock:
            if name not in self._opened:  # else every drag would list the folders of all runs
                known = self.names()
                expect(name in known, "run", f"one of {', '.join(known)}", repr(name))
            place, best = (self._shipped[1], True) if name == self._shipped[0] else (name, self.best)
            last, stamp = self._opened.get(name), RunFolder(place).stamp(best)
            if last is None or last[0] != stamp:
                images = None if last is None else last[1].images
                opened = OpenRun.open(place, best, self.device, images=images, **self._options)
                opened.name, opened.best = name, self.best  # as commands say it
                self._opened[name] = last = (stamp, opened)
            return last[1]

    def _runs_in(self, name: str) -> list[str]:
        """``name`` if it is a run, else the runs that are directly in it, sorted."""
        if name == self._shipped[0] or RunFolder(name).exists:
            return [name]
        inside = sorted(Path(name).iterdir()) if Path(name).is_dir() else []
        return [str(path) for path in inside if RunFolder(path).exists]


class Chosen:
    """An image that was chosen, with its latents, which are taken once for a checkpoint and a space.

    Args:
        picked: the image.
        opened: the checkpoint that it was picked by.
        command: what writes the file that the image is, where it is an edit.
    """

    def __init__(self, picked: Picked, opened: OpenRun, command: str = "") -> None:
        self._picked, self._opened, self.command = picked, opened, command
        self._subject: Subject | None = None

    def subject(self, opened: OpenRun, space: str) -> Subject:
        """Take its latents by the newest checkpoint, which draws other samples."""
        if opened is not self._opened:
            self._picked, self._opened = opened.relabelled(self._picked, self._picked.label), opened
        found = self._subject
        if found is None or found.opened is not opened or found.space != space:
            self._subject = found = Subject(opened, self._picked, space)
        return found


class Desk:
    """What one visitor works on: a run, the image under edit, samples, both ends of a path; no two share one.

    Args:
        shelf: the runs.
    """

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
        self.space: str | None = None
        self.offered: list[int] = []  # numbers of the held-out images to choose from
        self.grid: Grid | None = None
        self.edited: Chosen | None = None
        self.ends: list[Chosen | None] = [None, None]
        self.scored = False  # whether uploads were scored
        self.strip = ""  # the commands that write the path's strip

    def opened(self) -> OpenRun:
        """Open the run at its newest checkpoint.

        Raises:
            ValueError: none was chosen, or it is no longer there.
        """
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

    def space_of(self, opened: OpenRun) -> str:
        """The space that is edited."""
        return self.space or opened.space

    def subject(self, opened: OpenRun) -> Subject:
        """The image under edit, with its latents.

        Raises:
            ValueError: no image was chosen.
        """
        with self.lock:
            if self.edited is None:
                raise ValueError("image: expected an image to edit, found none; choose one above")
            return self.edited.subject(opened, self.space_of(opened))

    def subjects(self, opened: OpenRun) -> list[Subject]:
        """Both ends of the path, with their latents; fewer where one was not chosen."""
        with self.lock:
            return [end.subject(opened, self.space_of(opened)) for end in self.ends if end is not None]
