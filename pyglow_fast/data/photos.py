"""Cuts large photographs into tiles."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from pyglow_fast._errors import expect, visible
from pyglow_fast._settings import Range
from pyglow_fast.data.augment import MOST
from pyglow_fast.data.decode import UnreadableImageError, decode, find_images, pixels
from pyglow_fast.data.folder import check_folder
from pyglow_fast.data.image_set import ImageSet
from pyglow_fast.data.prepare import FILE_SIZE, Preparation

# Pictures of the package budgie-backgrounds that are no photographs: a woodblock print, a planet on plain black, and
# two drawings of plain areas.
NOT_PHOTOS = frozenset({"ocean-waves.jpg", "saturnian-profile.jpg", "valley-midnight.jpg", "waves-midnight.jpg"})

# By which photos are shrunk.
SCALE = Range(least=1, most=MOST, why="a larger factor is a slip of the pen")


def default_scale(size: int) -> int:
    """Says how much photos are shrunk first: small tiles of a large photo would show little but smooth areas."""
    return 4 if size <= 64 else 2 if size <= 256 else 1


def _tiles(path: Path, side: int, scale: int, gray: bool) -> Tensor:
    """uint8 (n, C, side, side), row by row.

    Raises:
        UnreadableImageError: it cannot be decoded, or is smaller than a tile.
    """
    image = decode(path, str(path), gray)
    width, height = image.width // scale, image.height // scale
    across, down = width // side, height // side
    if across * down == 0:
        needed = side * scale
        found = f"{image.width}x{image.height}"
        raise UnreadableImageError(f"{path}: expected an image of at least {needed}x{needed}, found {found}")
    values = pixels(image.crop((0, 0, width * scale, height * scale)).reduce(scale))
    values = values[:, : down * side, : across * side].reshape(-1, down, side, across, side)
    return values.permute(1, 3, 0, 2, 4).reshape(down * across, -1, side, side)


def load_photos(root: Path, preparation: Preparation, scale: int | None = None) -> ImageSet:
    """Loads tiles of all photos in a folder, into memory; the tiles of one photo are a group.

    Args:
        root: holds the photos. Those in NOT_PHOTOS are left out.
        preparation: tiles have the side size + crop_margin and do not overlap.
        scale: whole factor by which the photos are shrunk first; None: 4 for a size up to 64, 2 up to 256, else 1.

    Raises:
        ValueError: no photos, one that cannot be read or is smaller than a tile, or a folder that cannot be listed.
    """
    if scale is not None:
        SCALE.check("scale", scale, whole=True)
    check_folder(root, "photos")
    paths = [path for path in find_images(root, preparation.on_unreadable) if path.name not in NOT_PHOTOS]
    expect(len(paths) > 0, "photos", "a folder with photos", f"none in {str(root)!r}")
    factor = scale or default_scale(preparation.size or FILE_SIZE)
    parts, groups, errors = [], [], []
    for path in paths:
        try:
            tiles = _tiles(path, preparation.stored_side, factor, preparation.gray)
        except UnreadableImageError as error:
            if preparation.on_unreadable == "raise":
                raise
            errors.append(str(error))
            continue
        parts.append(tiles)
        groups += [path.relative_to(root).as_posix()] * len(tiles)
    expect(len(parts) > 0, "photos", "at least one photo that can be read", f"none: {errors[:1]}")
    if errors:
        text = f"{len(errors)} of {len(paths)} photos could not be read and were left out; the first: {errors[0]}"
        warnings.warn(visible(text), stacklevel=2)
    tiles = preparation.to_pixels(torch.cat(parts))
    return ImageSet("photos", tiles, preparation.n_bins, groups=tuple(groups), augmentation=preparation.augmentation)
