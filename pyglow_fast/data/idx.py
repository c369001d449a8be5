"""Reads MNIST and Fashion-MNIST: IDX files, plain or gzipped.

torchvision's own reader takes no .gz, checks by ``assert``, which ``python -O`` leaves out, and names no file in its
errors.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from pyglow_fast._errors import expect, visible
from pyglow_fast.data.folder import check_folder
from pyglow_fast.data.image_set import ImageSet
from pyglow_fast.data.prepare import Preparation

SIDE = 28
FILES = tuple(f"{part}-{content}-ubyte" for part in ("train", "t10k") for content in ("images-idx3", "labels-idx1"))
CLASS_NAMES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
}


def read_idx(path: Path, n_sizes: int) -> Tensor:
    """Reads an IDX file of bytes with ``n_sizes`` dimensions into a uint8 tensor.

    Raises:
        ValueError: another kind of file, or one that is shorter or longer than its header says; the message names it.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4 + 4 * n_sizes)
            expect(len(head) == 4 + 4 * n_sizes, str(path), "an IDX file", f"{len(head)} bytes")
            magic, *sizes = struct.unpack(f">{1 + n_sizes}I", head)
            expected = f"the IDX magic number {0x800 + n_sizes:#010x} (bytes, {n_sizes} dimensions)"
            expect(magic == 0x800 + n_sizes, str(path), expected, f"{magic:#010x}")
            count = math.prod(sizes)
            expect(count > 0, str(path), "at least one value", f"sizes {tuple(sizes)}")
            values = file.read(count) if count < 1 << 31 else b""
            expect(len(values) == count, str(path), f"{count} bytes for sizes {tuple(sizes)}", len(values))
            expect(not file.read(1), str(path), f"{count} bytes for sizes {tuple(sizes)}", "more")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(visible(f"{path}: expected a whole IDX file, found {error}")) from error
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).reshape(sizes)


def _part(folder: Path, images_name: str, labels_name: str) -> tuple[Tensor, Tensor]:
    """(uint8 (N, 1, 28, 28), int64 (N,)) of one part."""
    paths = []
    for name in (images_name, labels_name):
        found = [path for path in (folder / f"{name}.gz", folder / name) if path.is_file()]
        expect(len(found) > 0, str(folder), f"the file {name}.gz or {name}", "neither")
        paths.append(found[0])
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    expect(images.shape[1:] == (SIDE, SIDE), str(paths[0]), f"images of {SIDE}x{SIDE}", tuple(images.shape[1:]))
    expect(len(labels) == len(images), str(paths[1]), f"{len(images)} labels, one an image", len(labels))
    expect(int(labels.max()) < 10, str(paths[1]), "labels in 0..9", int(labels.max()))
    return images.unsqueeze(1), labels.long()


def load_idx(name: str, folder: Path, preparation: Preparation) -> ImageSet:
    """Loads ``mnist`` or ``fashion-mnist`` from a folder with its four files, with the official split.

    Args:
        name: which of the two: it decides the names of the classes.
        folder: holds train-images-idx3-ubyte, train-labels-idx1-ubyte and the same of t10k, each plain or as .gz.
        preparation: size (28 or more: padded with zeros), n_bits, crop_margin and flip.

    Raises:
        ValueError: a file is missing or damaged, or an option is wrong.
    """
    check_folder(folder, name)
    train, test = _part(folder, *FILES[:2]), _part(folder, *FILES[2:])
    pixels = preparation.to_pixels(preparation.fixed_size(torch.cat([train[0], test[0]]), name))
    official = train_first(len(train[0]), len(pixels))
    labels = torch.cat([train[1], test[1]])
    names = CLASS_NAMES[name]
    return ImageSet(name, pixels, preparation.n_bins, labels, names, (), official, preparation.augmentation)


def train_first(n_train: int, count: int) -> tuple[Tensor, Tensor]:
    """Makes the split of ``count`` images whose first ``n_train`` are for training."""
    return torch.arange(n_train), torch.arange(n_train, count)
