"""Decodes image files with Pillow and brings them to what a model sees; what cannot be is an UnreadableImageError."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyglow_fast._core.errors import expect, visible
from pyglow_fast.data._optional import optional
from pyglow_fast.data.config import SOURCES, DataConfig

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow knows more: it would start Ghostscript for an EPS, and does not tell the size of an ICO before it decodes it.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_ENDINGS = frozenset([".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"])


class UnreadableImageError(ValueError):
    """One image cannot be decoded, or is too small; the message, made visible, names its file."""

    def __init__(self, message: str) -> None:
        super().__init__(visible(message))


def check_folder(root: Path, argument: str) -> None:
    """Refuse what is not an existing folder."""
    expect(root.is_dir(), argument, "an existing folder", f"{str(root)!r}" + (" (a file)" if root.exists() else ""))


def find_images(root: Path) -> list[Path]:
    """Finds every image file below a folder by its ending, sorted; hidden files and folders are skipped."""

    def refuse(error: OSError) -> None:
        text = f"{error.filename}: expected a folder that can be listed, found {error.strerror}"
        raise ValueError(visible(text)) from error

    found = []
    for folder, subfolders, files in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        seen = (Path(folder, name) for name in files if not name.startswith("."))
        found += [path for path in seen if path.suffix.lower() in _ENDINGS]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def plain(image: Image, gray: bool, background: str = "white") -> Image:
    """Turns a Pillow image upright by its EXIF tag and makes it "L" or "RGB": 8 bits, transparency laid on a colour."""
    pil = optional("PIL.Image", "image files")
    image = optional("PIL.ImageOps", "image files").exif_transpose(image)
    if image.mode.startswith("I;16"):  # a plain conversion would clip everything above 255 rather than scale it
        image = pil.fromarray((optional("numpy", "image files").asarray(image) >> 8).astype("uint8"))
    if image.mode in ("I", "F"):
        raise ValueError(f"{image.mode!r} samples (32 bits), which have no fixed range")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = pil.alpha_composite(pil.new("RGBA", image.size, background), image).convert("RGB")
    return image.convert("L" if gray else "RGB")


def decode(path: Path, where: str, gray: bool, most_pixels: int | None = None, background: str = "white") -> Image:
    """Decodes a file to a :func:`plain` Pillow image; of several frames or pages the first.

    Messages call it ``where``. ``most_pixels`` are looked at before any are decoded; no TIFF is then taken, since a
    tile in it may be larger than the image.
    """
    pil = optional("PIL.Image", "image files")
    taken = [name for name in FORMATS if most_pixels is None or name != "TIFF"]
    try:
        with pil.open(path, formats=taken) as opened:
            width, height = opened.size
            if most_pixels is not None and width * height > most_pixels:
                text = f"{where}: expected an image of at most {most_pixels} pixels, found {width}x{height}"
                raise UnreadableImageError(text)
            return plain(opened, gray, background)
    except UnreadableImageError:
        raise
    except Exception as error:  # decoders raise many errors: OSError, SyntaxError, struct.error and others
        said = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        if isinstance(error, pil.UnidentifiedImageError):  # it names the file once more
            said = "cannot identify image file"
        raise UnreadableImageError(f"{where}: expected an image that Pillow can decode, found {said}") from error


def to_square(image: Image, side: int, where: str, config: DataConfig) -> Image:
    """Makes an image a square of ``side`` pixels, by what ``config`` says of fit, background and small ones."""
    pil = optional("PIL.Image", "image files")
    if min(image.size) < side and not config.enlarge:
        found = "{}x{}".format(*image.size)
        raise UnreadableImageError(f"{where}: expected an image of at least {side}x{side}, found {found}")
    if image.size != (side, side) and config.fit != "stretch":
        whole = min(image.size) if config.fit == "crop" else max(image.size)
        left, top = int((whole - image.width) / 2), int((whole - image.height) / 2)
        # Before it is scaled: a resize of a region would let its surroundings bleed in.
        square = pil.new(image.mode, (whole, whole), config.background)
        square.paste(image, (left, top))
        image = square
    return image if image.size == (side, side) else image.resize((side, side), pil.Resampling.LANCZOS)


def pixels(image: Image) -> Tensor:
    """Copies an "L" or "RGB" image to a tensor, uint8 (C, H, W)."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.reshape(image.height, image.width, -1).permute(2, 0, 1).contiguous()


def as_values(image: Any, where: str) -> Tensor:
    """Gives a PIL image, or a uint8 tensor or array (C, H, W) or (H, W), as uint8 (C, H, W)."""
    if hasattr(image, "getbands"):
        return pixels(plain(image, image.mode in ("L", "1", "I;16")))  # what is grey stays grey
    found = type(image).__name__
    if hasattr(image, "__array_interface__"):
        image = torch.from_numpy(optional("numpy", "arrays").array(image))
    if isinstance(image, Tensor):
        found = f"{image.dtype} {tuple(image.shape)}"
    fits = isinstance(image, Tensor) and image.dtype == torch.uint8 and image.dim() in (2, 3)
    expect(fits, where, "a PIL image, or a uint8 tensor or array (C, H, W) or (H, W)", found)
    return (image.unsqueeze(0) if image.dim() == 2 else image).contiguous()


def luma(values: Tensor) -> Tensor:
    """Turns RGB uint8 (N, 3, H, W) into grey (N, 1, H, W) as Pillow does."""
    count, _, height, width = values.shape
    tall = values.permute(0, 2, 3, 1).reshape(count * height, width, 3).contiguous().numpy()
    gray = optional("PIL.Image", "grey images").fromarray(tall).convert("L")
    return pixels(gray).reshape(count, 1, height, width)


def padded(values: Tensor, side: int) -> Tensor:
    """Surrounds images (..., own, own) evenly with zeros to (..., side, side)."""
    more = side - values.shape[-1]
    return torch.nn.functional.pad(values, (more // 2, more - more // 2) * 2) if more else values


def fixed_size(values: Tensor, config: DataConfig) -> Tensor:
    """Gives 8-bit images of one size, uint8 (N, C, own, own), the side, colours and grey levels that are asked for."""
    values = luma(values) if config.gray and values.shape[1] == 3 else values
    return padded(values, config.side) >> (9 - config.n_bins.bit_length())


def read_single(
    path: Path,
    where: str,
    config: DataConfig,
    image_shape: tuple[int, int, int],
    n_bins: int,
    most_pixels: int | None = None,
) -> Tensor:
    """Reads an image file as pixels, uint8 (C, H, W) in 0..n_bins-1, prepared as the held-out images of ``config`` are.

    An image of exactly H x W pixels is taken as it is, since a model may have drawn it, and so is one whose pixels are
    enlarged by a whole factor, as pictures of the model's images are saved. Any other is made square and
    scaled: to the side of the source's images, if they have one, and padded with zeros to H x W; otherwise to H x W
    and the margin that held-out images are cut out of. A photo is taken whole, not in tiles. Nothing is inverted:
    digits are bright on dark.

    ``config`` is the data that the model was trained on, ``image_shape`` (C, H, W) of the model, C 1 or 3, H = W, and
    ``n_bins`` its number of grey levels; an 8-bit value v becomes v n_bins // 256, so that a grey level l that was
    shown as round(255 l / (n_bins - 1)) comes back as l. For the rest see :func:`pyglow_fast.data.files.decode`.
    """
    shape = tuple(image_shape)
    fits = len(shape) == 3 and shape[0] in (1, 3) and shape[1] == shape[2] and shape[1] >= 1
    expect(fits, "image_shape", "(C, side, side) with 1 or 3 channels", shape)
    expect(n_bins in range(2, 257), "n_bins", "a number of grey levels in 2..256", n_bins)
    channels, side = shape[:2]
    own, margin = SOURCES[config.scheme].side, config.crop_margin
    expect(own is None or side >= own, "image_shape", f"sides of at least {own}, as {config.scheme} has", shape)
    image = decode(path, where, channels == 1, most_pixels, config.background)
    factor = image.width // side
    if factor > 1 and image.size == (side * factor, side * factor):
        drawn = image.reduce(factor)
        nearest = optional("PIL.Image", "image files").Resampling.NEAREST
        image = drawn if drawn.resize(image.size, nearest).tobytes() == image.tobytes() else image
    if image.size == (side, side):
        values = pixels(image)
    else:
        values = padded(pixels(to_square(image, own or side + margin, where, config)), side + margin)
        values = config.augmentation.central(values)
    return (values.int() * n_bins // 256).to(torch.uint8)
