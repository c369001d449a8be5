"""Writes what a run leaves: rows, checkpoints, pictures. A disk that refuses does not end the run."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pyglow_fast.data import MissingExtraError, optional
from pyglow_fast.train.checkpoint import Checkpoint
from pyglow_fast.train.config import TrainConfig
from pyglow_fast.train.figures import class_columns, grid, save_picture
from pyglow_fast.train.files import refusing, write_text
from pyglow_fast.train.metrics import COLUMNS, Row, merged, read_metrics, rows_text
from pyglow_fast.train.run_folder import RunFolder


class SaveError(OSError):
    """Raised when the end of a run cannot be written; the message says what is on the disk."""


def board_class() -> Any:
    """Import TensorBoard's SummaryWriter, which is an optional library."""
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError as error:
        raise MissingExtraError(
            f"tensorboard is needed for event files and cannot be imported ({error}): "
            'pip install "pyglow-fast[tensorboard]"'
        ) from error


class RunWriter:
    """A writer of all files of one run; it writes on the ``first`` rank only, and does nothing on the others.

    A write that fails is said, and the run goes on. A row that cannot be written waits, and is written with the next.
    """

    def __init__(self, folder: RunFolder, config: TrainConfig, first: bool) -> None:
        self.folder, self.config, self.first, self.quiet = folder, config, first, not first
        self.refused: list[str] = []  # what could not be written so far, and why
        self._waiting: list[Row] = []
        self._last_row: float | int | None = None  # the step of the last row in the file
        self._board: Any = None

    def open(self, step: int | None) -> None:
        """Make the folder of a new run (``step`` None), or go on in that of a resumed one after ``step``.

        Rows after the step of a resumed run are dropped: they will be written again.
        """
        if not self.first:
            return
        with refusing():
            if step is None:
                self.folder.create(self.config)
            else:
                self.folder.set_aside(step)
                self.folder.write_config(self.config)
            self._rewrite([row for row in read_metrics(self.folder.metrics) if int(row["step"] or 0) <= (step or 0)])
            if self.config.tensorboard:
                purge = None if step is None else step + 1  # TensorBoard hides what was written from there on
                self._board = board_class()(str(self.folder.events), purge_step=purge)

    def say(self, text: str) -> None:
        """Print a line for people, above the progress line."""
        if not self.quiet:
            (optional("tqdm", "the progress line").tqdm.write if sys.stderr.isatty() else print)(text)
            sys.stdout.flush()

    def attempt(self, what: str, action: Callable[[], Any]) -> OSError | None:
        """Try to write; what the disk refuses is said and kept in ``refused``, and the run goes on."""
        try:
            if self.first:
                action()
        except OSError as error:
            self.refused.append(f"{what} ({error})")
            self.say(f"warning: {what} cannot be written ({error}); the run goes on")
            return error
        return None

    def add(self, row: Row) -> None:
        """Add a row to metrics.csv, and its numbers to TensorBoard's; one of a step that is there is completed."""
        self._waiting.append(row)
        self.attempt("a row of metrics.csv", self._write_rows)

    def _write_rows(self) -> None:
        path, (*failed, row) = self.folder.metrics, self._waiting
        if failed or self._last_row == row["step"] or not path.exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the write that failed may have left a part of a row
                rows = {found["step"]: found for found in read_metrics(path)}
            for new in self._waiting:
                rows[new["step"]] = merged(rows.get(new["step"], {}), new)
            self._rewrite(list(rows.values()))
        else:
            with open(path, "ab", buffering=0) as file:  # one write of a whole line: a reader sees a row or none
                file.write(rows_text([row]).encode())
            self._last_row = row["step"]
        for new in self._waiting if self._board is not None else []:
            for name, value in new.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, new["step"])
        self._waiting.clear()

    def _rewrite(self, rows: list[Row]) -> None:
        write_text(self.folder.metrics, ",".join(COLUMNS) + "\n" + rows_text(rows))
        self._last_row = rows[-1]["step"] if rows else None

    def save(self, checkpoint: Checkpoint, final: bool = False) -> None:
        """Save a checkpoint of this step; the ``final`` one must be written, else a SaveError is raised."""
        error = self.attempt("a checkpoint", lambda: self.folder.save(checkpoint, self.config.keep))
        if error is not None and final:
            kept = next(iter(self.folder.saved()), "none")
            step = checkpoint.progress["step"]
            raise SaveError(f"the checkpoint of step {step} cannot be written: {error}\n  kept: {kept}") from error

    def save_best(self, checkpoint: Checkpoint) -> None:
        """Save the checkpoint with the best held-out score so far."""
        self.attempt("the best checkpoint", lambda: checkpoint.save(self.folder.best))

    def samples(self, step: int, pixels: Tensor, n_bins: int, class_names: Sequence[str]) -> None:
        """Write samples.png, each class below its name where there are few, and a copy that stays."""
        by_class = class_columns(len(pixels), self.config.model.n_classes) is not None
        picture = grid(pixels, n_bins, class_names if by_class else None)

        def write() -> None:
            self.folder.sample_history.mkdir(exist_ok=True)
            save_picture(picture, self.folder.sample_history / f"step-{step:07d}.png")
            save_picture(picture, self.folder.samples)
            if self._board is not None:
                self._board.add_image("samples", picture, step)

        self.attempt("samples", write)

    def lost_rows(self) -> list[str]:
        """What is to be said of rows that could never be written: nothing, if there are none."""
        return [f"{len(self._waiting)} rows of metrics.csv, which are lost"] if self.first and self._waiting else []

    def check_end(self, since: int, reached: str) -> None:
        """Raise a SaveError if a part of the end, ``since`` so many refusals, or rows of any time are not written."""
        lost = [*self.lost_rows(), *self.refused[since:]]
        if lost:
            raise SaveError(
                f"the end of the run cannot be written: {'; '.join(lost)}\n  reached: {reached}\n"
                f"  kept: {self.folder.checkpoint}, with all weights; --resume writes the rest again"
            )

    def close(self) -> None:
        """Write out what is buffered."""
        if self._board is not None:
            self.attempt("events", self._board.close)
