"""Makes pictures that hold the command that repeats them: samples side by side, and paths between images."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.latents import decode_path
from pyglow_fast.likelihood import count_not_finite
from pyglow_fast.studio.opened import OpenRun, Picked
from pyglow_fast.studio.words import Draw, File, Sample, number_text
from pyglow_fast.train import class_columns, to_pixels
from pyglow_fast.train.figures import animation_bytes, grid, image_picture, png_bytes

if TYPE_CHECKING:
    from pyglow_fast.studio.edits import Subject

ANIMATED = (".gif", ".webp")
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
    last += ["--best"] if opened.best else []
    last += ["--device", opened.device] if opened.device != "auto" else []
    return shlex.join(["pyglow-fast", name, opened.name, *words, *last])


def made_png(picture: Tensor, command: str) -> Made:
    """Encode a picture, uint8 (3, H, W), as a PNG that holds its command."""
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
        return made_png(picture, command_line(opened, "sample", words, scale))


class Between:
    """A path from one image to another, of one run and in one space: straight, or on great circles level by level."""

    def __init__(self, first: Subject, last: Subject, spherical: bool = False) -> None:
        self.first, self.last, self.spherical = first, last, spherical
        self.opened, self.space = first.opened, first.space

    @torch.no_grad()
    def frames(self, count: int = 8, times: tuple[float, ...] | None = None) -> tuple[Tensor, int]:
        """Compute the frames, grey levels int64 (count, C, H, W), and how many were not finite.

        They are evenly spaced, both ends included, or at the points ``times`` of the path between 0 and 1.
        """
        first, last = self.first, self.last
        latents, labels = (first.latents, last.latents), (first.y, last.y)
        x = decode_path(self.opened.model, *latents, count, self.spherical, self.space, labels, times=times)[0]
        return to_pixels(x, self.opened.n_bins).cpu(), count_not_finite(x)

    def _command(self, words: Sequence[str], scale: int | None) -> str:
        first, last = self.first.picked, self.last.picked
        ends = ["--from", first.image.text, "--to", last.image.text, "--space", self.space]
        if first.label is not None and last.label is not None:
            ends += ["--labels", *(self.opened.classes[label] for label in (first.label, last.label))]
        ends += ["--spherical"] if self.spherical else []
        return command_line(self.opened, "interpolate", [*ends, *words], scale)

    def made_frame(self, pixels: Tensor, time: float, scale: int | None = None) -> Made:
        """Encode one frame (C, H, W) as a PNG."""
        picture = image_picture(pixels, self.opened.n_bins, scale)
        return made_png(picture, self._command(["--at", number_text(time)], scale))

    def made(self, pixels: Tensor, suffix: str, scale: int | None = None) -> Made:
        """Encode all frames (n, C, H, W): side by side as a PNG, or there and back again as a GIF or WebP."""
        command = self._command(["--frames", str(len(pixels))], scale)
        if suffix == ".png":
            return made_png(grid(pixels, self.opened.n_bins, len(pixels), scale), command)
        expect(suffix in ANIMATED, "out", f"a name ending in {' or '.join(('.png', *ANIMATED))}", repr(suffix))
        data = animation_bytes(pixels, self.opened.n_bins, suffix[1:], scale=scale, text={COMMAND: command})
        return Made(data, command, suffix)
