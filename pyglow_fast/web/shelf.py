"""Holds the runs that are served, each at its newest checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyglow_fast._errors import expect
from pyglow_fast.studio.opened import TRAIN_IMAGES, OpenRun
from pyglow_fast.train import RunFolder

Stamp = tuple[str, int, int]  # of a file: name, time of change (ns), size


@dataclass
class _Slot:
    """One run: what is open of it, and the checkpoint file that it was opened from."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    opened: OpenRun | None = None
    stamp: Stamp | None = None


class Shelf:
    """The runs below the folders that were named, and no others.

    Args:
        folders: folders of runs, and folders that hold the folders of runs.
        best: serve the checkpoints with the best held-out bits/dim rather than the newest.
        device: cpu, cuda, cuda:N or auto.
        train_images: how many training images directions are measured on, at most.

    Raises:
        ValueError: a folder that is neither.
    """

    def __init__(
        self, folders: Sequence[str], best: bool = False, device: str = "auto", train_images: int = TRAIN_IMAGES
    ) -> None:
        self.folders, self.best, self.device, self.train_images = tuple(folders), best, device, train_images
        self._slots: dict[str, _Slot] = {}
        self._lock = threading.Lock()
        for name in folders:
            expect(Path(name).is_dir(), "runs", "the folder of a run, or of several", f"{name!r}, which is none")
            expect(bool(_runs_in(name)), "runs", "the folder of a run (with config.toml), or of several", repr(name))

    def names(self) -> list[str]:
        """List the folders of the runs that there are now, as they were named."""
        return list(dict.fromkeys(run for name in self.folders for run in _runs_in(name)))

    def open(self, name: str) -> OpenRun:
        """Open the run in the folder ``name`` at its newest checkpoint; the same object until there is another.

        A checkpoint is read as a whole and checked by its digest: one that is being written is not seen.

        Raises:
            ValueError: no run of that name is served; it has no checkpoint yet, or none that is whole.
        """
        if not (name in self._slots and _is_run(Path(name))):  # else every drag would list the folders of all runs
            known = self.names()
            expect(name in known, "run", f"one of {', '.join(known)}", repr(name))
        with self._lock:
            slot = self._slots.setdefault(name, _Slot())
        with slot.lock:
            stamp = RunFolder(name).stamp(self.best)
            if slot.opened is None or stamp != slot.stamp:
                images = None if slot.opened is None else slot.opened.images
                opened = OpenRun.open(name, self.best, self.device, self.train_images, images)
                same = slot.opened is not None and opened.checkpoint.digest == slot.opened.checkpoint.digest
                slot.opened = slot.opened if same else opened
                slot.stamp = stamp
            assert slot.opened is not None  # for the type checker
            return slot.opened


def _runs_in(name: str) -> list[str]:
    """``name`` if it is a run, else the runs that are directly in it, sorted; what cannot be looked into is none."""
    if _is_run(Path(name)):
        return [name]
    try:
        inside = sorted(path for path in Path(name).iterdir() if path.is_dir())
    except OSError:
        return []
    return [str(path) for path in inside if _is_run(path)]


def _is_run(path: Path) -> bool:
    try:
        return RunFolder(path).exists
    except OSError:
        return False
