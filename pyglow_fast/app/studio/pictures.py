"""Makes files that come with the command that repeats them: samples side by side, and the scores of image files."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyglow_fast.app.studio.opened import OpenRun, Picked
from pyglow_fast.app.studio.words import Draw, File, Sample, number_text, shown_name
from pyglow_fast.data import ImageSet
from pyglow_fast.train import ImageScores, ScoredImages, class_columns, histogram_png, score_csv
from pyglow_fast.train.figures import grid, png_bytes

COMMAND = "Command"  # the name of the text in a PNG
LONGEST = 24  # characters of a name in the picture
NAMED = 12  # marks that have names in the picture; of more each has its number alone


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


class FileScore(NamedTuple):
    """The bits/dim of one image, beside those of held-out images where there are any."""

    picked: Picked
    bits: float
    share_below: float  # the share of held-out images with fewer; NaN without any
    far: bool  # whether it lies beyond what Scores.bounded gives: its class says nothing


def score_files(opened: OpenRun, files: Sequence[Picked]) -> list[FileScore]:
    """Measure the bits/dim of single images, each as if it were alone, so that the order does not matter."""
    beside, found = opened.scores_at_hand(), []
    for picked in files:
        bits = opened.bits(picked.pixels, picked.label)
        share = beside.share_below(bits) if beside and math.isfinite(bits) else math.nan
        found.append(FileScore(picked, bits, share, bool(beside and beside.bounded(bits) != bits)))
    return found


def _command(opened: OpenRun, scores: Sequence[FileScore]) -> str:
    return command_line(opened, "score", [score.picked.image.text for score in scores])


def made_picture(opened: OpenRun, scores: Sequence[FileScore]) -> Made:
    """Draw the images as lines on the histogram of held-out ones, a PNG: what ``score ... --picture`` writes."""
    command, marks, beside = _command(opened, scores), {}, opened.scores()
    for i, score in enumerate(scores):
        name = shown_name(score.picked.image)
        short = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
        number = f"{i + 1} {short}" if len(scores) <= NAMED else str(i + 1)
        mark, bits = number if len(scores) > 1 else short, beside.bounded(score.bits)  # which leaves others room
        marks[f"{mark} {'←' if score.bits < bits else '→'} {score.bits:.3g}" if score.far else mark] = bits
    name = f"held-out {opened.source}"
    title = f"{opened.folder.path.resolve().name} at step {opened.step}"
    data = histogram_png({name: beside.held_out}, title, marks, {COMMAND: command})
    return Made(data, command, option="--picture")


def made_csv(opened: OpenRun, scores: Sequence[FileScore]) -> Made:
    """Write the scores as a CSV file: what ``score ... --out`` writes."""
    pixels = torch.stack([score.picked.pixels for score in scores]).to(torch.uint8)
    labels = torch.tensor([score.picked.label for score in scores]) if opened.classes else None
    names = tuple(score.picked.image.text for score in scores)
    images = ImageSet("files", pixels, opened.n_bins, labels, opened.classes, groups=names)
    bits = torch.tensor([score.bits for score in scores], dtype=torch.float64)
    table = score_csv({"files": ScoredImages(images, ImageScores(torch.arange(len(scores)), bits))})
    return Made(table.encode(), _command(opened, scores), ".csv")
