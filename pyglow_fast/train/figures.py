"""What a run shows: grids of images and the loss curve."""

from __future__ import annotations

import io
import math
from pathlib import Path

import torch
from torch import Tensor

from pyglow_fast.data import optional
from pyglow_fast.likelihood import quantize
from pyglow_fast.train.files import replacing
from pyglow_fast.train.metrics import Row


def to_levels(x: Tensor, n_bins: int) -> Tensor:
    """Model output x as levels; values that are no numbers, as a young model may draw, become mid-grey."""
    return quantize(x.float().nan_to_num(0.0), n_bins)


def enlarged(levels: Tensor, n_bins: int, scale: int | None = None) -> Tensor:
    """Images (N, C, H, W) of levels 0..n_bins-1 as float (N, 1 or 3, scale H, scale W) in 0..1; see :func:`grid`."""
    images = levels[:, : 3 if levels.shape[1] >= 3 else 1].cpu().float() / (n_bins - 1)
    factor = scale or max(1, 64 // images.shape[-2])
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def grid(levels: Tensor, n_bins: int, columns: int | None = None, scale: int | None = None) -> Tensor:
    """Images (N, C, H, W) of levels 0..n_bins-1 side by side, uint8 (3, height, width).

    Args:
        levels: the images; channels beyond the third are left out, two channels show the first.
        n_bins: the level n_bins-1 is shown white.
        columns: images in a row; by default near-square.
        scale: whole factor each pixel is enlarged by; by default what makes an image about 64 pixels high.

    Raises:
        MissingExtraError: torchvision is not installed.
    """
    make_grid = optional("torchvision.utils", "pictures").make_grid
    images = enlarged(levels, n_bins, scale)
    shown: Tensor = make_grid(images, nrow=columns or math.ceil(math.sqrt(len(images))), padding=2, pad_value=0.5)
    return (shown * 255).round().to(torch.uint8)


def save_picture(picture: Tensor, path: Path) -> None:
    """uint8 (3, H, W) as a PNG, replaced atomically.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    image = optional("PIL.Image", "pictures").fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    with replacing(path) as temporary:
        image.save(temporary, "PNG")


def save_grid(levels: Tensor, n_bins: int, path: Path, columns: int | None = None, scale: int | None = None) -> None:
    """:func:`grid` as a PNG."""
    save_picture(grid(levels, n_bins, columns, scale), path)


def bits_png(rows: list[Row], yardsticks: dict[str, float]) -> bytes:
    """A PNG of bits/dim against steps: trained on, held out, and the yardsticks as level lines.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure_class = optional("matplotlib.figure", "the loss curve").Figure  # no pyplot: no global state
    axes = (figure := figure_class(figsize=(7, 4), layout="constrained")).subplots()
    lines = {"train_bpd": "training batches", "train_subset_bpd": "train", "held_out_bpd": "held out"}
    for column, label in lines.items():
        points = [(row["step"], row[column]) for row in rows if row[column] is not None]
        style = {"alpha": 0.4, "lw": 1} if column == "train_bpd" else {"marker": "o", "ms": 3}
        axes.plot(*zip(*points, strict=True) if points else ((), ()), label=label, **style)
    for i, (name, value) in enumerate(yardsticks.items()):
        axes.axhline(value, ls="--", lw=1, color=f"C{i + 3}", label=name)
    shown = [row[name] for row in rows for name in ("train_subset_bpd", "held_out_bpd") if row[name] is not None]
    # The first steps are far above the rest: show from just below the best to just above the yardsticks.
    if later := [value for value in shown[2:] if value is not None and math.isfinite(value)]:
        low, high = min(later), max([*later, *yardsticks.values()])
        margin = 0.1 * (high - low) + 0.05
        axes.set_ylim(low - margin, high + 2 * margin)
    axes.set(xlabel="step", ylabel="bits/dim")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=120)
    return buffer.getvalue()


def save_curve(rows: list[Row], path: Path, yardsticks: dict[str, float]) -> None:
    """:func:`bits_png` as a file, replaced atomically."""
    png = bits_png(rows, yardsticks)
    with replacing(path) as temporary:
        temporary.write_bytes(png)


def class_columns(count: int, n_classes: int | None) -> int | None:
    """Images in a row so that :func:`class_cycle` puts each class in a column of its own, where the grid allows it."""
    return n_classes if n_classes is not None and 2 <= n_classes <= min(count, 16) else None


def class_cycle(count: int, n_classes: int | None, device: torch.device) -> Tensor | None:
    """Labels 0, 1, 2, ... in turn for a grid of samples, or None for a model without classes."""
    return None if n_classes is None else torch.arange(count, device=device) % n_classes
