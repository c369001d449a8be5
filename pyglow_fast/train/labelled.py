"""Draws grids of images with a label for each row and column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.data import optional
from pyglow_fast.train.figures import pictures, save_picture

FONT_SIZE = 14
_GAP = 6  # pixels between images, and around text
_WIDEST_LABEL = 260  # pixels of a row's label; longer ones are broken into lines
_NARROWEST = 400  # a page under a title that is longer
_PAPER, _INK, _FRAME = 255, 0, 190


class GridRow(NamedTuple):
    """One row of a grid: a label (may hold line ends; empty for none) and the pixels (n, C, H, W) of images.

    Examples:
        >>> import torch
        >>> from pyglow_fast.train import GridRow, labelled_grid
        >>> rows = [GridRow(f"seed {seed}", torch.randint(32, (3, 1, 8, 8))) for seed in (0, 1)]
        >>> picture = labelled_grid(rows, n_bins=32, columns=["cold", "warm", "hot"])
        >>> picture.dtype, picture.dim(), picture.shape[0]  # colours, height, width
        (torch.uint8, 3, 3)
    """

    label: str
    pixels: Tensor


def labelled_grid(
    rows: Sequence[GridRow | tuple[str, Tensor]],
    n_bins: int,
    columns: Sequence[str] = (),
    title: str = "",
    scale: int | None = None,
) -> Tensor:
    """Draw rows of images beside their labels, below labels of the columns; uint8 (3, height, width), black on white.

    Args:
        rows: label and images of each; rows may differ in length, all images have one shape.
        n_bins: the level n_bins-1 is shown white.
        columns: labels from the left; none, or at least as many as the longest row has images.
        title: one line above all, broken where it is too long.
        scale: whole factor that pixels are enlarged by, without smoothing; by default to about 64 pixels high.

    Raises:
        ValueError: no rows, or images or labels that do not fit each other.
        MissingExtraError: Pillow or matplotlib (for its font) is not installed.
    """
    expect(len(rows) > 0, "rows", "at least one", "none")
    grid = [GridRow(*row) for row in rows]
    shape = tuple(grid[0].pixels.shape[1:])
    for row in grid:
        fits = row.pixels.dim() == 4 and len(row.pixels) > 0 and tuple(row.pixels.shape[1:]) == shape
        expect(fits, "rows", f"images (n, {', '.join(map(str, shape))})", tuple(row.pixels.shape))
    count = max(len(row.pixels) for row in grid)
    expect(not columns or len(columns) >= count, "columns", f"{count} labels", len(columns))
    images = [pictures(row.pixels, n_bins, scale).permute(0, 2, 3, 1).contiguous() for row in grid]
    return _draw(images, [row.label for row in grid], list(columns)[:count], title)


def save_labelled_grid(
    rows: Sequence[GridRow | tuple[str, Tensor]],
    n_bins: int,
    path: Path,
    columns: Sequence[str] = (),
    title: str = "",
    scale: int | None = None,
) -> None:
    """Write :func:`labelled_grid` as a PNG file, which is replaced whole or not at all."""
    save_picture(labelled_grid(rows, n_bins, columns, title, scale), path)


def _font() -> Any:
    """DejaVu Sans as matplotlib brings it: Pillow's own font has few letters besides the Latin ones."""
    folder = Path(optional("matplotlib", "labels of pictures").get_data_path())
    return optional("PIL.ImageFont", "pictures").truetype(str(folder / "fonts" / "ttf" / "DejaVuSans.ttf"), FONT_SIZE)


def _wrapped(text: str, width: float, length: Callable[[str], float]) -> str:
    """The text with line ends between words so that no line but that of a single long word is wider."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and length(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return "\n".join(lines)


def _draw(images: list[Tensor], labels: list[str], columns: list[str], title: str) -> Tensor:
    pil, draw_module = optional("PIL.Image", "pictures"), optional("PIL.ImageDraw", "pictures")
    font = _font()
    pen = draw_module.Draw(pil.new("RGB", (1, 1)))

    def size(text: str) -> tuple[int, int]:
        box = pen.multiline_textbbox((0, 0), text, font=font) if text else (0, 0, 0, 0)
        return int(box[2] + 1), int(box[3] + 1)

    height, width = images[0].shape[1:3]
    # A column is as wide as its image, or as the longest word above any of them.
    words = [word for text in columns for word in text.split()]
    pitch = max([width, *(size(word)[0] for word in words)]) + _GAP
    heads = [_wrapped(text, pitch - _GAP, font.getlength) for text in columns]
    sides = [_wrapped(text, _WIDEST_LABEL, font.getlength) for text in labels]
    left = max(size(text)[0] for text in sides)
    left += 2 * _GAP if left else _GAP
    total_width = left + pitch * max(len(row) for row in images)
    heading = _wrapped(title, max(total_width, _NARROWEST) - 2 * _GAP, font.getlength)
    total_width = max(total_width, size(heading)[0] + 2 * _GAP)
    top = _GAP + (size(heading)[1] + _GAP if heading else 0)
    first = top + (max(size(text)[1] for text in heads) + _GAP if heads else 0)
    heights = [max(height, size(text)[1]) + _GAP for text in sides]
    page = pil.new("RGB", (total_width, first + sum(heights)), (_PAPER,) * 3)
    pen = draw_module.Draw(page)
    ink = (_INK,) * 3
    pen.multiline_text((_GAP, _GAP), heading, fill=ink, font=font)
    for i, text in enumerate(heads):
        place = (left + i * pitch + (pitch - _GAP) / 2, first - _GAP)
        pen.multiline_text(place, text, fill=ink, font=font, anchor="md", align="center")
    y = first
    for row, text, tall in zip(images, sides, heights, strict=True):
        pen.multiline_text((left - _GAP, y + (tall - _GAP) / 2), text, fill=ink, font=font, anchor="rm", align="right")
        for i, image in enumerate(row):
            x = left + i * pitch + (pitch - _GAP - width) // 2
            above = y + (tall - _GAP - height) // 2
            pen.rectangle((x - 1, above - 1, x + width, above + height), outline=(_FRAME,) * 3)
            page.paste(pil.fromarray(image.numpy()), (x, above))
        y += tall
    pixels = torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8)
    return pixels.reshape(page.height, page.width, 3).permute(2, 0, 1).contiguous()
