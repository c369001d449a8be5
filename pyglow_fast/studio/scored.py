"""Scores image files beside held-out images: a table and a picture of their bits/dim."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from pyglow_fast.data import ImageSet
from pyglow_fast.studio.opened import OpenRun, Picked
from pyglow_fast.studio.pictures import COMMAND, Made, command_line
from pyglow_fast.studio.words import shown_name
from pyglow_fast.train import ImageScores, ScoredImages, histogram_png, score_csv

LONGEST = 24  # characters of a name in the picture
NAMED = 12  # marks that have names in the picture; of more each has its number alone


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
