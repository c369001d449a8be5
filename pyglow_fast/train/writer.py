"""Writes what a run leaves: rows, checkpoints, pictures. A disk that refuses does not end the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyglow_fast.data import optional
from pyglow_fast.train.board import Board
from pyglow_fast.train.checkpoint import Checkpoint
from pyglow_fast.train.config import TrainConfig
from pyglow_fast.train.figures import class_columns, grid, save_picture
from pyglow_fast.train.files import refusing
from pyglow_fast.train.metrics import MetricsLog, Row, read_metrics
from pyglow_fast.train.run_folder import RunFolder


class SaveError(OSError):
    """Raised when the end of a run cannot be written; the message says what is on the disk.

    Examples:
        >>> from pathlib import Path
        >>> from pyglow_fast import GlowConfig
        >>> from pyglow_fast.train import SaveError, TrainConfig, start
        >>> model = GlowConfig((1, 8, 8), n_levels=1, n_steps=1, hidden=4)
        >>> run = start(TrainConfig(model=model, max_steps=1), "runs/tiny")
        >>> run.folder.page = Path("gone/report.html")  # a place that cannot be written
        >>> try:
        ...     run.execute(quiet=True)
        ... except SaveError as error:
        ...     print(error)
        the end of the run cannot be written: the page of the report ...
    """


class RunWriter:
    """A writer of all files of one run; it writes on the first rank only, and does nothing on the others.

    Args:
        folder: the folder of the run.
        config: the settings of the run.
        first: whether this is the rank that writes.
        quiet: print nothing.
    """

    def __init__(self, folder: RunFolder, config: TrainConfig, first: bool, quiet: bool) -> None:
        self.folder, self.config, self.first, self.quiet = folder, config, first, quiet
        self.metrics = MetricsLog(folder.metrics)
        self.refused: list[str] = []  # what could not be written so far, and why
        self._board = Board(None)

    def open(self, step: int | None) -> None:
        """Make the folder of a new run (``step`` None), or go on in that of a resumed one after ``step``.

        Raises:
            FolderError: it cannot be made or written.
        """
        if not self.first:
            return
        with refusing():
            if step is None:
                self.folder.create(self.config)
                self.metrics.start()
            else:
                self.folder.set_aside(step)
                self.metrics.start(step)
                self.folder.write_config(self.config)
            if self.config.tensorboard:
                self._board = Board(self.folder.events, None if step is None else step + 1)

    def say(self, text: str) -> None:
        """Print a line for people, above the progress bar."""
        if self.first and not self.quiet:
            optional("tqdm", "the progress bar").tqdm.write(text)

    def attempt(self, what: str, action: Callable[[], Any]) -> OSError | None:
        """Try to write; what the disk refuses is said and kept in ``refused``, and the run goes on.

        A folder that was removed is made again first, and locked.

        Raises:
            FolderError: another run was made in its place.
        """
        if not self.first:
            return None
        try:
            try:
                if self.folder.is_lost:
                    self._make_again()
                action()
            except FileNotFoundError:
                self._make_again()
                action()
        except OSError as error:
            self.refused.append(f"{what} ({error})")
            self.say(f"warning: {what} cannot be written ({error}); the run goes on")
            return error
        return None

    def _make_again(self) -> None:
        self.folder.make_again()
        if not self.folder.exists:
            self.say(f"warning: the folder of the run was removed; it is made again: {self.folder.path}")
            self.folder.write_config(self.config)
        if not self.folder.metrics.exists():
            self.metrics.start()

    def add_last(self, row: Row) -> None:
        """Add the row of the end, in the place of one of the same step, whose other values it keeps."""
        if not self.first:
            return
        step = int(row["step"] or 0)
        known: Row = {}
        scores = {name: value for name, value in row.items() if name.startswith(("held_out", "train_subset"))}

        def replace() -> None:
            for found in read_metrics(self.folder.metrics):
                if found["step"] == step:
                    known.update({name: value for name, value in found.items() if value is not None})
            self.metrics.start(step - 1)
            self.metrics.add(row | known | scores)

        self.attempt("the last row of metrics.csv", replace)
        self._event(step, {name: value for name, value in row.items() if name in scores or name not in known})

    def add(self, row: Row) -> None:
        """Add a row to metrics.csv, and its numbers to TensorBoard's files."""
        self.attempt("a row of metrics.csv", lambda: self.metrics.add(row))
        self._event(int(row["step"] or 0), row)

    def _event(self, step: int, row: Row) -> None:
        scalars = {name: value for name, value in row.items() if name != "step"}
        self.attempt("an event", lambda: self._board.scalars(step, scalars))

    def save(self, checkpoint: Checkpoint, final: bool = False) -> None:
        """Save a checkpoint of this step.

        Raises:
            SaveError: ``final``, and it cannot be written.
        """
        error = self.attempt("a checkpoint", lambda: self._save(checkpoint))
        if error is not None and final:
            kept = self.folder.saved()
            raise SaveError(
                f"the checkpoint of step {checkpoint.progress['step']} cannot be written: {error}\n"
                f"  kept: {kept[0] if kept else 'none'}"
            ) from error

    def _save(self, checkpoint: Checkpoint) -> None:
        if not self.folder.exists:
            self._make_again()  # a checkpoint without its configuration could not be resumed
        self.folder.save(checkpoint, self.config.keep)

    def save_best(self, checkpoint: Checkpoint) -> None:
        """Save the checkpoint with the best held-out score so far."""
        self.attempt("the best checkpoint", lambda: checkpoint.save(self.folder.best))

    def samples(self, step: int, pixels: Tensor, n_bins: int) -> None:
        """Write samples.png, and a copy that stays."""
        if not self.first:
            return
        picture = grid(pixels, n_bins, class_columns(len(pixels), self.config.model.n_classes))
        paths = (self.folder.sample_history / f"step-{step:07d}.png", self.folder.samples)

        def write() -> None:
            self.folder.sample_history.mkdir(exist_ok=True)
            for path in paths:
                save_picture(picture, path)

        self.attempt("samples", write)
        self.attempt("an event", lambda: self._board.image(step, "samples", picture))

    def check_end(self, since: int, reached: str) -> None:
        """Tell whether all that belongs to the end is written.

        Args:
            since: how many writes had been refused before the end.
            reached: what the run came to, in words, which the error shows as it is written nowhere.

        Raises:
            SaveError: something is not.
        """
        lost = self.refused[since:]
        if lost:
            raise SaveError(
                f"the end of the run cannot be written: {'; '.join(lost)}\n  reached: {reached}\n"
                f"  kept: {self.folder.checkpoint}, with all weights; --resume writes the rest again"
            )

    def close(self) -> None:
        """Write out what is buffered."""
        self.attempt("events", self._board.close)
