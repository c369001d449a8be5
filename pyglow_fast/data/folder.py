"""Loads a folder of ordinary image files, brought to one size and number of grey levels."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.data.decode import find_images
from pyglow_fast.data.image_set import Images
from pyglow_fast.data.lazy import Listing, from_files
from pyglow_fast.data.prepare import FILE_SIZE, Preparation

SPLIT_BY = ("file", "folder")


def check_folder(root: Path, argument: str = "folder") -> None:
    """Refuse what is not an existing folder.

    Raises:
        ValueError: it is not.
    """
    expect(root.is_dir(), argument, "an existing folder", f"{str(root)!r}" + (" (a file)" if root.exists() else ""))


def numbered(names: list[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Numbers the class of each image: (labels (N,), class names sorted)."""
    class_names = tuple(sorted(set(names)))
    number = {name: i for i, name in enumerate(class_names)}
    return torch.tensor([number[name] for name in names], dtype=torch.int64), class_names


def _classes(parts: list[tuple[str, ...]]) -> tuple[Tensor | None, tuple[str, ...]]:
    """Labels by top-level subfolder, where every image lies in one and there are at least two."""
    if any(len(part) < 2 for part in parts) or len({part[0] for part in parts}) < 2:
        return None, ()
    return numbered([part[0] for part in parts])


def load_folder(
    root: str | Path,
    size: int = FILE_SIZE,
    gray: bool = False,
    n_bits: int = 8,
    split_by: str = "file",
    crop_margin: int = 0,
    flip: bool = False,
    on_unreadable: str = "raise",
    in_memory: bool | None = None,
) -> Images:
    """Loads all images below a folder, into memory if they fit.

    Args:
        root: the folder; searched recursively.
        size: side of the square that each image is cropped and scaled to; none may be smaller.
        gray: one channel rather than three.
        n_bits: 1..8; the lower bits are dropped, so n_bins = 2^n_bits.
        split_by: what a held-out split keeps together: each "file" alone, or all files of one "folder".
        crop_margin: scale to so many pixels more; training sees a random window of ``size``.
        flip: training sees half of the images mirrored.
        on_unreadable: "raise" on a file that cannot be decoded or is too small, or a folder that cannot be listed; or
            "skip" it with a warning.
        in_memory: read all of them now (True) or each when it is used (False); None: now if they take up to 1 GiB.

    Raises:
        ValueError: no such folder, no image in it, a folder that cannot be listed, a file that cannot be decoded or is
            too small, a wrong option.
        MissingExtraError: Pillow is not installed.
    """
    root = Path(root)
    preparation = Preparation(size, gray, n_bits, crop_margin, flip, on_unreadable, in_memory)
    expect(split_by in SPLIT_BY, "split_by", f"one of {SPLIT_BY}", repr(split_by))
    check_folder(root)
    parts = [path.relative_to(root).parts for path in find_images(root, on_unreadable)]
    expect(len(parts) > 0, "folder", "a folder with images that Pillow reads", f"none in {str(root)!r}")
    groups = tuple("/".join(part if split_by == "file" else part[:-1]) for part in parts)
    labels, class_names = _classes(parts)
    listing = Listing(labels, class_names, groups)
    return from_files(f"folder:{root}", root, ["/".join(part) for part in parts], preparation, listing)
