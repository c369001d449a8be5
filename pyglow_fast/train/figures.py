"""Draws what a run shows: images, grids, animations, curves, histograms. Saved pictures are large enough to look at."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import torch
from torch import Tensor, nn

from pyglow_fast._core.errors import check_count, expect, visible
from pyglow_fast._core.files import write_bytes
from pyglow_fast._core.settings import Range
from pyglow_fast.data import Images, optional
from pyglow_fast.data.files import pixels as pixels_of
from pyglow_fast.data.lazy import readable
from pyglow_fast.likelihood import quantize
from pyglow_fast.train.metrics import Row
from pyglow_fast.train.seeds import derive

LEAST_SIDE = 256  # pixels of a picture's longer side, unless its scale is given
# Of 8x8 pixels, each as large as it is shown, so many have 16,384x16,384.
PICTURE_IMAGES = Range(least=1, most=1 << 16, why="all of them are in one picture")
FONT_SIZE = 14
BINS = 60  # of a histogram, at most; fewer for fewer images
TAIL = 0.001  # share of each set that may lie beyond either end of a histogram's axis
_GAP = 6  # pixels between images, and around text; 2 where there is no text
_WIDEST_LABEL = 260  # pixels of a row's label; longer ones are broken into lines
_LETTER = 8  # pixels of a letter, about
_EARLY = 0.1  # the first share of the steps, which the axis of a curve need not show
_NARROWEST = 400  # a page under a title that is longer
_WHITE, _FRAME, _GREY = 255, 190, 128
_XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:description><rdf:Alt>'
    '<rdf:li xml:lang="x-default">{}</rdf:li></rdf:Alt></dc:description></rdf:Description></rdf:RDF></x:xmpmeta>'
)


def to_pixels(x: Tensor, n_bins: int) -> Tensor:
    """Round model output x to grey levels; values that are no numbers, as a young model may draw, become mid-grey."""
    return quantize(x.float().nan_to_num(0.0), n_bins)


def image_picture(pixels: Tensor, n_bins: int, scale: int | None = None) -> Tensor:
    """Turn the pixels (C, H, W) of one image into uint8 (3, scale H, scale W); see :func:`pictures`."""
    return pictures(pixels[None], n_bins, scale)[0]


def pictures(pixels: Tensor, n_bins: int, scale: int | None = None, across: int = 1, down: int = 1) -> Tensor:
    """Turn images (N, C, H, W) into uint8 (N, 3, scale H, scale W), enlarged without smoothing, n_bins-1 as white.

    Channels beyond the third are left out, two channels show the first. The default scale makes the longer side at
    least LEAST_SIDE pixels; where ``across`` x ``down`` images will be one picture, each is about 64 pixels high, and
    more where the whole would be smaller than LEAST_SIDE.
    """
    height, width = pixels.shape[-2:]
    if scale is None:
        scale = max(1, 64 // height, -(-LEAST_SIDE // max(across * width, down * height)))
    check_count("scale", scale)
    images = pixels[:, : 3 if pixels.shape[1] >= 3 else 1].cpu().float() / (n_bins - 1)
    shown = (images.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8)
    return shown.repeat_interleave(scale, -1).repeat_interleave(scale, -2)


def grid(
    images: Tensor | Sequence[tuple[str, Tensor]],
    n_bins: int,
    columns: int | Sequence[str] | None = None,
    scale: int | None = None,
    title: str = "",
) -> Tensor:
    """Place images side by side, with what labels they have; uint8 (3, height, width); labels are black on white.

    Args:
        images: (N, C, H, W) of grey levels 0..n_bins-1; or rows with a label each, which may differ in length. All have
            one shape.
        n_bins: the grey level n_bins-1 is shown white.
        columns: how many of N images are in a row, by default near-square; or labels of the columns from the left, at
            least as many as a row of ``images`` has.
        scale: as of :func:`pictures`.
        title: one line above all, broken where it is too long.

    Examples:
        >>> import torch
        >>> from pyglow_fast.train import grid
        >>> rows = [(f"seed {seed}", torch.randint(32, (3, 1, 8, 8))) for seed in (0, 1)]
        >>> picture = grid(rows, n_bins=32, columns=["cold", "warm", "hot"])
        >>> picture.dtype, picture.dim(), picture.shape[0]  # colours, height, width
        (torch.uint8, 3, 3)
    """
    heads = [] if columns is None or isinstance(columns, int) else list(columns)
    if isinstance(images, Tensor):
        wide = columns if isinstance(columns, int) else len(heads) or math.ceil(math.sqrt(len(images)))
        images = [("", part) for part in images.split(max(1, wide))]
    expect(len(images) > 0, "images", "at least one", "none")
    shape = images[0][1].shape[1:]
    for _, pixels in images:
        fits = pixels.dim() == 4 and len(pixels) > 0 and pixels.shape[1:] == shape
        expect(fits, "images", f"images (n, {', '.join(map(str, shape))})", tuple(pixels.shape))
    across = max(len(pixels) for _, pixels in images)
    expect(not heads or len(heads) >= across, "columns", f"{across} labels", len(heads))
    shown = [pictures(pixels, n_bins, scale, across, len(images)) for _, pixels in images]
    return _page(shown, [label for label, _ in images], heads[:across], title)


def _page(images: list[Tensor], labels: list[str], heads: list[str], title: str) -> Tensor:
    """A table of images, uint8 (3, h, w), each in its cell's middle, with their labels to the left and above."""
    has_text = any([*labels, *heads, title])
    gap, paper = (_GAP, _WHITE) if has_text else (2, _GREY)
    width = images[0].shape[3]
    table = [
        [nn.functional.pad(image, (1,) * 4, value=_FRAME) if has_text else image for image in row] for row in images
    ]
    table = [[_words(head, width) for head in heads], *table] if heads else table
    if any(labels):
        table = [
            [_words(label, _WIDEST_LABEL), *row] for label, row in zip(["", *labels][-len(table) :], table, strict=True)
        ]
    heights = [max(cell.shape[1] for cell in row) for row in table]
    widths = [max(row[i].shape[2] for row in table if i < len(row)) for i in range(max(map(len, table)))]
    across = sum(widths) + gap * (len(widths) - 1)
    heading = _words(title, max(across, _NARROWEST))
    y = gap + (heading.shape[1] + gap if title else 0)
    page = torch.full(
        (3, y + sum(heights) + gap * len(heights), max(across, heading.shape[2]) + 2 * gap), paper, dtype=torch.uint8
    )
    page[:, gap : gap + heading.shape[1], gap : gap + heading.shape[2]] = heading
    for row, tall in zip(table, heights, strict=True):
        x = gap
        for cell, wide in zip(row, widths, strict=False):
            _, height, width = cell.shape
            above, left = y + (tall - height) // 2, x + (wide - width) // 2
            page[:, above : above + height, left : left + width] = cell
            x += wide + gap
        y += tall + gap
    return page


def _words(text: str, width: int) -> Tensor:
    """A picture of black text, in lines of about so many pixels; in DejaVu Sans, as Pillow's own font is Latin."""
    if not text:
        return torch.zeros(3, 0, 0, dtype=torch.uint8)
    letters = max(1, width // _LETTER)
    text = "\n".join(textwrap.fill(line, letters, break_long_words=False) for line in text.split("\n"))
    pil, draw = optional("PIL.Image", "pictures"), optional("PIL.ImageDraw", "pictures").Draw
    folder = Path(optional("matplotlib", "labels of pictures").get_data_path())
    font = optional("PIL.ImageFont", "pictures").truetype(str(folder / "fonts" / "ttf" / "DejaVuSans.ttf"), FONT_SIZE)
    box = draw(pil.new("L", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    image = pil.new("L", (int(box[2] + 1), int(box[3] + 1)), _WHITE)
    draw(image).multiline_text((0, 0), text, fill=0, font=font, align="center")
    return pixels_of(image).expand(3, -1, -1)


def png_bytes(picture: Tensor, text: Mapping[str, str] | None = None) -> bytes:
    """Encode a picture, uint8 (3, H, W), as a PNG file, with texts by keyword that tell how it was made."""
    chunks = optional("PIL.PngImagePlugin", "pictures").PngInfo()
    for keyword, value in (text or {}).items():
        chunks.add_text(keyword, visible(value, lines=True))
    stream = io.BytesIO()
    _image(picture).save(stream, "PNG", pnginfo=chunks)
    return stream.getvalue()


def save_grid(images: Tensor | Sequence[tuple[str, Tensor]], n_bins: int, path: Path, *how: Any, **more: Any) -> None:
    """Write :func:`grid`, with its further arguments, as a PNG file, which is replaced whole or not at all."""
    write_bytes(path, png_bytes(grid(images, n_bins, *how, **more)))


def animation_bytes(pixels: Tensor, n_bins: int, file_format: str, scale: int | None, text: str) -> bytes:
    """Encode images as an endless animation, there and back: 0, 1, .., n-1, n-2, .., 1 and again, ten a second.

    A WebP is lossless, a GIF of at most 256 colours too. The text is its comment, or the description in its XMP.
    """
    frames, told = [_image(picture) for picture in pictures(pixels, n_bins, scale)], visible(text, lines=True)
    options: dict[str, Any] = {"comment": told.encode()}
    if file_format == "webp":
        options = {"lossless": True, "xmp": _XMP.format(escape(told)).encode()}
    first, *rest = [*frames, *frames[-2:0:-1]]
    stream = io.BytesIO()
    first.save(stream, file_format.upper(), append_images=rest, duration=100, loop=0, save_all=True, **options)
    return stream.getvalue()


def _image(picture: Tensor) -> Any:
    """uint8 (3, H, W) as a Pillow image."""
    return optional("PIL.Image", "pictures").fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())


Curves = Mapping[str, Sequence[tuple[float, float]]]  # by label, points (step, value)


def curve_png(curves: Curves, ylabel: str, log: bool = False, levels: Mapping[str, float] | None = None) -> bytes:
    """Draw curves against steps as a PNG; values that are not finite break a line, and ``levels`` are level lines.

    Without ``log`` the axis shows all levels, and all values but those of each curve's first steps, which may be high.
    """
    figure_class = optional("matplotlib.figure", "curves").Figure  # no pyplot: no global state
    axes = (figure := figure_class(figsize=(7, 4), layout="constrained")).subplots()
    later = list((levels or {}).values())
    for label, points in curves.items():
        shown = [value if math.isfinite(value) else math.nan for _, value in points]
        axes.plot([step for step, _ in points], shown, label=label, lw=1.2, marker="o" if len(shown) < 50 else "", ms=3)
        last = max((step for step, _ in points), default=0)
        later += [value for step, value in points if step > _EARLY * last and math.isfinite(value)]
    for i, (name, value) in enumerate((levels or {}).items()):
        axes.axhline(value, ls="--", lw=1, color=f"C{i + len(curves)}", label=name)
    if log:
        axes.set_yscale("log", nonpositive="mask")
    elif later:
        margin = 0.1 * (max(later) - min(later)) + 0.05
        axes.set_ylim(min(later) - margin, max(later) + margin)
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel, parse_math=False)  # the name of images may hold a $
    axes.grid(alpha=0.3)
    if len(curves) > 1 or levels:
        axes.legend()
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=120)
    return buffer.getvalue()


def points(rows: Sequence[Row], column: str) -> list[tuple[float, float]]:
    """The (step, value) of a column of metrics.csv, where there is a value."""
    return [(row["step"] or 0, value) for row in rows if (value := row.get(column)) is not None]


def bits_png(rows: Sequence[Row], yardsticks: Mapping[str, float]) -> bytes:
    """Draw bits/dim against steps as a PNG: trained on, held out, and the yardsticks as level lines."""
    names = {"train_bpd": "training batches", "train_subset_bpd": "train", "held_out_bpd": "held out"}
    curves = {label: points(rows, column) for column, label in names.items()}
    return curve_png(curves, "bits/dim", levels=yardsticks)


def histogram_png(
    sets: Mapping[str, Tensor],
    title: str,
    marks: Mapping[str, float] | None = None,
    text: Mapping[str, str] | None = None,
) -> bytes:
    """Draw sets of finite bits/dim, by their names, as one histogram on common bins, each as shares of 100 %; a PNG.

    At most TAIL of each lies beyond either end of the axis, whose label says how many do. ``marks`` are bits/dim of
    single images by their short names, all on the axis but for those that are not finite; ``text`` is kept in the PNG.
    """
    figure_class = optional("matplotlib.figure", "the histogram").Figure  # no pyplot: no global state
    axes = (figure := figure_class(figsize=(8, 4.5), layout="constrained")).subplots()
    marked = sorted((value, name) for name, value in (marks or {}).items() if math.isfinite(value))
    values = {name: found.double().numpy() for name, found in sets.items()}
    ends = [np.quantile(found, [TAIL, 1.0 - TAIL]) for found in values.values()] + [[value] for value, _ in marked]
    low, high = min(map(min, ends)), max(map(max, ends))
    margin = 0.02 * (high - low) or 0.5
    count = min(BINS, max(10, 2 * math.isqrt(min(map(len, values.values())))))
    bins = np.linspace(low - margin, high + margin, 1 + count)
    beyond = sum(int(((found < bins[0]) | (found > bins[-1])).sum()) for found in values.values())
    for i, (name, found) in enumerate(values.items()):
        share, label = np.full(len(found), 100.0 / len(found)), f"{name}: {len(found)} images, mean {found.mean():.3f}"
        axes.hist(found, bins, weights=share, alpha=0.55, color=f"C{i}", label=label)
        axes.axvline(found.mean(), color=f"C{i}", ls="--", lw=1.2)
    top = axes.get_ylim()[1]
    if marked:
        axes.set_ylim(0.0, 1.2 * top)  # room for the legend, above the lines
    box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5}  # other lines go below it
    for i, (value, name) in enumerate(marked):
        axes.axvline(value, ymax=0.9, color="C3", lw=1.2)
        side = "left" if value < bins.mean() else "right"  # where there is more room, neighbours at other heights
        place = (value, top * (1.04 - 0.06 * (i % 12)))
        axes.text(*place, f" {name} ", ha=side, va="top", fontsize=8, color="C3", parse_math=False, bbox=box)
    axes.set_title(title, parse_math=False)
    total = sum(map(len, values.values()))
    unseen = f"; {beyond} of {total} images {'lie' if beyond > 1 else 'lies'} beyond this axis" if beyond else ""
    axes.set(xlabel=f"bits/dim (less is more likely{unseen})", ylabel="share of the set's images, %")
    axes.grid(alpha=0.3)
    for label in axes.legend().get_texts():
        label.set_parse_math(False)  # the names of images may hold a $
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=120, metadata=dict(text or {}))
    return buffer.getvalue()


def class_columns(count: int, n_classes: int | None) -> int | None:
    """The number of images in a row that gives each class a column of its own, where that fits."""
    return n_classes if n_classes is not None and 2 <= n_classes <= min(count, 16) else None


def class_cycle(count: int, n_classes: int | None, device: torch.device) -> Tensor | None:
    """Give labels 0, 1, 2, ... in turn to a grid of samples; None for a model without classes."""
    return None if n_classes is None else torch.arange(count, device=device) % n_classes


def class_heads(count: int, names: Sequence[str]) -> list[str]:
    """Labels of a near-square grid's columns, which show the classes in turn; empty where that does not fit."""
    n = class_columns(count, len(names))
    return [] if n is None else [*names] * max(1, round(math.sqrt(count) / n))


def example_grid(data: Images, count: int, seed: int, names: Sequence[str] = ()) -> Tensor:
    """Make a :func:`grid` of random images as training with ``seed`` sees them first, arranged as samples are.

    ``names`` are the classes, each of which has columns of its own, unless one has no image.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(derive(seed, "examples")))
    heads, sides = class_heads(count, names), [order]
    if heads and data.labels is not None:
        sides = [order[data.labels[order] == label] for label in range(len(names))]
    if not all(map(len, sides)):
        heads, sides = [], [order]
    turns = zip(range(count), itertools.cycle(sides), strict=False)
    chosen = [int(side[i // len(sides) % len(side)]) for i, side in turns]
    views = [readable(data, index, derive(seed, "augment", 0, index), "skip")[0] for index in chosen]
    return grid(torch.stack(views), data.n_bins, heads or None)
