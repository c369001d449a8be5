"""Reads images when they are asked for, and brings such a set into memory where it fits."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pyglow_fast._errors import expect, visible
from pyglow_fast._settings import check_setting
from pyglow_fast.data.augment import Augmentation
from pyglow_fast.data.decode import UnreadableImageError, read_image
from pyglow_fast.data.image_set import Attributes, Images, ImageSet, check_attributes, check_labels, hash_parts
from pyglow_fast.data.prepare import Preparation

MEMORY_LIMIT = 1 << 30  # bytes of pixels up to which a set is kept in memory unless told otherwise


class Reader(Protocol):
    """Gives the images of a LazyImages, one at a time; it goes to worker processes, so it can be pickled."""

    @property
    def parallel(self) -> bool:
        """Tells whether several threads may read at once."""

    def __len__(self) -> int:
        """Counts the images."""

    def read(self, index: int) -> Tensor:
        """Reads one image, uint8 (C, H, W) with 8-bit values.

        Raises:
            UnreadableImageError: it cannot be read.
        """


@dataclass(frozen=True)
class FileReader:
    """Reads image files below a folder and brings them to one size.

    Args:
        root: the folder.
        names: relative to it, one an image.
        side: of the square that each is scaled to.
        gray: one channel.
    """

    root: Path
    names: Sequence[str]
    side: int
    gray: bool
    parallel: bool = True  # decoding releases the GIL

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Tensor:
        """Reads one file as uint8 (C, side, side)."""
        return read_image(self.root / self.names[index], self.side, self.gray)

    def identity(self) -> str:
        """Makes a digest of the names and sizes of all files.

        Raises:
            ValueError: a file is not there.
        """
        digest = hashlib.sha256()
        for name in self.names:
            path = self.root / name
            try:
                size = os.stat(path).st_size
            except OSError as error:
                raise ValueError(visible(f"{path}: expected an image file, found {error.strerror}")) from error
            digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True)
class LazyImages(Images):
    """A set of images each of which is read whenever it is asked for.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from pyglow_fast.data import LazyImages, load_folder
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("RGB", (8, 8), "red").save(Path(folder, "red.png"))
    ...     data = load_folder(folder, size=8, in_memory=False)
    ...     print(isinstance(data, LazyImages), data.item(0)[:, 0, 0].tolist())
    True [255, 0, 0]

    Args:
        name: what the user calls it.
        reader: gives 8-bit images of ``stored_shape``.
        stored_shape: (C, H, W) of an image as the reader gives it, the margin included.
        n_bins: number of grey levels, a power of two up to 256: the lower bits of the samples are dropped.
        identity: a digest that changes when the images do; see :meth:`fingerprint`.
        labels: int64 (N,), or None.
        class_names: one per class.
        groups: one key an image, or empty.
        official: the source's own split as indices (train, test), or None.
        augmentation: what training sees of them.
        on_unreadable: what :meth:`batch` does about an image that cannot be read: "raise", or "skip" to the next.
        positions: int64 (N,), which of the reader's images these are; None: all.
        attributes: what each image has besides its class, or None.

    Raises:
        ValueError: labels or groups that do not fit, or no images.
    """

    name: str
    reader: Reader
    stored_shape: tuple[int, int, int]
    n_bins: int
    identity: str
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    official: tuple[Tensor, Tensor] | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)
    on_unreadable: str = "raise"
    positions: Tensor | None = None
    attributes: Attributes | None = None

    def __post_init__(self) -> None:
        check_setting(Preparation, "on_unreadable", self.on_unreadable)
        count = len(self)
        expect(count > 0, "data", "at least one image", f"none in {self.name}")
        expect(not self.groups or len(self.groups) == count, "groups", f"{count} keys", len(self.groups))
        check_labels(self.labels, self.class_names, count)
        check_attributes(self.attributes, count)

    def __len__(self) -> int:
        return len(self.reader) if self.positions is None else len(self.positions)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image as the model sees it."""
        channels, height, width = self.stored_shape
        return channels, height - self.augmentation.crop_margin, width - self.augmentation.crop_margin

    def subset(self, indices: Tensor | Sequence[int]) -> LazyImages:
        """Takes the images at ``indices``, in that order; they have no split of their own."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        labels = None if self.labels is None else self.labels[index]
        groups = tuple(self.groups[i] for i in index.tolist()) if self.groups else ()
        positions = index if self.positions is None else self.positions[index]
        had = None if self.attributes is None else self.attributes.at(index)
        return replace(self, labels=labels, groups=groups, official=None, positions=positions, attributes=had)

    def stored(self, index: int) -> Tensor:
        """Reads the pixels of one image with its margin, uint8 (C, H + margin, W + margin)."""
        position = index if self.positions is None else int(self.positions[index])
        return self.reader.read(position) >> (9 - self.n_bins.bit_length())

    def item(self, index: int, key: int | None = None) -> Tensor:
        """Reads one image as uint8 (C, H, W); see :meth:`Images.item`."""
        return self.augmentation.view(self.stored(index), key)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Reads (pixels uint8 (n, C, H, W), labels (n,) or None) at ``indices``, one after the other.

        Raises:
            UnreadableImageError: an image cannot be read and on_unreadable is "raise"; with "skip" the next one that
                can be read is in its place, and its label.
        """
        found = [readable(self, index, None, self.on_unreadable) for index in indices.tolist()]
        used = torch.tensor([at for _, at in found], dtype=torch.int64)
        return torch.stack([image for image, _ in found]), None if self.labels is None else self.labels[used]

    def fingerprint(self) -> str:
        """Makes a digest of all settings and ``identity`` (for files: relative names and sizes, not contents)."""
        facts = f"{self.stored_shape} {self.n_bins} {self.class_names} {self.identity}"
        digest = hashlib.sha256(facts.encode("utf-8", "surrogateescape"))
        if self.positions is not None:
            digest.update(self.positions.contiguous().numpy().data)
        hash_parts(digest, self)
        return digest.hexdigest()[:32]


def readable(data: Images, index: int, key: int | None, on_unreadable: str) -> tuple[Tensor, int]:
    """Reads a view of image ``index``, or with "skip" of the next that can be read; gives it and the index it has.

    Raises:
        UnreadableImageError: it cannot be read and on_unreadable is "raise".
        ValueError: with "skip", none can.
    """
    try:
        return data.item(index, key), index
    except UnreadableImageError as error:
        if on_unreadable == "raise":
            raise
        first = error
    for step in range(1, len(data)):
        other = (index + step) % len(data)
        try:
            return data.item(other, key), other
        except UnreadableImageError:
            continue
    expect(False, "data", f"at least one image that can be read in {data.name}", f"none: {first}")
    raise AssertionError  # for the type checker: refused above


def kept(data: LazyImages, in_memory: bool | None) -> Images:
    """Gives the set itself, or the same with all its images in memory.

    Args:
        data: the images.
        in_memory: whether to read them now; None: if their pixels take at most MEMORY_LIMIT bytes.

    Raises:
        UnreadableImageError: an image cannot be read and data.on_unreadable is "raise".
        ValueError: none can be read.
    """
    channels, height, width = data.stored_shape
    small = len(data) * channels * height * width <= MEMORY_LIMIT
    if not (small if in_memory is None else in_memory):
        return data
    pixels = torch.empty((len(data), *data.stored_shape), dtype=torch.uint8)

    def read(index: int) -> str | None:
        try:
            pixels[index] = data.stored(index)
        except UnreadableImageError as error:
            if data.on_unreadable == "raise":
                raise
            return str(error)
        return None

    threads = min(4, os.cpu_count() or 1) if data.reader.parallel else 1
    with ThreadPoolExecutor(threads) as pool:
        errors = list(_ordered(pool, read, len(data)))
    return _without_errors(data, pixels, errors)


def _ordered(pool: ThreadPoolExecutor, read: Callable[[int], str | None], count: int) -> Iterable[str | None]:
    """What ``read`` gives for 0..count-1; handed out in blocks, so that an error ends the reading soon."""
    for start in range(0, count, 1024):
        yield from pool.map(read, range(start, min(count, start + 1024)))


def _without_errors(data: LazyImages, pixels: Tensor, errors: list[str | None]) -> ImageSet:
    """The images that could be read, with one warning about the rest."""
    bad = [error for error in errors if error is not None]
    expect(len(bad) < len(data), "data", f"at least one image that can be read in {data.name}", f"none: {bad[:1]}")
    labels, groups, official, attributes = data.labels, data.groups, data.official, data.attributes
    if bad:
        good = torch.tensor([error is None for error in errors])
        pixels, labels = pixels[good], None if labels is None else labels[good]
        groups = tuple(group for group, error in zip(groups, errors, strict=False) if error is None)
        attributes = None if attributes is None else attributes.at(good)
        if official is not None:
            moved = good.cumsum(0) - 1
            official = (moved[official[0][good[official[0]]]], moved[official[1][good[official[1]]]])
            empty = min(len(side) for side in official) == 0
            expect(not empty, "data", f"images that can be read in both splits of {data.name}", f"none: {bad[0]}")
        text = f"{len(bad)} of {len(data)} images of {data.name} could not be read and were left out; the first: "
        warnings.warn(visible(text + bad[0]), stacklevel=2)
    return ImageSet(
        data.name, pixels, data.n_bins, labels, data.class_names, groups, official, data.augmentation, attributes
    )


@dataclass(frozen=True)
class Listing:
    """What a source says of its images before any is read; the fields are those of :class:`Images`."""

    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    official: tuple[Tensor, Tensor] | None = None
    attributes: Attributes | None = None


def from_files(name: str, root: Path, names: Sequence[str], preparation: Preparation, listing: Listing) -> Images:
    """Makes a set of the image files ``names`` below ``root``, prepared as ``preparation`` says, read now or later.

    Raises:
        ValueError: a file is not there; or, where they are read now, cannot be read.
    """
    reader = FileReader(root, names, preparation.stored_side, preparation.gray)
    return from_reader(name, reader, reader.identity(), preparation, listing)


def from_reader(name: str, reader: Reader, identity: str, preparation: Preparation, listing: Listing) -> Images:
    """Makes a set of the images of a reader that gives preparation.stored_shape; see :func:`from_files`."""
    lazy = LazyImages(
        name,
        reader,
        preparation.stored_shape,
        preparation.n_bins,
        identity,
        listing.labels,
        listing.class_names,
        listing.groups,
        listing.official,
        preparation.augmentation,
        preparation.on_unreadable,
        attributes=listing.attributes,
    )
    return kept(lazy, preparation.in_memory)
