"""Reads CelebA in the layout of torchvision: aligned JPEGs, the official partition, any attribute as two classes.

torchvision's own class wants three more lists, which nothing here needs, and each of the lists unchanged, so that it
reads no part of the set; it opens whatever path the partition names, and finds a missing image when it is asked for.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pyglow_fast._errors import expect, visible
from pyglow_fast.data.folder import check_folder
from pyglow_fast.data.image_set import Attributes, Images
from pyglow_fast.data.lazy import Listing, from_files
from pyglow_fast.data.prepare import Preparation

IMAGES, PARTITION, ATTRIBUTES = "img_align_celeba", "list_eval_partition.txt", "list_attr_celeba.txt"
_PARTS = {"0": "train", "1": "valid", "2": "test"}


def _lines(path: Path) -> list[list[str]]:
    """The words of each line that has some."""
    expect(path.is_file(), str(path), "a text file of CelebA", "none")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(visible(f"{path}: expected a text file of CelebA, found {error}")) from error
    return [line.split() for line in text.splitlines() if line.strip()]


def _table(path: Path, names: list[str], wanted: str | None = None) -> tuple[tuple[str, ...], Tensor]:
    """(attribute names, ``wanted`` among them, bool (len(names), attributes): which each of these images has)."""
    rows = _lines(path)
    expect(len(rows) >= 2, str(path), "a count, a line of attribute names and a line an image", f"{len(rows)} lines")
    known = rows[1]
    expect(wanted is None or wanted in known, "attribute", f"one of {', '.join(known)}", repr(wanted))
    value = {}
    for row in rows[2:]:
        fits = len(row) == len(known) + 1 and set(row[1:]) <= {"1", "-1"}
        expect(fits, str(path), f"a name and {len(known)} values of 1 or -1 a line", " ".join(row)[:80])
        value[row[0]] = [word == "1" for word in row[1:]]
    for name in names:
        expect(name in value, str(path), f"a line for {name}", "none")
    return tuple(known), torch.tensor([value[name] for name in names])


def _folder(root: Path) -> Path:
    """Finds the folder of the files: ``root``, or the folder celeba in it."""
    check_folder(root, "celeba")
    folder = root if (root / PARTITION).is_file() else root / "celeba"
    expect((folder / PARTITION).is_file(), "celeba", f"the file {folder / PARTITION}", "none")
    return folder


def attribute_table(root: Path) -> tuple[tuple[str, ...], Tensor]:
    """Reads (names of the attributes, bool (N, attributes): which of them each image has), in the order of the images.

    Args:
        root: as for :func:`load_celeba`.

    Raises:
        ValueError: a file is missing or is not what it should be.
    """
    folder = _folder(root)
    return _table(folder / ATTRIBUTES, [row[0] for row in _lines(folder / PARTITION)])


def load_celeba(root: Path, preparation: Preparation, attribute: str | None = None) -> Images:
    """Loads CelebA: the centred square of each aligned image, with the official split.

    The images of its validation part are there, but on neither side of the official split.

    Args:
        root: the folder ``celeba``, or the one it lies in.
        preparation: how the files are prepared.
        attribute: one of the 40 names in list_attr_celeba.txt, which gives the classes "not NAME" and "NAME".

    Raises:
        ValueError: a file is missing or is not what it should be, or no such attribute.
    """
    folder = _folder(root)
    rows = _lines(folder / PARTITION)
    for row in rows:
        fits = len(row) == 2 and row[1] in _PARTS and "/" not in row[0] and "\\" not in row[0]
        expect(fits, str(folder / PARTITION), "a file name and 0, 1 or 2 a line", " ".join(row)[:80])
    names = [row[0] for row in rows]
    index = {part: torch.tensor([i for i, row in enumerate(rows) if row[1] == part]) for part in _PARTS}
    for part in ("0", "2"):
        expect(len(index[part]) > 0, str(folder / PARTITION), f"images of part {part} ({_PARTS[part]})", "none")
    attributes, labels = None, None
    if attribute is not None or (folder / ATTRIBUTES).is_file():
        attributes = Attributes(*_table(folder / ATTRIBUTES, names, attribute))
    if attribute is not None and attributes is not None:
        labels = attributes.has[:, attributes.names.index(attribute)].long()
    classes = () if attribute is None else (f"not {attribute}", attribute)
    listing = Listing(labels, classes, official=(index["0"], index["2"]), attributes=attributes)
    return from_files("celeba", folder / IMAGES, names, preparation, listing)
