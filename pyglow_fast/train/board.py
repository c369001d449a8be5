"""Writes TensorBoard's event files beside a run: its numbers as curves, its samples as pictures."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.data import MissingExtraError


def writer_class() -> Any:
    """Import TensorBoard's SummaryWriter, which is an optional library.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError as error:
        raise MissingExtraError(
            f"tensorboard is needed for event files and cannot be imported ({error}): "
            'pip install "pyglow-fast[tensorboard]"'
        ) from error


class Board:
    """A writer of numbers and pictures by step, as event files that ``tensorboard --logdir FOLDER`` shows.

    Args:
        folder: where the event files go, made if it is not there; None: nothing is written, and no library needed.
        purge_step: the first step that a resumed run writes again: TensorBoard hides what was written from there on.
            None for a new run.

    Raises:
        MissingExtraError: tensorboard is not installed; nothing has been written then.
        ValueError: a purge_step below 0; a picture that is none.
    """

    def __init__(self, folder: Path | None, purge_step: int | None = None) -> None:
        expect(purge_step is None or purge_step >= 0, "purge_step", "None or a step, 0 or more", purge_step)
        self._writer = None if folder is None else writer_class()(str(folder), purge_step=purge_step)

    def scalars(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Add one point to the curve of each name; a value of None is left out."""
        if self._writer is not None:
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, pixels: Tensor) -> None:
        """Add a picture: uint8, (3, H, W) or (1, H, W)."""
        shape = tuple(pixels.shape)
        fits = pixels.dtype == torch.uint8 and len(shape) == 3 and shape[0] in (1, 3)
        expect(fits, "pixels", "uint8, shape (3, H, W) or (1, H, W)", f"{pixels.dtype}, shape {shape}")
        if self._writer is not None:
            self._writer.add_image(name, pixels.cpu(), step)

    def flush(self) -> None:
        """Write out what is buffered, so that the files of a run that is killed have it."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Write out everything and end; nothing can be added any more."""
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
