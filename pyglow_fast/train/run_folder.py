"""The folder of one run: which files it holds, and when it may be made, resumed or replaced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from pyglow_fast._errors import expect
from pyglow_fast.models import Glow
from pyglow_fast.train.checkpoint import Checkpoint
from pyglow_fast.train.config import ADJUSTABLE, TrainConfig
from pyglow_fast.train.files import TEMPORARY, write_text


class FolderError(ValueError):
    """The folder of a new run cannot be made or written."""


class RunFolder:
    """Paths of a run. Making the object touches nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.best = self.path / "best.safetensors"
        self.metrics = self.path / "metrics.csv"
        self.samples = self.path / "samples.png"
        self.sample_history = self.path / "samples"
        self.curve = self.path / "curve.png"
        self.report = self.path / "report.json"

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
            held = sorted(entry.name for entry in self.path.iterdir())
            expect(not held, "out", "a new or empty folder, or a run", f"{str(self.path)!r}, which holds {held[:3]}")

    def create(self, config: TrainConfig) -> None:
        """Make the folder, remove the files of a former run in it (no others), and write the configuration.

        Raises:
            FolderError: the folder cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._remove_run()
            self.write_config(config)
        except OSError as error:
            raise FolderError(f"out: expected a folder that can be written, found {error}") from error

    def write_config(self, config: TrainConfig) -> None:
        """Replace config.json."""
        write_text(self.config, json.dumps(config.to_dict(), indent=2) + "\n")

    def _remove_run(self) -> None:
        files = (self.checkpoint, self.best, self.metrics, self.samples, self.curve, self.report, self.config)
        for path in files:  # the configuration last: without it the rest would no longer count as a run
            path.with_name(path.name + TEMPORARY).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        if self.sample_history.is_dir():
            shutil.rmtree(self.sample_history)

    def load(self, best: bool = False) -> Checkpoint:
        """The last checkpoint, or the one with the best held-out bits/dim, checked against config.json.

        Raises:
            ValueError: not a run, no checkpoint yet, or a configuration that is not the checkpoint's.
        """
        run = str(self.path)
        expect(self.path.is_dir(), "run", "the folder of a run", f"{run!r}, " + _what(self.path))
        expect(self.exists, "run", "the folder of a run (with config.json)", f"{run!r} without one")
        try:
            written = TrainConfig.from_dict(json.loads(self.config.read_text(encoding="utf-8")))
        except (UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{self.config}: expected a configuration as JSON, found {error}") from error
        path = self.best if best else self.checkpoint
        expect(path.is_file(), "run", f"a checkpoint {path.name}", f"none in {run!r} (it stopped before the first)")
        checkpoint = Checkpoint.load(path)
        for name, (there, here) in checkpoint.config.changes(written).items():
            may_differ = name in ADJUSTABLE or name == "data.name"  # images may move; their fingerprint tells
            expect(may_differ, str(self.config), f"{name} = {there!r}, as in {path.name}", repr(here))
        return checkpoint


def _what(path: Path) -> str:
    return "a file" if path.exists() else "which does not exist"


def load_model(checkpoint: Checkpoint, name: str, device: torch.device | str = "cpu") -> Glow:
    """The trained model in evaluation mode.

    Args:
        checkpoint: from :meth:`RunFolder.load`.
        name: of the run, for messages.
        device: where the model goes.

    Raises:
        ValueError: the weights do not fit the configuration.
    """
    model = Glow(checkpoint.config.model)
    checkpoint.load_model(model, name)
    return model.to(device).eval()
