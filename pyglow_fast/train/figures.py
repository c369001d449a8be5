"""Draws what a run shows: images, grids of them, animations and curves. Saved pictures are large enough to look at."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
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

LEAST_SIDE = 256  # pixels of a picture's longer side, unless its scale is given
LONGEST_TEXT = 1 << 16  # characters of a text in a picture; readers refuse what is much longer
# Of 8x8 pixels, each as large as it is shown, so many have 16,384x16,384.
PICTURE_IMAGES = Range(least=1, most=1 << 16, why="all of them are in one picture")
ANIMATIONS = ("gif", "webp")
FONT_SIZE = 14
_GAP = 6  # pixels between images, and around text; 2 where there is no text
_WIDEST_LABEL = 260  # pixels of a row's label; longer ones are broken into lines
_LETTER = 8  # pixels of a letter, about
_NARROWEST = 400  # a page under a title that is longer
_WHITE, _BLACK, _FRAME, _GREY = (255,) * 3, (0,) * 3, (190,) * 3, (128,) * 3
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


def image_picture(pixels: Tensor, n_bins: int, scale: int | None = None) -> Tensor:
    """Turn the pixels (C, H, W) of one image, in 0..n_bins-1, into uint8 (3, scale H, scale W), without a border.

    Args:
        pixels: the image; channels beyond the third are left out, two channels show the first.
        n_bins: the grey level n_bins-1 is shown white.
        scale: whole factor each pixel is enlarged by, without smoothing; by default what makes the longer side at least
            LEAST_SIDE pixels.

    Raises:
        ValueError: it is no single image, or a factor below 1.
    """
    expect(pixels.dim() == 3, "pixels", "one image (C, H, W)", tuple(pixels.shape))
    return pictures(pixels[None], n_bins, scale)[0]


def pictures(pixels: Tensor, n_bins: int, scale: int | None = None, across: int = 1, down: int = 1) -> Tensor:
    """Turn images (N, C, H, W) into uint8 (N, 3, scale H, scale W), by :func:`image_picture`.

    Where ``across`` x ``down`` of them will be one picture, the default scale makes each about 64 pixels high, and more
    where the whole would be smaller than LEAST_SIDE.
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

    Raises:
        ValueError: no images, or images or labels that do not fit each other.
        MissingExtraError: Pillow, or for labels matplotlib (for its font), is not installed.

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
    """Rows of images, uint8 (n, 3, h, w), below and beside their labels."""
    pil, draw_module = optional("PIL.Image", "pictures"), optional("PIL.ImageDraw", "pictures")
    has_text = any([*labels, *heads, title])
    font, gap, paper = (_font(), _GAP, _WHITE) if has_text else (None, 2, _GREY)
    pen = draw_module.Draw(pil.new("RGB", (1, 1)))

    def size(text: str) -> tuple[int, int]:
        box = pen.multiline_textbbox((0, 0), text, font=font) if text else (0, 0, 0, 0)
        return int(box[2] + 1), int(box[3] + 1)

    height, width = images[0].shape[2:]
    heads = [_wrapped(text, width) for text in heads]
    sides = [_wrapped(text, _WIDEST_LABEL) for text in labels]
    pitch = gap + max([width, *(size(text)[0] for text in heads)])
    left = max(size(text)[0] for text in sides) if any(sides) else 0
    left += 2 * gap if left else gap
    total_width = left + pitch * max(len(row) for row in images)
    heading = _wrapped(title, max(total_width, _NARROWEST) - 2 * gap)
    total_width = max(total_width, size(heading)[0] + 2 * gap)
    top = gap + (size(heading)[1] + gap if heading else 0)
    y = top + (max(size(text)[1] for text in heads) + gap if heads else 0)
    heights = [max(height, size(text)[1]) + gap for text in sides]
    page = pil.new("RGB", (total_width, y + sum(heights)), paper)
    pen = draw_module.Draw(page)
    pen.multiline_text((gap, gap), heading, fill=_BLACK, font=font)
    for i, text in enumerate(heads):
        middle = left + i * pitch + (pitch - gap) / 2
        pen.multiline_text((middle, y - gap), text, fill=_BLACK, font=font, anchor="md", align="center")
    for row, text, tall in zip(images, sides, heights, strict=True):
        if text:
            middle = y + (tall - gap) / 2
            pen.multiline_text((left - gap, middle), text, fill=_BLACK, font=font, anchor="rm", align="right")
        for i, image in enumerate(row):
            x = left + i * pitch + (pitch - gap - width) // 2
            above = y + (tall - gap - height) // 2
            if has_text:
                pen.rectangle((x - 1, above - 1, x + width, above + height), outline=_FRAME)
            page.paste(_image(image), (x, above))
        y += tall
    pixels = torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8)
    return pixels.reshape(page.height, page.width, 3).permute(2, 0, 1).contiguous()


def _font() -> Any:
    """DejaVu Sans as matplotlib brings it: Pillow's own font has few letters besides the Latin ones."""
    folder = Path(optional("matplotlib", "labels of pictures").get_data_path())
    return optional("PIL.ImageFont", "pictures").truetype(str(folder / "fonts" / "ttf" / "DejaVuSans.ttf"), FONT_SIZE)


def _wrapped(text: str, width: int) -> str:
    """The text with line ends between words, so that its lines are about ``width`` pixels wide."""
    letters = max(1, width // _LETTER)
    return "\n".join(textwrap.fill(line, letters, break_long_words=False) for line in text.split("\n"))


def png_bytes(picture: Tensor, text: Mapping[str, str] | None = None) -> bytes:
    """Encode a picture as a PNG file, with texts in it that tell how it was made.

    Args:
        picture: uint8 (3, H, W).
        text: texts by keyword, each in a chunk of its own ("tEXt", or "iTXt" for what is not Latin-1).

    Raises:
        ValueError: no such picture; a text of more than LONGEST_TEXT characters or that fails :func:`holds_text`.
        MissingExtraError: Pillow is not installed.
    """
    chunks = optional("PIL.PngImagePlugin", "pictures").PngInfo()
    for keyword, value in _checked(text).items():
        chunks.add_text(keyword, value)
    stream = io.BytesIO()
    _image(picture).save(stream, "PNG", pnginfo=chunks)
    return stream.getvalue()


def save_picture(picture: Tensor, path: Path, text: Mapping[str, str] | None = None) -> None:
    """Write :func:`png_bytes` to a file, which is replaced whole or not at all."""
    write_bytes(path, png_bytes(picture, text))


def save_grid(
    images: Tensor | Sequence[tuple[str, Tensor]],
    n_bins: int,
    path: Path,
    columns: int | Sequence[str] | None = None,
    scale: int | None = None,
    title: str = "",
) -> None:
    """Write :func:`grid` as a PNG file, which is replaced whole or not at all."""
    save_picture(grid(images, n_bins, columns, scale, title), path)


def animation_bytes(
    pixels: Tensor, n_bins: int, file_format: str, scale: int | None = None, text: Mapping[str, str] | None = None
) -> bytes:
    """Encode images as an endless animation, there and back: 0, 1, .., n-1, n-2, .., 1 and again, ten a second.

    A WebP is lossless. A GIF is so too where the images have at most 256 colours together, as grey ones have; otherwise
    each image is shown in the 256 colours nearest to its own, without dithering.

    Args:
        pixels: (n, C, H, W) in 0..n_bins-1.
        n_bins: the grey level n_bins-1 is shown white.
        file_format: "gif" or "webp".
        scale: as of :func:`image_picture`.
        text: as of :func:`png_bytes`. A GIF keeps it as its comment, a WebP as the description of its XMP, one line
            "keyword: text" each.

    Raises:
        ValueError: no images, another format, a factor out of range, or a text that png_bytes refuses.
        MissingExtraError: Pillow is not installed.
    """
    expect(file_format in ANIMATIONS, "file_format", f"one of {ANIMATIONS}", repr(file_format))
    expect(pixels.dim() == 4 and len(pixels) > 0, "pixels", "images (n, C, H, W)", tuple(pixels.shape))
    told = "\n".join(f"{keyword}: {value}" for keyword, value in _checked(text).items())
    frames = [_image(picture) for picture in pictures(pixels, n_bins, scale)]
    options: dict[str, Any] = {"lossless": True} if file_format == "webp" else {}
    if told:
        options |= {"xmp": _XMP.format(escape(told)).encode()} if options else {"comment": told.encode()}
    first, *rest = [*frames, *frames[-2:0:-1]]
    stream = io.BytesIO()
    first.save(stream, file_format.upper(), append_images=rest, duration=100, loop=0, save_all=True, **options)
    return stream.getvalue()


def _image(picture: Tensor) -> Image:
    """uint8 (3, H, W) as a Pillow image."""
    fits = picture.dtype == torch.uint8 and picture.dim() == 3 and len(picture) == 3 and picture.numel() > 0
    expect(fits, "picture", "uint8 of shape (3, H, W)", f"{picture.dtype} {tuple(picture.shape)}")
    return optional("PIL.Image", "pictures").fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())


def _checked(text: Mapping[str, str] | None) -> Mapping[str, str]:
    """Texts that a picture of every format can hold."""
    for keyword, value in (text or {}).items():
        name = f"text[{keyword!r}]"
        expect(len(value) <= LONGEST_TEXT, name, f"at most {LONGEST_TEXT} characters", len(value))
        expect(holds_text(value), name, "characters other than control characters", ascii(value)[:80])
    return text or {}


def holds_text(value: str) -> bool:
    """Whether a picture can hold a text: no control characters other than tabs and line ends, valid Unicode."""
    return _NO_TEXT.search(value) is None


def curve_png(
    rows: Sequence[Row],
    lines: Mapping[str, str],
    ylabel: str,
    log: bool = False,
    yardsticks: Mapping[str, float] | None = None,
) -> bytes:
    """Draw columns of metrics.csv against steps as a PNG.

    Args:
        rows: the rows of the log; a cell that is None or missing is no point, NaN and inf break the line.
        lines: name of each column that is drawn, and its label.
        ylabel: the words of the axis.
        log: whether the axis is logarithmic; numbers of 0 and below then have no place.
        yardsticks: level lines, by their labels; all are on the axis.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure_class = optional("matplotlib.figure", "curves").Figure  # no pyplot: no global state
    axes = (figure := figure_class(figsize=(7, 4), layout="constrained")).subplots()
    later = []
    for column, label in lines.items():
        points = [(row["step"], value) for row in rows if (value := row.get(column)) is not None]
        shown = [value if math.isfinite(value) else math.nan for _, value in points]
        # Columns of single evaluations are points on a line; of the many others the line alone.
        marker = "o" if column in EVALUATED or len(shown) < 3 else ""
        axes.plot([step for step, _ in points], shown, label=label, lw=1.2, marker=marker, ms=3)
        later += [value for value in shown[2:] if column in EVALUATED and math.isfinite(value)]
    levels = yardsticks or {}
    for i, (name, value) in enumerate(levels.items()):
        axes.axhline(value, ls="--", lw=1, color=f"C{i + len(lines)}", label=name)
    if later:
        # The first evaluations are far above the rest: all that comes later is shown, and every yardstick.
        low, high = min([*later, *levels.values()]), max([*later, *levels.values()])
        margin = 0.1 * (high - low) + 0.05
        axes.set_ylim(low - margin, high + margin)
    if log:
        axes.set_yscale("log", nonpositive="mask")
    axes.set(xlabel="step", ylabel=ylabel)
    axes.grid(alpha=0.3)
    if len(lines) > 1 or levels:
        axes.legend()
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=120)
    return buffer.getvalue()


EVALUATED = ("train_subset_bpd", "held_out_bpd")  # columns of metrics.csv that have a value at evaluations alone
_BITS = {"train_bpd": "training batches", "train_subset_bpd": "train", "held_out_bpd": "held out"}


def bits_png(rows: Sequence[Row], yardsticks: Mapping[str, float]) -> bytes:
    """Draw bits/dim against steps as a PNG: trained on, held out, and the yardsticks as level lines."""
    return curve_png(rows, _BITS, "bits/dim", yardsticks=yardsticks)


def save_curve(rows: Sequence[Row], path: Path, yardsticks: Mapping[str, float]) -> None:
    """Write :func:`bits_png` to a file, which is replaced whole or not at all."""
    write_bytes(path, bits_png(rows, yardsticks))


def class_columns(count: int, n_classes: int | None) -> int | None:
    """How many images a row has for :func:`class_cycle` to put each class in a column of its own, where that fits."""
    return n_classes if n_classes is not None and 2 <= n_classes <= min(count, 16) else None


def class_cycle(count: int, n_classes: int | None, device: torch.device) -> Tensor | None:
    """Give labels 0, 1, 2, ... in turn to a grid of samples; None for a model without classes."""
    return None if n_classes is None else torch.arange(count, device=device) % n_classes
