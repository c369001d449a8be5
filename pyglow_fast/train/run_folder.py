"""Manages the folder of one run: which files it holds, and when it may be made, resumed or replaced."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pyglow_fast._core.errors import expect
from pyglow_fast._core.files import TEMPORARY, FolderError, check_place, refusing, write_text
from pyglow_fast.data import optional
from pyglow_fast.models import Glow
from pyglow_fast.train.checkpoint import Checkpoint
from pyglow_fast.train.config import ADJUSTABLE, TrainConfig, read_config, to_toml

_REPORTED = {"step", "seconds", "stopped_early", "held_out", "train", "before", "yardsticks", "skipped", "unreadable"}
_REPORTED |= {"data", "config", "environment", "advice"}


class RunFolder:
    """The paths of a run's files below its folder. Making the object touches nothing.

    >>> from pyglow_fast.train import RunFolder, TrainConfig
    >>> folder = RunFolder("runs/tiny")
    >>> folder.create(TrainConfig(lr=0.002))
    >>> folder.read_config().lr, folder.saved()  # no checkpoint yet
    (0.002, [])
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.toml"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best.safetensors"
        self.metrics = self.path / "metrics.csv"
        self.samples = self.path / "samples.png"
        self.examples = self.path / "training.png"  # training images, as many as there are samples
        self.sample_history = self.path / "samples"
        self.events = self.path / "tensorboard"
        self.curve = self.path / "curve.png"
        self.report = self.path / "report.json"
        self.page = self.path / "report.html"
        self.cache = self.path / "cache"  # what commands computed of a checkpoint; may be removed at any time
        self.lock = self.path / ".lock"
        # Which no other command may replace:
        self.kept = (self.metrics, self.samples, self.examples, self.curve, self.page)

    @property
    def exists(self) -> bool:
        """Whether a run was started in this folder."""
        return self.config.is_file()

    @property
    def checkpoint(self) -> Path:
        """The path of the newest checkpoint; where there is none yet, of the first that there will be."""
        return next(iter(self.saved()), self.of_step(0))

    def saved(self) -> list[Path]:
        """List the checkpoints, the newest first."""
        found = {step_of(path): path for path in self.checkpoints.glob("step-*.safetensors")}
        return [found[step] for step in sorted(found, reverse=True) if step >= 0]

    def drawn(self) -> list[Path]:
        """List the pictures of samples that single steps left, the earliest first."""
        return sorted(self.sample_history.glob("step-*.png"), key=lambda path: (step_of(path), path.name))

    def of_step(self, step: int) -> Path:
        """The path of that step's checkpoint, be it there or not."""
        return self.checkpoints / f"step-{step:07d}.safetensors"

    def check_new(self, overwrite: bool) -> None:
        """Refuse a place where a new run would destroy something that was not given up by ``overwrite``."""
        check_place("out", self.path)
        place = repr(str(self.path))
        ancestor = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        expect(self.path != ancestor or self.path.is_dir(), "out", "a folder", f"a file, {place}")
        expect(ancestor.is_dir(), "out", "a folder that can be made", f"{str(ancestor)!r} is a file")
        if self.exists:
            expect(overwrite, "out", "a new folder (or resume or overwrite)", f"a run in {place}")
        elif self.path.exists():
            names = [entry.name for entry in self.path.iterdir()]
            held = sorted(name for name in names if name != self.lock.name and not name.endswith(TEMPORARY))
            expect(not held, "out", "a new or empty folder, or a run", f"{place}, which holds {held[:3]}")

    def create(self, config: TrainConfig) -> None:
        """Make the folder, remove the files of a former run in it (no others), and write the configuration."""
        with refusing():
            self.path.mkdir(parents=True, exist_ok=True)
            for folder in (self.checkpoints, self.sample_history, self.events):
                if folder.is_dir():
                    shutil.rmtree(folder)
            shutil.rmtree(self.cache, ignore_errors=True)  # another process may write to it just now
            for path in (self.best, *self.kept, self.report, self.config):  # the last makes it count as a run
                path.with_name(path.name + TEMPORARY).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            self.write_config(config)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """A context in which nobody else trains in this folder, which is made if it is not there."""
        filelock = optional("filelock", "training")
        lock = filelock.FileLock(self.lock, blocking=False)
        with refusing():
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except filelock.Timeout:
                place = repr(str(self.path))
                raise FolderError(f"out: expected a run that no other process trains, found one in {place}") from None
        try:
            yield
        finally:
            lock.release()

    def write_config(self, config: TrainConfig) -> None:
        """Write config.toml in the place of the one that is there."""
        write_text(self.config, to_toml(config))

    def read_config(self) -> TrainConfig:
        """Read the settings of the run from config.toml."""
        run, what = str(self.path), "a file" if self.path.exists() else "which does not exist"
        expect(self.path.is_dir(), "run", "the folder of a run", f"{run!r}, {what}")
        expect(self.exists, "run", "the folder of a run (with config.toml)", f"{run!r} without one")
        return TrainConfig.from_dict(read_config(self.config))

    def save(self, checkpoint: Checkpoint, keep: int) -> None:
        """Write a checkpoint, and remove the oldest ones beyond ``keep``; on a full disk all but the newest."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        step = checkpoint.progress["step"]
        try:
            checkpoint.save(self.of_step(step))
        except OSError:
            older = self.saved()[1:]
            if not older:
                raise
            for path in older:  # a full disk: older ones give way
                path.unlink(missing_ok=True)
            checkpoint.save(self.of_step(step))
        for path in [path for path in self.saved() if step_of(path) <= step][keep:]:
            path.unlink(missing_ok=True)

    def set_aside(self, step: int) -> None:
        """Rename the checkpoints after ``step``, which could not be read, so that they do not count as the newest."""
        for path in self.saved():
            if step_of(path) > step:
                path.replace(path.with_name(path.name + ".damaged"))

    def load(self, best: bool = False) -> Checkpoint:
        """Read the newest whole checkpoint, or the one with the best held-out bits/dim, checked against config.toml."""
        written, refusals = self.read_config(), []
        listed = [path for path in ([self.best] if best else self.saved()) if path.exists()]
        where = f"none in {str(self.path)!r} (it has not written its first)"
        expect(bool(listed), "run", f"a checkpoint {self.best.name if best else 'in checkpoints/'}", where)
        for path in listed:
            try:
                loaded = Checkpoint.load(path)
                break
            except ValueError as error:
                refusals.append(error)
        else:
            raise refusals[0]
        for refusal in refusals:
            warnings.warn(f"{refusal}; an older checkpoint, {path.name}, is taken instead", stacklevel=2)
        for name, (there, here) in loaded.config.changes(written).items():
            may_differ = name in ADJUSTABLE or name == "data.name"  # images may move; their fingerprint tells
            expect(may_differ, str(self.config), f"{name} = {there!r}, as in {path.name}", repr(here))
        return loaded

    def stamp(self, best: bool = False) -> tuple[str, int, int] | None:
        """Look up what differs where there is a newer checkpoint: name, time of change (ns) and size; None without."""
        path = self.best if best else self.checkpoint
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            return path.name, found.st_mtime_ns, found.st_size
        return None

    def read_report(self) -> dict[str, Any]:
        """Read report.json, which a run writes at its end; a FileNotFoundError: there is none yet."""
        try:
            found: dict[str, Any] = json.loads(self.report.read_text(encoding="utf-8"))
            if missing := _REPORTED.difference(found):
                raise ValueError(f"without {min(missing)!r}")
        except (TypeError, ValueError) as error:  # the former of a number or null, which hold nothing
            raise FolderError(f"run: expected {self.report} as a run wrote it, found it damaged ({error})") from error
        return found


def step_of(path: Path) -> int:
    """Read the step from the name of a checkpoint or of samples; -1 where there is none."""
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def load_model(checkpoint: Checkpoint, name: str, device: torch.device | str = "cpu") -> Glow:
    """Load the trained model of the run ``name`` in evaluation mode, with averaged weights where it has them."""
    model = Glow(checkpoint.config.model)
    checkpoint.load_model(model, name, averaged=True)
    return model.to(device).eval()
