"""Manages the folder of one run: which files it holds, and when it may be made, resumed or replaced."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyglow_fast._errors import expect
from pyglow_fast.models import Glow
from pyglow_fast.train.checkpoint import Checkpoint
from pyglow_fast.train.config import ADJUSTABLE, TrainConfig
from pyglow_fast.train.config_file import read_config, to_toml
from pyglow_fast.train.files import TEMPORARY, FolderError, refusing, write_text
from pyglow_fast.train.folder_lock import FolderLock

_STEP = "step-{:07d}.safetensors"


class RunFolder:
    """The paths of a run's files below its folder. Making the object touches nothing.

    Examples:
        >>> from pyglow_fast import GlowConfig
        >>> from pyglow_fast.train import RunFolder, TrainConfig
        >>> folder = RunFolder("runs/tiny")
        >>> folder.exists
        False
        >>> folder.create(TrainConfig(model=GlowConfig((1, 8, 8), n_levels=1), lr=0.002))
        >>> folder.exists, folder.read_config().lr, folder.saved()  # no checkpoint yet
        (True, 0.002, [])
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.toml"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best.safetensors"
        self.metrics = self.path / "metrics.csv"
        self.samples = self.path / "samples.png"
        self.sample_history = self.path / "samples"
        self.events = self.path / "tensorboard"
        self.curve = self.path / "curve.png"
        self.report = self.path / "report.json"
        self.page = self.path / "report.html"
        self.cache = self.path / "cache"  # what commands computed of a checkpoint; may be removed at any time
        self.lock = self.path / ".lock"
        self._lock = FolderLock(self.lock)

    @property
    def kept(self) -> tuple[Path, ...]:
        """The files that a run writes in its folder and no other command may replace."""
        return self.metrics, self.samples, self.curve, self.page

    def saved(self) -> list[Path]:
        """List the checkpoints, the newest first."""
        found = {step_of(path): path for path in _matching(self.checkpoints, "step-*.safetensors")}
        return [found[step] for step in sorted(found, reverse=True) if step >= 0]

    def drawn(self) -> list[Path]:
        """List the pictures of samples that single steps left, the earliest first."""
        return sorted(_matching(self.sample_history, "step-*.png"), key=lambda path: (step_of(path), path.name))

    @property
    def checkpoint(self) -> Path:
        """The path of the newest checkpoint; where there is none yet, of the first that there will be."""
        return next(iter(self.saved()), self.of_step(0))

    def of_step(self, step: int) -> Path:
        """The path of that step's checkpoint, be it there or not."""
        return self.checkpoints / _STEP.format(step)

    def save(self, checkpoint: Checkpoint, keep: int) -> None:
        """Write a checkpoint, then remove the oldest ones beyond ``keep``, and none that claims to be newer.

        Raises:
            OSError: it cannot be written, not even in the place of all but the newest one; that one is unharmed.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        step = checkpoint.progress["step"]
        path = self.of_step(step)
        try:
            checkpoint.save(path)
        except OSError:
            older = self.saved()[1:]
            if not older:
                raise
            self._remove(older)  # a full disk: older ones give way
            checkpoint.save(path)
        self._remove([path for path in self.saved() if step_of(path) <= step][keep:])

    def set_aside(self, step: int) -> None:
        """Rename the checkpoints after ``step``, which could not be read, so that they do not count as the newest."""
        for path in self.saved():
            if step_of(path) > step:
                path.rename(_free(path.with_name(path.name + ".damaged")))

    @staticmethod
    def _remove(paths: list[Path]) -> None:
        for path in paths:
            if path.is_symlink() or not path.is_dir():  # no run makes folders there
                path.unlink(missing_ok=True)

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.config.is_file()

    def check_new(self, overwrite: bool) -> None:
        """Refuse a place where a new run would destroy something that was not given up by ``overwrite``.

        Raises:
            ValueError: a file, a folder that holds something else, or a run without ``overwrite``.
        """
        expect(not self.path.exists() or self.path.is_dir(), "out", "a folder", f"a file, {str(self.path)!r}")
        ancestor = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        expect(ancestor.is_dir(), "out", "a folder that can be made", f"{str(ancestor)!r} is a file")
        if self.exists:
            expect(overwrite, "out", "a new folder (or resume or overwrite)", f"a run in {str(self.path)!r}")
        elif self.path.exists():
            names = [entry.name for entry in self.path.iterdir()]
            held = sorted(name for name in names if name != self.lock.name and not name.endswith(TEMPORARY))
            expect(not held, "out", "a new or empty folder, or a run", f"{str(self.path)!r}, which holds {held[:3]}")

    def create(self, config: TrainConfig) -> None:
        """Make the folder, remove the files of a former run in it (no others), and write the configuration.

        Raises:
            FolderError: the folder cannot be made or written.
        """
        self.make()
        with refusing():
            self._remove_run()
            self.write_config(config)

    def make(self) -> None:
        """Make the folder, if it is not there.

        Raises:
            FolderError: it cannot be made.
        """
        with refusing():
            self.path.mkdir(parents=True, exist_ok=True)

    def write_config(self, config: TrainConfig) -> None:
        """Write config.toml in the place of the one that is there."""
        write_text(self.config, to_toml(config))

    def read_config(self) -> TrainConfig:
        """Read the settings of the run from config.toml.

        Raises:
            ValueError: not a run; a file that cannot be read, or holds what is no configuration.
        """
        run = str(self.path)
        expect(self.path.is_dir(), "run", "the folder of a run", f"{run!r}, " + _what(self.path))
        expect(self.exists, "run", "the folder of a run (with config.toml)", f"{run!r} without one")
        return TrainConfig.from_dict(read_config(self.config))

    @contextlib.contextmanager
    def locked(self, wanted: bool = True) -> Iterator[None]:
        """A context in which nobody else trains in this folder, where the file system has locks; elsewhere no promise.

        Args:
            wanted: False locks nothing (for ranks that do not write).

        Raises:
            FolderError: somebody else does.
        """
        with self._lock.held() if wanted else contextlib.nullcontext():
            yield

    @property
    def is_lost(self) -> bool:
        """Whether the folder, or its lock, was removed since it was locked."""
        return self._lock.is_lost

    def make_again(self) -> None:
        """Make the folder of a running run again after it was removed, and hold its lock.

        Raises:
            FolderError: another run was made in its place, whether it goes on or not.
            OSError: it cannot be made.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.is_lost:
            if self.exists and self.lock.exists():
                where = repr(str(self.path))
                raise FolderError(f"out: expected the folder of this run, found that of another one in {where}")
            self._lock.take_again()

    def mark(self) -> tuple[Any, ...]:
        """Read what changes whenever the run is trained or its settings are written: two marks tell of a change."""
        return tuple((path.name, _state_of(path)) for path in (self.config, *self.saved()))

    def check_unchanged(self, mark: tuple[Any, ...]) -> None:
        """Refuse to go on from a state that is not the newest of the run any more.

        Raises:
            ValueError: since ``mark`` was asked for there are other checkpoints or settings.
        """
        same = self.mark() == mark
        expect(same, "out", "the run as it was when it was read", f"another state in {str(self.path)!r} (resume again)")

    def _remove_run(self) -> None:
        # The configuration last: without it the rest would no longer count as a run.
        files = (self.best, self.metrics, self.samples, self.curve, self.report, self.page, self.config)
        for folder in (self.checkpoints, self.sample_history, self.events):
            if folder.is_dir():
                shutil.rmtree(folder)
        # Another process may write to the cache just now; the names of the files tell of which checkpoint they are.
        shutil.rmtree(self.cache, ignore_errors=True)
        for path in files:
            path.with_name(path.name + TEMPORARY).unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    def load(self, best: bool = False) -> Checkpoint:
        """Read the newest whole checkpoint, or the one with the best held-out bits/dim, checked against config.toml.

        A newest checkpoint that is torn or damaged is passed over with a warning. A training may go on meanwhile, and
        remove and replace checkpoints.

        Raises:
            ValueError: not a run, no checkpoint yet, none that is whole, or a configuration that is not the
                checkpoint's.
        """
        written = self.read_config()
        path, checkpoint = self._newest_whole(best)
        for name, (there, here) in checkpoint.config.changes(written).items():
            may_differ = name in ADJUSTABLE or name == "data.name"  # images may move; their fingerprint tells
            expect(may_differ, str(self.config), f"{name} = {there!r}, as in {path.name}", repr(here))
        return checkpoint

    def stamp(self, best: bool = False) -> tuple[str, int, int] | None:
        """Look up name, time of change (ns) and size (bytes) of the file that :meth:`load` would read first.

        Two stamps that differ tell that there is a newer checkpoint. Nothing is read. None: there is no checkpoint yet.
        """
        for listed in self._listings(best):
            for path, state in listed:
                if state is not None:
                    return path.name, state.changed, state.size
        return None

    def _listings(self, best: bool) -> Iterator[list[tuple[Path, _State | None]]]:
        """The files that :meth:`load` tries, in this order; again for as long as they are others than those before.

        Ends when a reader that could do nothing with the last ones would find the same: then it is not that a training
        beside it has removed or replaced them since they were listed.
        """
        before: list[tuple[Path, _State | None]] | None = None
        while True:
            listed = [(path, _state_of(path)) for path in ([self.best] if best else self.saved())]
            if listed == before:
                return
            yield listed
            before = listed

    def _newest_whole(self, best: bool) -> tuple[Path, Checkpoint]:
        """The first checkpoint that can be read; the error of the very first one if none can."""
        found: tuple[Path, Checkpoint] | None = None
        refusals: list[ValueError] = []
        there = False
        for listed in self._listings(best):
            found, refusals, there = None, [], any(state is not None for _, state in listed)
            for path, _ in listed:
                try:
                    found = path, Checkpoint.load(path)
                    break
                except ValueError as error:
                    refusals.append(error)
            if found is not None and not refusals:
                break
        name = self.best.name if best else "in checkpoints/"
        expect(there, "run", f"a checkpoint {name}", f"none in {str(self.path)!r} (it has not written its first)")
        if found is None:
            raise refusals[0]
        for refusal in refusals:
            warnings.warn(f"{refusal}; an older checkpoint, {found[0].name}, is taken instead", stacklevel=3)
        return found

    def read_report(self) -> dict[str, Any]:
        """Read report.json, which a run writes at its end: its step and its scores at least.

        Raises:
            FileNotFoundError: there is none yet.
            ValueError: it holds something else.
        """
        path = self.report
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            whole = isinstance(found["step"], int) and isinstance(found["held_out"], dict)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected the report of a run, found {error!r}") from error
        expect(whole, str(path), "the report of a run", "another one")
        return dict(found)


@dataclass(frozen=True)
class _State:
    """What tells a file from the one that took its place."""

    changed: int
    size: int
    inode: int


def _state_of(path: Path) -> _State | None:
    """None: it is not there. Of a symlink that leads nowhere: that of the link."""
    for look in (path.stat, path.lstat):
        with contextlib.suppress(OSError):
            found = look()
            return _State(found.st_mtime_ns, found.st_size, found.st_ino)
    return None


def _free(path: Path) -> Path:
    """``path``, or with a number behind it one where nothing is yet."""
    number, found = 1, path
    while os.path.lexists(found):
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found


def _matching(folder: Path, pattern: str) -> list[Path]:
    """None in a folder that is not there: a new run in the place of this one removes it."""
    try:
        return list(folder.glob(pattern))
    except FileNotFoundError:
        return []


def step_of(path: Path) -> int:
    """Read the step from the name of a checkpoint or of samples; -1 where there is none."""
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def _what(path: Path) -> str:
    return "a file" if path.exists() else "which does not exist"


def load_model(checkpoint: Checkpoint, name: str, device: torch.device | str = "cpu") -> Glow:
    """Load the trained model in evaluation mode, with averaged weights where the run has them.

    Args:
        checkpoint: from :meth:`RunFolder.load`.
        name: the run's name, for messages.
        device: where the model goes.

    Raises:
        ValueError: the weights do not fit the configuration.
    """
    model = Glow(checkpoint.config.model)
    checkpoint.load_model(model, name, averaged=True)
    return model.to(device).eval()
