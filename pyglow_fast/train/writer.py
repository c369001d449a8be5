"""Writes what a run leaves: rows, checkpoints, pictures. A disk that refuses does not end the run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyglow_fast._core.files import refusing, write_bytes, write_text
from pyglow_fast.data import Images, optional
from pyglow_fast.train.checkpoint import Checkpoint
from pyglow_fast.train.config import TrainConfig
from pyglow_fast.train.figures import class_heads, example_grid, grid, png_bytes
from pyglow_fast.train.metrics import COLUMNS, Row, csv_text, read_metrics
from pyglow_fast.train.run_folder import RunFolder

SCORES = ("held_out", "train_subset")  # how the names of their columns begin


class SaveError(OSError):
    """Raised when the end of a run cannot be written; the message says what is on the disk."""


class RunWriter:
    """A writer of all files of one run, on the ``first`` rank only; a row that cannot be written goes with the next."""

    def __init__(self, folder: RunFolder, config: TrainConfig, first: bool) -> None:
        self.folder, self.config, self.first, self.quiet = folder, config, first, not first
        self.refused: list[str] = []  # what could not be written so far, and why
        self._rows: dict[float | int | None, Row] = {}  # by step, all that metrics.csv is to have
        self._unwritten: list[Row] = []
        self._board: Any = None

    def open(self, step: int | None) -> None:
        """Make the folder of a new run (``step`` None), or go on after ``step``: later rows will be written again."""
        if not self.first:
            return
        with refusing():
            if step is None:
                self.folder.create(self.config)
            else:
                self.folder.set_aside(step)
                self.folder.write_config(self.config)
            rows = read_metrics(self.folder.metrics)
            self._rows = {row["step"]: row for row in rows if int(row["step"] or 0) <= (step or 0)}
            self._write_rows()
            if self.config.tensorboard:
                purge = None if step is None else step + 1  # TensorBoard hides what was written from there on
                board = optional("torch.utils.tensorboard", "event files")
                self._board = board.SummaryWriter(str(self.folder.events), purge_step=purge)

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
        step, path = row["step"], self.folder.metrics
        # What is known of a step stays, but for scores, of which the new row may have more.
        known: Row = {name: value for name, value in self._rows.get(step, {}).items() if value is not None}
        scores: Row = {name: value for name, value in row.items() if name.startswith(SCORES) and value is not None}
        appended = step not in self._rows and not self._unwritten and path.exists()
        self._rows[step] = row | known | scores
        self._unwritten.append(row)

        def write() -> None:
            if appended:
                with open(path, "ab", buffering=0) as file:  # one write of a whole line: a reader sees a row or none
                    file.write(_text([row]).encode())
            else:
                self._write_rows()
            for new in self._unwritten if self._board is not None else []:
                for name, value in new.items():
                    if name != "step" and value is not None:
                        self._board.add_scalar(name, value, new["step"])
            self._unwritten.clear()

        self.attempt("a row of metrics.csv", write)

    def _write_rows(self) -> None:
        write_text(self.folder.metrics, ",".join(COLUMNS) + "\n" + _text(self._rows.values()))

    def save(self, checkpoint: Checkpoint, final: bool = False) -> None:
        """Save a checkpoint of this step; the ``final`` one must be written, else a SaveError is raised."""
        error = self.attempt("a checkpoint", lambda: self.folder.save(checkpoint, self.config.keep))
        if error is not None and final:
            kept = next(iter(self.folder.saved()), "none")
            step = checkpoint.progress["step"]
            raise SaveError(f"the checkpoint of step {step} cannot be written: {error}\n  kept: {kept}") from error

    def samples(self, step: int, pixels: Tensor, data: Images) -> None:
        """Write samples.png, each class below its name where there are few, a copy that stays, and training.png."""
        names = () if self.config.model.n_classes is None else data.class_names
        picture = grid(pixels, data.n_bins, class_heads(len(pixels), names) or None)

        def write() -> None:
            self.folder.sample_history.mkdir(exist_ok=True)
            for path in (self.folder.sample_history / f"step-{step:07d}.png", self.folder.samples):
                write_bytes(path, png_bytes(picture))
            examples = example_grid(data, len(pixels), self.config.seed, names)
            write_bytes(self.folder.examples, png_bytes(examples))
            if self._board is not None:
                self._board.add_image("samples", picture, step)

        self.attempt("samples", write)

    def lost_rows(self) -> list[str]:
        """Name the rows that could never be written; empty if there are none."""
        return [f"{len(self._unwritten)} rows of metrics.csv, which are lost"] if self.first and self._unwritten else []

    def close(self) -> None:
        """Write out what is buffered."""
        if self._board is not None:
            self.attempt("events", self._board.close)


def _text(rows: Any) -> str:
    return csv_text([row.get(name) for name in COLUMNS] for row in rows)
