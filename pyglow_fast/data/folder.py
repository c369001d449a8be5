"""A folder of ordinary image files, brought to one size and number of levels."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.data._optional import optional
from pyglow_fast.data.image_set import ImageSet

if TYPE_CHECKING:
    from PIL.Image import Image

SPLIT_BY = ("file", "folder")
# Not pixels: Pillow would start Ghostscript for EPS and the system's renderer for WMF, and cannot decode the rest.
_NOT_READ = frozenset({"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"})


def _formats() -> list[str]:
    """Pillow's names of the formats that are read."""
    pil = optional("PIL.Image", "image files")
    pil.init()
    return [kind for kind in pil.ID if kind in pil.OPEN and kind not in _NOT_READ]


def find_images(root: Path) -> list[Path]:
    """Every file below ``root`` whose ending is one that Pillow reads, sorted; hidden files and folders are skipped."""
    pil = optional("PIL.Image", "image files")
    formats = _formats()
    endings = {ending for ending, kind in pil.registered_extensions().items() if kind in formats}
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        visible = (Path(folder, name) for name in files if not name.startswith("."))
        found += [path for path in visible if path.suffix.lower() in endings]
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


def read_image(path: Path, size: int, gray: bool) -> Tensor:
    """One file as uint8 (C, size, size): turned upright by its EXIF tag, cropped to the centred square, scaled down.

    Raises:
        ValueError: the file cannot be decoded, or is smaller than ``size``; the message names it.
    """
    pil, ops = optional("PIL.Image", "image files"), optional("PIL.ImageOps", "image files")
    try:
        with pil.open(path, formats=_formats()) as opened:
            opened.load()
            image = _eight_bit(ops.exif_transpose(opened)).convert("L" if gray else "RGB")
    except Exception as error:  # decoders raise many kinds: OSError, SyntaxError, struct.error, Pillow's bomb error
        raise ValueError(f"{path}: expected an image that Pillow can decode, found {error}") from error
    expect(min(image.size) >= size, str(path), f"an image of at least {size}x{size}", "{}x{}".format(*image.size))
    if image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        # Cropped first: a resize of a region would let its surroundings bleed in.
        square = image.crop((left, top, left + side, top + side))
        image = square.resize((size, size), pil.Resampling.LANCZOS)
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.reshape(size, size, -1).permute(2, 0, 1).contiguous()


def _classes(parts: list[tuple[str, ...]]) -> tuple[Tensor | None, tuple[str, ...]]:
    """Labels by top-level subfolder, where every image lies in one and there are at least two."""
    if any(len(part) < 2 for part in parts):
        return None, ()
    names = tuple(sorted({part[0] for part in parts}))
    if len(names) < 2:
        return None, ()
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([number[part[0]] for part in parts]), names


def load_folder(
    root: str | Path, size: int = 32, gray: bool = False, n_bits: int = 8, split_by: str = "file"
) -> ImageSet:
    """All images below a folder, in memory.

    Args:
        root: the folder; searched recursively.
        size: side of the square that each image is cropped and scaled to; none may be smaller.
        gray: one channel rather than three.
        n_bits: 1..8; the lower bits are dropped, so n_bins = 2^n_bits.
        split_by: what a held-out split keeps together: each "file" alone, or all files of one "folder".

    Raises:
        ValueError: no such folder, no image in it, a file that cannot be decoded or is too small, a wrong option.
        MissingExtraError: Pillow is not installed.
    """
    root = Path(root)
    expect(size >= 1, "size", "a positive number", size)
    expect(n_bits in range(1, 9), "n_bits", "a value in 1..8", n_bits)
    expect(split_by in SPLIT_BY, "split_by", f"one of {SPLIT_BY}", repr(split_by))
    expect(root.is_dir(), "folder", "an existing folder", f"{str(root)!r}" + (" (a file)" if root.exists() else ""))
    paths = find_images(root)
    expect(len(paths) > 0, "folder", "a folder with images that Pillow reads", f"none in {str(root)!r}")
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # decoding releases the GIL
        levels = torch.stack(list(pool.map(lambda path: read_image(path, size, gray), paths)))
    levels >>= 8 - n_bits
    parts = [path.relative_to(root).parts for path in paths]
    groups = tuple("/".join(part if split_by == "file" else part[:-1]) for part in parts)
    labels, class_names = _classes(parts)
    return ImageSet(f"folder:{root}", levels, 2**n_bits, labels, class_names, groups)
