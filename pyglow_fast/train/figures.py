"""Draws what a run shows: images, grids of them, animations and the loss curve."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

import torch
from torch import Tensor

from pyglow_fast._errors import check_count, expect
from pyglow_fast._settings import Range
from pyglow_fast.data import optional
from pyglow_fast.likelihood import quantize
from pyglow_fast.train.files import write_bytes
from pyglow_fast.train.metrics import Row

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST_TEXT = 1 << 16  # characters of a text in a picture; readers refuse what is much longer
# Of 8x8 pixels, each as large as it is shown, so many have 16,384x16,384.
PICTURE_IMAGES = Range(least=1, most=1 << 16, why="all of them are in one picture")
ANIMATIONS = ("gif", "webp")
# Characters that XML, where a WebP keeps its text, does not have; a carriage return would be read as a line end.
_NO_TEXT = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:description><rdf:Alt>'
    '<rdf:li xml:lang="x-default">{}</rdf:li></rdf:Alt></dc:description></rdf:Description></rdf:RDF></x:xmpmeta>'
)


def to_pixels(x: Tensor, n_bins: int) -> Tensor:
    """Round model output x to grey levels; values that are no numbers, as a young model may draw, become mid-grey."""
    return quantize(x.float().nan_to_num(0.0), n_bins)


def enlarged(pixels: Tensor, n_bins: int, scale: int | None = None) -> Tensor:
    """Turn pixels (N, C, H, W) into float (N, 1 or 3, scale H, scale W) in 0..1; see :func:`grid`."""
    images = pixels[:, : 3 if pixels.shape[1] >= 3 else 1].cpu().float() / (n_bins - 1)
    factor = scale or max(1, 64 // images.shape[-2])
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def grid(pixels: Tensor, n_bins: int, columns: int | None = None, scale: int | None = None) -> Tensor:
    """Place images (N, C, H, W) of grey levels 0..n_bins-1 side by side in one picture, uint8 (3, height, width).

    Args:
        pixels: the images; channels beyond the third are left out, two channels show the first.
        n_bins: the grey level n_bins-1 is shown white.
        columns: images in a row; by default near-square.
        scale: whole factor each pixel is enlarged by; by default what makes an image about 64 pixels high.

    Raises:
        MissingExtraError: torchvision is not installed.
    """
    make_grid = optional("torchvision.utils", "pictures").make_grid
    images = enlarged(pixels, n_bins, scale)
    shown: Tensor = make_grid(images, nrow=columns or math.ceil(math.sqrt(len(images))), padding=2, pad_value=0.5)
    return (shown * 255).round().to(torch.uint8)


def pictures(pixels: Tensor, n_bins: int, scale: int | None = None) -> Tensor:
    """Turn pixels (N, C, H, W) in 0..n_bins-1 into uint8 (N, 3, scale H, scale W); see :func:`grid`."""
    return (enlarged(pixels, n_bins, scale).expand(-1, 3, -1, -1) * 255).round().to(torch.uint8)


def image_picture(pixels: Tensor, n_bins: int, scale: int = 1) -> Tensor:
    """Turn the pixels (C, H, W) of one image, in 0..n_bins-1, into uint8 (3, scale H, scale W), without a border.

    Raises:
        ValueError: it is no single image, or a factor below 1.
    """
    expect(isinstance(pixels, Tensor) and pixels.dim() == 3, "pixels", "one image (C, H, W)", _shape(pixels))
    check_count("scale", scale)
    return pictures(pixels[None], n_bins, scale)[0]


def png_bytes(picture: Tensor, text: Mapping[str, str] | None = None) -> bytes:
    """Encode a picture as a PNG file, with texts in it that tell how it was made.

    Args:
        picture: uint8 (3, H, W).
        text: texts by keyword, each in a chunk of its own ("tEXt", or "iTXt" for what is not Latin-1).

    Raises:
        ValueError: no such picture; a keyword that is not 1 to 79 ASCII characters with single spaces between words; a
            text of more than LONGEST_TEXT characters or with control characters other than tabs and line ends.
        MissingExtraError: Pillow is not installed.
    """
    image = _image(picture)
    chunks = None
    if text is not None:
        chunks = optional("PIL.PngImagePlugin", "pictures").PngInfo()
        for keyword, value in _checked(text).items():
            chunks.add_text(keyword, value)
    stream = io.BytesIO()
    image.save(stream, "PNG", pnginfo=chunks)
    return stream.getvalue()


def save_picture(picture: Tensor, path: Path, text: Mapping[str, str] | None = None) -> None:
    """Write :func:`png_bytes` to a file, which is replaced whole or not at all.

    Raises:
        ValueError: what png_bytes refuses.
        MissingExtraError: Pillow is not installed.
    """
    write_bytes(path, png_bytes(picture, text))


def save_grid(
    pixels: Tensor,
    n_bins: int,
    path: Path,
    columns: int | None = None,
    scale: int | None = None,
    text: Mapping[str, str] | None = None,
) -> None:
    """Write :func:`grid` as a PNG file."""
    save_picture(grid(pixels, n_bins, columns, scale), path, text)


def animation_bytes(
    pixels: Tensor,
    n_bins: int,
    file_format: str,
    milliseconds: int = 100,
    scale: int | None = None,
    text: Mapping[str, str] | None = None,
) -> bytes:
    """Encode images as an endless animation, there and back: 0, 1, .., n-1, n-2, .., 1 and again.

    A WebP is lossless. A GIF is so too where the images have at most 256 colours together, as grey ones have; otherwise
    each image is shown in the 256 colours nearest to its own, without dithering. Images that equal the one before may
    be stored as one that is shown for longer.

    Args:
        pixels: (n, C, H, W) in 0..n_bins-1; channels beyond the third are left out, two channels show the first.
        n_bins: the grey level n_bins-1 is shown white.
        file_format: "gif" or "webp".
        milliseconds: how long an image is shown, 20..60000; a GIF counts in tens, rounded down.
        scale: whole factor each pixel is enlarged by; by default what makes an image about 64 pixels high.
        text: as of :func:`png_bytes`. A GIF keeps it as its comment, a WebP as the description of its XMP, one line
            "keyword: text" each.

    Raises:
        ValueError: no images, another format, a time or factor out of range, or a text that png_bytes refuses.
        MissingExtraError: Pillow is not installed.
    """
    expect(file_format in ANIMATIONS, "file_format", f"one of {ANIMATIONS}", repr(file_format))
    images = isinstance(pixels, Tensor) and pixels.dim() == 4 and len(pixels) > 0
    expect(images, "pixels", "at least one image (n, C, H, W)", _shape(pixels))
    timed = isinstance(milliseconds, int) and 20 <= milliseconds <= 60000
    expect(timed, "milliseconds", "a whole number in 20..60000", repr(milliseconds))
    if scale is not None:
        check_count("scale", scale)
    told = "\n".join(f"{keyword}: {value}" for keyword, value in _checked(text or {}).items())
    shown = pictures(pixels, n_bins, scale)
    frames = _paletted(shown) if file_format == "gif" else [_image(picture) for picture in shown]
    options: dict[str, object] = {"duration": milliseconds, "loop": 0, "save_all": True}
    if file_format == "webp":
        options |= {"lossless": True, "xmp": _XMP.format(escape(told)).encode()} if told else {"lossless": True}
    elif told:
        options["comment"] = told.encode()
    stream = io.BytesIO()
    first, *rest = [*frames, *frames[-2:0:-1]]
    first.save(stream, file_format.upper(), append_images=rest, **options)
    return stream.getvalue()


def _shape(value: object) -> object:
    """What a message says of a value that should be a tensor of another shape."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _image(picture: Tensor) -> Image:
    """uint8 (3, H, W) as a Pillow image."""
    fits = isinstance(picture, Tensor) and picture.dtype == torch.uint8 and picture.dim() == 3 and len(picture) == 3
    found = f"{picture.dtype} {tuple(picture.shape)}" if isinstance(picture, Tensor) else type(picture).__name__
    expect(fits and picture.numel() > 0, "picture", "uint8 of shape (3, H, W)", found)
    return optional("PIL.Image", "pictures").fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())


def _paletted(shown: Tensor) -> list[Image]:
    """uint8 (n, 3, H, W) as images of at most 256 colours: those that occur, if all images together have so few."""
    pil = optional("PIL.Image", "pictures")
    red, green, blue = shown.int().unbind(1)
    colours, which = torch.unique(red << 16 | green << 8 | blue, return_inverse=True)
    if len(colours) > 256:
        return [_image(picture).quantize(256, pil.Quantize.MEDIANCUT, dither=pil.Dither.NONE) for picture in shown]
    palette = torch.stack([colours >> 16, colours >> 8 & 255, colours & 255], 1).flatten().tolist()
    frames = []
    for index in which.to(torch.uint8):
        frames.append(pil.fromarray(index.numpy()))
        frames[-1].putpalette(palette)  # makes a "P" of the "L"
    return frames


def _checked(text: Mapping[str, str]) -> Mapping[str, str]:
    """Texts that a picture of every format can hold.

    Raises:
        ValueError: one cannot be held.
    """
    expect(isinstance(text, Mapping), "text", "a mapping from keywords to texts", type(text).__name__)
    for keyword, value in text.items():
        plain = isinstance(keyword, str) and keyword.isascii() and keyword.isprintable()
        plain = plain and 1 <= len(keyword) <= 79 and keyword == " ".join(keyword.split())
        expect(plain, "text", "keywords of 1 to 79 ASCII characters, single spaces between words", repr(keyword)[:99])
        name = f"text[{keyword!r}]"
        expect(isinstance(value, str), name, "a string", type(value).__name__)
        expect(len(value) <= LONGEST_TEXT, name, f"at most {LONGEST_TEXT} characters", len(value))
        found = _NO_TEXT.search(value)
        expect(found is None, name, "characters other than control characters", repr(found and found.group()))
    return text


def holds_text(value: str) -> bool:
    """Whether a picture can hold a text: no control characters other than tabs and line ends, valid Unicode."""
    return _NO_TEXT.search(value) is None


def bits_png(rows: list[Row], yardsticks: dict[str, float]) -> bytes:
    """Draw bits/dim against steps as a PNG: trained on, held out, and the yardsticks as level lines.

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
    """Write :func:`bits_png` to a file, which is replaced whole or not at all."""
    write_bytes(path, bits_png(rows, yardsticks))


def class_columns(count: int, n_classes: int | None) -> int | None:
    """How many images a row has for :func:`class_cycle` to put each class in a column of its own, where that fits."""
    return n_classes if n_classes is not None and 2 <= n_classes <= min(count, 16) else None


def class_cycle(count: int, n_classes: int | None, device: torch.device) -> Tensor | None:
    """Give labels 0, 1, 2, ... in turn to a grid of samples; None for a model without classes."""
    return None if n_classes is None else torch.arange(count, device=device) % n_classes
