"""Decodes an image file or its bytes with Pillow; whatever is wrong with it is an UnreadableImageError."""

from __future__ import annotations

import io
import os
import re
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyglow_fast._errors import expect, visible
from pyglow_fast.data._optional import optional

if TYPE_CHECKING:
    from PIL.Image import Image

# Not pixels: Pillow would start Ghostscript for EPS, also for one within IPTC, and the system's renderer for WMF, and
# cannot decode the rest.
_NOT_READ = frozenset({"EPS", "IPTC", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"})
# They hold another file, whose size Pillow learns when it has decoded it.
_SIZE_WITHIN = frozenset({"AVIF", "BLP", "ICNS", "ICO"})
_TIFF_TILE = (322, 323)  # tags: width and height of a tile, which is decoded as a whole


class UnreadableImageError(ValueError):
    """One image cannot be decoded, or is too small; the message, made visible, names its file.

    >>> from pyglow_fast.data import DataConfig, UnreadableImageError, read_single
    >>> try:
    ...     read_single(b"no image", "upload.png", DataConfig("digits"), (1, 8, 8), n_bins=17)
    ... except UnreadableImageError as error:
    ...     print(error)
    upload.png: expected an image that Pillow can decode, found cannot identify image file
    """

    def __init__(self, message: str) -> None:
        super().__init__(visible(message))


def _formats() -> list[str]:
    """Pillow's names of the formats that are read."""
    pil = optional("PIL.Image", "image files")
    pil.init()
    return [file_format for file_format in pil.ID if file_format in pil.OPEN and file_format not in _NOT_READ]


def find_images(root: Path, on_unreadable: str = "raise") -> list[Path]:
    """Finds every file below ``root`` whose ending Pillow reads, sorted; hidden files and folders are skipped.

    Args:
        root: the folder; links to other folders are not followed.
        on_unreadable: "raise" on a folder that cannot be listed, or "skip" it with a warning.

    Raises:
        ValueError: a folder cannot be listed and on_unreadable is "raise"; the message names it.
    """
    pil = optional("PIL.Image", "image files")
    formats = _formats()
    endings = {ending for ending, file_format in pil.registered_extensions().items() if file_format in formats}
    found = []
    lost: list[str] = []

    def refuse(error: OSError) -> None:
        why = f"{error.filename}: expected a folder that can be listed, found {error.strerror}"
        if on_unreadable == "raise":
            raise ValueError(visible(why)) from error
        lost.append(why)

    for folder, subfolders, files in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        present = (Path(folder, name) for name in files if not name.startswith("."))
        found += [path for path in present if path.suffix.lower() in endings]
    if lost:
        text = f"folders in {root} that could not be listed and were left out: {len(lost)}; the first: {lost[0]}"
        warnings.warn(visible(text), stacklevel=2)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _eight_bit(image: Image) -> Image:
    """The image with 8 bits a sample; transparency is laid on white."""
    pil = optional("PIL.Image", "image files")
    if image.mode.startswith("I;16"):
        # A plain conversion would clip everything above 255 rather than scale it.
        wide = optional("numpy", "image files").asarray(image)
        return pil.fromarray((wide >> 8).astype("uint8"))
    if image.mode in ("I", "F"):
        raise ValueError(f"{image.mode!r} samples (32 bits), which have no fixed range")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = pil.new("RGBA", image.size, "white")
        return pil.alpha_composite(white, image).convert("RGB")
    return image


def plain(image: Image, gray: bool) -> Image:
    """Turns a Pillow image upright by its EXIF tag and makes it "L" or "RGB": 8 bits, transparency laid on white."""
    ops = optional("PIL.ImageOps", "image files")
    return _eight_bit(ops.exif_transpose(image)).convert("L" if gray else "RGB")


def decode(
    source: Path | bytes,
    where: str,
    gray: bool,
    most_pixels: int | None = None,
    formats: Sequence[str] | None = None,
) -> Image:
    """Decodes an image to a :func:`plain` Pillow image; of several frames or pages the first.

    Args:
        source: a file, or its contents.
        where: what messages call it.
        gray: "L" rather than "RGB".
        most_pixels: of its width times height, and of a tile's in a TIFF, looked at before any are decoded; formats of
            which that cannot be known before (AVIF, BLP, ICNS, ICO) are then not tried. None: what Pillow allows.
        formats: Pillow's names of those that are tried, such as "PNG". None: all that can hold pixels.

    Raises:
        UnreadableImageError: Pillow cannot decode it, it has too many pixels, or ``source`` is no regular file.
    """
    pil = optional("PIL.Image", "image files")
    expect(
        most_pixels is None or (isinstance(most_pixels, int) and most_pixels >= 1),
        "most_pixels",
        "a positive number",
        repr(most_pixels),
    )
    listed = formats is None or (not isinstance(formats, str) and len(formats) > 0)
    expect(listed, "formats", "names of Pillow's formats", repr(formats))
    without = _SIZE_WITHIN if most_pixels is not None else frozenset()
    tried = [name for name in _formats() if (formats is None or name in formats) and name not in without]
    try:
        if isinstance(source, Path):
            check_regular(source, where)
        with (
            io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as stream,
            pil.open(stream, formats=tried) as opened,
        ):
            for width, height in (opened.size, _tile(opened)):
                if most_pixels is not None and width * height > most_pixels:
                    raise _too_large(where, most_pixels, f"{width}x{height}")
            opened.load()
            return plain(opened, gray)
    except UnreadableImageError:
        raise
    except (pil.DecompressionBombError, pil.DecompressionBombWarning) as error:  # a warning where warnings are errors
        limit = (pil.MAX_IMAGE_PIXELS or 0) * (1 if isinstance(error, Warning) else 2)
        pixels_found = re.search(r"\d+", str(error))
        found = f"{pixels_found.group()} of them" if pixels_found else str(error)
        raise _too_large(where, min(limit, most_pixels or limit), found) from error
    except Exception as error:  # decoders raise many errors: OSError, SyntaxError, struct.error and others
        # That a file is of no known format is said with the file's name or the address of its contents.
        unknown = isinstance(error, pil.UnidentifiedImageError)
        said = "cannot identify image file" if unknown else " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:  # of the system, without its number and the name once more
            said = error.strerror
        known = "" if formats is None else f" ({', '.join(formats)})"
        raise UnreadableImageError(f"{where}: expected an image that Pillow can decode{known}, found {said}") from error


def _tile(image: Image) -> tuple[int, int]:
    """Width and height of a TIFF's tiles, which may be larger than the image; (0, 0) without tiles."""
    tags = getattr(image, "tag_v2", {})
    found = (tags.get(tag, 0) for tag in _TIFF_TILE)
    width, height = (max(map(int, value), default=0) if isinstance(value, tuple) else int(value) for value in found)
    return width, height


def check_regular(path: Path, where: str) -> None:
    """Refuse what cannot be read from its beginning to its end; reading a pipe would wait for a writer.

    Raises:
        OSError: there is nothing.
        UnreadableImageError: it is a folder, a pipe or a device.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        tests = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
        found = next((word for test, word in tests if test(mode)), "a device")
        raise UnreadableImageError(f"{where}: expected an image file, found {found}")


def _too_large(where: str, most: int, found: str) -> UnreadableImageError:
    return UnreadableImageError(f"{where}: expected an image of at most {most} pixels, found {found}")


def to_square(image: Image, size: int, where: str) -> Image:
    """Cuts out the centred square of an image and scales it down to ``size``.

    Raises:
        UnreadableImageError: a side is shorter than ``size``.
    """
    if min(image.size) < size:
        found = "{}x{}".format(*image.size)
        raise UnreadableImageError(f"{where}: expected an image of at least {size}x{size}, found {found}")
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Cropped first: a resize of a region would let its surroundings bleed in.
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), optional("PIL.Image", "image files").Resampling.LANCZOS)


def pixels(image: Image) -> Tensor:
    """Copies an "L" or "RGB" image to a tensor, uint8 (C, H, W)."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.reshape(image.height, image.width, -1).permute(2, 0, 1).contiguous()


def read_image(source: Path | bytes, size: int, gray: bool, where: str | None = None) -> Tensor:
    """Decodes a file, or its contents, to uint8 (C, size, size): upright, its centred square, scaled down.

    Raises:
        UnreadableImageError: it cannot be decoded, or is smaller than ``size``; the message names it.
    """
    name = str(source) if where is None else where
    return pixels(to_square(decode(source, name, gray), size, name))
