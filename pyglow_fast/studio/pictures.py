"""Makes pictures that hold the command that repeats them, such as samples side by side."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from pyglow_fast.studio.opened import OpenRun, Picked
from pyglow_fast.studio.words import Draw, File, Sample, number_text
from pyglow_fast.train import class_columns
from pyglow_fast.train.figures import grid, png_bytes

COMMAND = "Command"  # the name of the text in a PNG


class Made(NamedTuple):
    """A file that was made, as bytes, and the command that makes the same bytes again."""

    data: bytes
    command: str  # without the name of the file
    suffix: str = ".png"
    option: str = "--out"  # takes the file's name

    def file_name(self, name: str) -> str:
        """Choose the name of the file: ``name``, or another where the command reads a file of that name."""
        read = {os.path.basename(word).lower() for word in shlex.split(self.command)}
        return f"new-{name}" if name.lower() in read else name

    def out_words(self, name: str) -> str:
        """Write the option that names the file, quoted for a shell: ``--out``, and :meth:`file_name`."""
        return f"{self.option} {shlex.quote(File(self.file_name(name)).text)}"

    def whole_command(self, name: str) -> str:
        """The command with ``--out``, to be copied."""
        return f"{self.command} {self.out_words(name)}"


def command_line(opened: OpenRun, name: str, words: Sequence[str], scale: int | None = None) -> str:
    """Join ``pyglow-fast NAME RUN ...``, quoted for a shell."""
    last = ["--scale", str(scale)] if scale else []
    last += ["--last"] if opened.last else []
    last += ["--device", opened.device] if opened.device != "auto" else []
    return shlex.join(["pyglow-fast", name, opened.name, *words, *last])


def made_png(opened: OpenRun, name: str, words: Sequence[str], picture: Tensor, scale: int | None = None) -> Made:
    """Encode a picture, uint8 (3, H, W), as a PNG that holds its :func:`command_line`."""
    command = command_line(opened, name, words, scale)
    return Made(png_bytes(picture, {COMMAND: command}), command)


class Grid:
    """Samples of a run side by side; a class that it does not have is refused."""

    def __init__(self, opened: OpenRun, draw: Draw) -> None:
        self.opened, self.draw, self.drawn = opened, draw, opened.drawn(draw)

    @property
    def heads(self) -> tuple[str, ...]:
        """The names of the classes where each has a column of its own; empty where the samples stand in a square."""
        count = None if self.draw.labels else class_columns(self.draw.n, self.opened.model.config.n_classes)
        return self.opened.classes[: count or 0]

    def picked(self, number: int) -> Picked:
        """Take sample ``number``, to be edited."""
        label = None if self.drawn.labels is None else int(self.drawn.labels[number])
        return Picked(self.drawn.pixels[number].byte(), label, Sample(number, self.draw))

    def made(self, columns: int | None = None, scale: int | None = None) -> Made:
        """Encode all samples as one PNG: what the command ``sample`` writes."""
        draw, opened = self.draw, self.opened
        words = ["--n", str(draw.n), "--temperature", number_text(draw.temperature), "--seed", str(draw.seed)]
        words += [word for label in draw.labels for word in ("--label", opened.classes[label])]
        words += ["--columns", str(columns)] if columns else []
        picture = grid(self.drawn.pixels, opened.n_bins, columns or self.heads or None, scale)
        return made_png(opened, "sample", words, picture, scale)
