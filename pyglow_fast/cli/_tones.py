"""Measures how near edits of emoji come to the true result: the same emoji in a skin tone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.data import DataConfig, Images, emoji_tone_pairs, load_data
from pyglow_fast.data.cache import cached
from pyglow_fast.latents import EditScore, edit_score
from pyglow_fast.train.csv_text import Cell, csv_text
from pyglow_fast.train.files import write_text


@dataclass(frozen=True)
class Row:
    """The score of one way to come near the target at one strength (None for copying)."""

    edit: str
    strength: float | None
    score: EditScore


def copy_and_table(
    x: Tensor, edited: Tensor, target: Tensor, pixels: Tensor, strengths: list[float]
) -> tuple[list[Row], str]:
    """Score the edits, and beside them two ways that need no model: copying, and a shift of the pixels.

    Args:
        x: unedited images (N, C, H, W).
        edited: (N, S, C, H, W), each image edited by each strength.
        target: (N, C, H, W), what the images should become.
        pixels: (C, H, W), the mean pixel difference of the training pairs.
        strengths: the S strengths of the edits.
    """
    copy = edit_score(x, target, x)
    edits = [edit_score(edited[:, i], target, x) for i in range(len(strengths))]
    shifts = [edit_score(x + value * pixels.to(x), target, x) for value in strengths]
    lines = [
        "RMSE to the true target over pixels from 0 to 1, mean over the images ± its standard error",
        f"  copy (no edit): {copy.distance:.4f}{_error(copy.standard_error)}",
        "  strength  edit of the latents   better than copy by   not finite   pixels shifted by their mean difference",
    ]
    for value, edit, shift in zip(strengths, edits, shifts, strict=True):
        lines.append(
            f"  {value:>8g}  {edit.distance:.4f}{_error(edit.standard_error):<12}"
            f"  {edit.gain:>+8.4f}{_error(edit.gain_error):<12}  {edit.not_finite:>9d}"
            f"     {shift.distance:.4f}{_error(shift.standard_error)}"
        )
    rows = [Row("copy", None, copy)]
    for name, scores in (("latents", edits), ("pixels", shifts)):
        rows += [Row(name, value, score) for value, score in zip(strengths, scores, strict=True)]
    return rows, "\n".join(lines)


def _error(value: float) -> str:
    return "" if math.isnan(value) else f" ± {value:.4f}"


def write_scores(rows: list[Row], path: Path) -> None:
    """Write one line for each row; the standard error of a single image is empty."""
    lines: list[list[Cell]] = [["edit", "strength", "rmse", "rmse_se", "gain", "gain_se", "images", "not_finite"]]
    for row in rows:
        score = row.score
        numbers = [score.distance, score.standard_error, score.gain, score.gain_error]
        known = [None if math.isnan(value) else value for value in numbers]
        lines.append([row.edit, row.strength, *known, score.images, score.not_finite])
    write_text(path, csv_text(lines))


@dataclass(frozen=True)
class TonePairs:
    """The indices of emoji without a tone and of the same ones in one tone: training ones, and held-out ones.

    Args:
        train_bases, train_variants: training emoji without the tone and with it, whose means differ by the direction.
        bases, targets: held-out emoji that are edited, and what they should become.
    """

    train_bases: Tensor
    train_variants: Tensor
    bases: Tensor
    targets: Tensor


def tone_pairs(tone: str, data: Images, config: DataConfig, held_out: Tensor) -> TonePairs:
    """Find the pairs of one tone; an emoji and its tones are on one side of the split, which keeps groups together.

    Args:
        tone: one of the names in TONES.
        data: all emoji.
        config: how the images were loaded.
        held_out: indices of the held-out ones.

    Raises:
        ValueError: images were left out as unreadable, so that indices are not those of the list; or no pairs.
    """
    _, _, path = config.name.partition(":")
    root = Path(path) if path else cached("emoji")
    if config.on_unreadable != "raise":
        listed = len(load_data(replace(config, in_memory=False)))
        expect(len(data) == listed, "tone", f"all {listed} emoji of the list", f"{len(data)} that can be read")
    test = set(held_out.tolist())
    pairs = [pair for pair in emoji_tone_pairs(root) if pair.tone == tone]
    sides = [[pair for pair in pairs if (pair.base in test) == wanted] for wanted in (False, True)]
    for name, side in zip(("training", "held-out"), sides, strict=True):
        expect(len(side) > 0, "tone", f"{name} emoji with the tone {tone!r}", "none")
    (bases, variants), (held, targets) = (
        (torch.tensor([pair.base for pair in side]), torch.tensor([pair.variant for pair in side])) for side in sides
    )
    return TonePairs(bases, variants, held, targets)
