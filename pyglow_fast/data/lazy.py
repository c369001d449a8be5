"""Images that are read when they are asked for: of files or of any torch Dataset; in memory where they fit."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyglow_fast._core.errors import expect, visible
from pyglow_fast.data.config import DataConfig
from pyglow_fast.data.files import UnreadableImageError, as_values, decode, to_square
from pyglow_fast.data.files import pixels as pixels_of
from pyglow_fast.data.image_set import Images, ImageSet

MEMORY_LIMIT = 1 << 30  # bytes of pixels up to which a set is kept in memory unless told otherwise
_BLOCK = 1024  # images that are handed out to threads at a time, so that an error ends the reading soon
NAMED = 3  # enlarged images that are named
_LOOKED_AT = 16  # images that go into the fingerprint of a Dataset that is not read into memory


@dataclass(frozen=True)
class FileReader:
    """A Dataset of the image files ``names`` below ``root`` as squares, as ``config`` says; ``small`` were enlarged."""

    root: Path
    names: Sequence[str]
    config: DataConfig
    small: set[str] = field(default_factory=set, compare=False)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        config, name = self.config, self.names[index]
        path = self.root / name
        image = decode(path, str(path), config.gray, background=config.background)
        if min(image.size) < config.side:
            self.small.add(name)
        return pixels_of(to_square(image, config.side, str(path), config))

    def identity(self) -> str:
        """Makes a digest of the names and sizes of all files, each of which must be there."""
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
    """A set of images of a map-style Dataset, each read whenever it is asked for; see :class:`Images`."""

    pixels: Any  # the Dataset, whose items are an image or (image, label, ...); it goes to worker processes
    stored_shape: tuple[int, ...] = ()  # (C, H, W) that each image must have; empty: any
    positions: Tensor | None = None  # int64 (N,), which of its items these are; None: all
    on_unreadable: str = "raise"  # or "skip": what without_skipped() does about images that cannot be read
    identity: str = ""  # what :func:`_identity` makes of the Dataset; the fingerprint is made of it and of the settings

    def __len__(self) -> int:
        return len(self.pixels) if self.positions is None else len(self.positions)

    def position(self, index: int) -> int:
        """Says which item of the Dataset image ``index`` is."""
        return index if self.positions is None else int(self.positions[index])

    def read(self, index: int) -> tuple[Tensor, Any]:
        """Reads one image, uint8 (C, H, W), and its label, or None; whatever its Dataset raises, it is unreadable."""
        where = f"{self.name}[{self.position(index)}]"
        try:
            item = self.pixels[self.position(index)]
        except UnreadableImageError:
            raise
        except Exception as error:
            raise UnreadableImageError(f"{where}: expected an image, found {type(error).__name__}: {error}") from error
        image, *rest = item if isinstance(item, tuple | list) else (item,)
        values = as_values(image, where)
        fits = self.stored_shape in ((), tuple(values.shape))
        expect(fits, where, f"the shape of the first image, {self.stored_shape}", tuple(values.shape))
        return values >> (9 - self.n_bins.bit_length()), rest[0] if rest else None

    def item(self, index: int, key: int | None = None) -> Tensor:
        """Reads one image as uint8 (C, H, W): the central window, or with a key the view that it decides."""
        return self.augmentation.view(self.read(index)[0], key)

    def without_skipped(self, indices: Tensor) -> Tensor:
        """Leaves out what cannot be read, if it is to be skipped; if nothing can be, all stay for batch() to refuse."""
        kept: list[int] = []
        for index in indices.tolist() if self.on_unreadable == "skip" else ():
            with suppress(UnreadableImageError):
                self.read(index)
                kept.append(index)
        return torch.tensor(kept) if kept else indices

    def _at(self, index: Tensor) -> dict[str, Any]:
        return {"positions": index if self.positions is None else self.positions[index]}

    def fingerprint(self) -> str:
        """Makes a digest of all settings and ``identity`` (for files: relative names and sizes, not contents)."""
        chosen = () if self.positions is None else (self.positions,)
        return self.digest(f"{self.stored_shape} {self.n_bins} {self.class_names} {self.identity}", *chosen)


def _identity(data: LazyImages) -> str:
    """A digest that changes when the images do: the Dataset's own, or of a few images spread over it."""
    if hasattr(data.pixels, "identity"):
        return str(data.pixels.identity())
    count = len(data)
    digest = hashlib.sha256(f"{data.name} {count}".encode())
    for i in range(min(count, _LOOKED_AT)):
        try:
            digest.update(data.read(i * count // min(count, _LOOKED_AT))[0].numpy().data)
        except UnreadableImageError:
            digest.update(b"unreadable")
    return digest.hexdigest()


def readable(data: Images, index: int, key: int | None, on_unreadable: str) -> tuple[Tensor, int]:
    """Reads a view of image ``index``, or with "skip" of the next that can be read; gives it and the index it has."""
    first: UnreadableImageError | None = None
    for step in range(len(data)):
        at = (index + step) % len(data)
        try:
            return data.item(at, key), at
        except UnreadableImageError as error:
            if on_unreadable == "raise":
                raise
            first = first or error
    raise UnreadableImageError(f"data: expected an image that can be read in {data.name}, found none: {first}")


def _in_memory(data: LazyImages) -> ImageSet:
    """The same set with its images in memory, but for those that are to be skipped; a warning counts these."""
    pixels = torch.empty(len(data), *data.stored_shape, dtype=torch.uint8)
    labels: list[Any] = [None] * len(data)

    def read(index: int) -> None:
        try:
            pixels[index], labels[index] = data.read(index)
        except UnreadableImageError as error:
            if data.on_unreadable == "raise":
                raise
            errors[index] = str(error)

    errors: dict[int, str] = {}
    # Decoding releases the GIL; nothing says that another Dataset may be used by several threads.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1) if isinstance(data.pixels, FileReader) else 1) as pool:
        for start in range(0, len(data), _BLOCK):
            list(pool.map(read, range(start, min(len(data), start + _BLOCK))))
    official = data.official
    if isinstance(data.pixels, FileReader) and (small := sorted(data.pixels.small)):
        side = data.pixels.config.side
        text = f"{len(small)} of {len(data)} images of {data.name} are smaller than {side}x{side} and enlarged"
        warnings.warn(visible(f"{text}, such as {', '.join(small[:NAMED])} (--no-enlarge refuses them)"), stacklevel=2)
    if errors:
        text = f"{len(errors)} of {len(data)} images of {data.name}; the first: {errors[min(errors)]}"
        kept = torch.tensor([index for index in range(len(data)) if index not in errors], dtype=torch.int64)
        if official is not None:
            train, test = (torch.searchsorted(kept, side[torch.isin(side, kept)]) for side in official)
            official = train, test
        some = min(map(len, official or (kept,))) > 0
        expect(some, "data", "images that can be read, in both parts of a split", f"unreadable {text}")
        pixels, labels, data = pixels[kept], [labels[index] for index in kept.tolist()], data.subset(kept)
        warnings.warn(visible(f"unreadable images are left out: {text}"), stacklevel=2)
    known = (data.labels, data.class_names)
    if data.labels is None and None not in labels:
        known = _classes(labels, data.pixels, data.name)
    return ImageSet(data.name, pixels, data.n_bins, *known, data.groups, official, data.augmentation, data.attributes)


def images_of(name: str, dataset: Any, config: DataConfig, image_shape: tuple[int, ...] = (), **facts: Any) -> Images:
    """Makes a set of a Dataset's images, read now or later; an empty shape is the first image's."""
    data = LazyImages(name, dataset, config.n_bins, stored_shape=image_shape, **facts)
    shape = image_shape or tuple(readable(data, 0, None, config.on_unreadable)[0].shape)
    data = replace(data, stored_shape=shape, augmentation=config.augmentation, on_unreadable=config.on_unreadable)
    expect(min(data.image_shape) > 0, "crop_margin", f"less than the sides {shape[1:]}", config.crop_margin)
    small = len(data) * math.prod(shape) <= MEMORY_LIMIT
    if small if config.in_memory is None else config.in_memory:
        return _in_memory(data)
    return replace(data, identity=_identity(data))


def from_files(name: str, root: Path, names: Sequence[str], config: DataConfig, **facts: Any) -> Images:
    """Makes a set of the image files ``names`` below ``root``; see :func:`images_of`."""
    reader = FileReader(root, names, config)
    return images_of(name, reader, config, (1 if config.gray else 3, config.side, config.side), **facts)


def _classes(labels: Sequence[Any], dataset: Any, name: str) -> tuple[Tensor, tuple[str, ...]]:
    """(labels, class names); the names are dataset.classes where there are enough, else numbers."""
    values = torch.as_tensor(labels)
    whole = values.dim() == 1 and not values.is_floating_point() and values.dtype != torch.bool
    expect(whole, name, "one whole number an image as labels", f"{values.dtype} {tuple(values.shape)}")
    names = getattr(dataset, "classes", None)
    if not (isinstance(names, list | tuple) and len(names) > int(values.max())):
        names = range(int(values.max()) + 1)
    return values.long(), tuple(str(word) for word in names)


def from_dataset(
    dataset: Any,
    name: str,
    n_bits: int = 8,
    crop_margin: int = 0,
    flip: bool = False,
    labels: Sequence[int] | None = None,
    on_unreadable: str = "raise",
    in_memory: bool | None = None,
) -> Images:
    """Takes the images of a map-style Dataset whose items are an image or (image, label, ...), all of one shape.

    An image is a PIL image, or a uint8 tensor or array (C, H, W) or (H, W). A transform of the Dataset may crop, scale
    or make grey. What it draws at random it would draw anew each time: use ``crop_margin`` and ``flip`` for that.

    Args:
        dataset: has ``__len__`` and ``__getitem__``; where it is read later it goes to worker processes.
        name: what to call it.
        n_bits, flip: as in DataConfig.
        crop_margin: training sees a random window whose sides are so much shorter, and the rest the central one.
        labels: one an image. None: dataset.targets, else those of the items if they are read into memory.
        on_unreadable: "raise" when an item raises an exception, or "skip" it.
        in_memory: read all of them now (True) or each when it is used (False); None: now if they take up to 1 GiB.
    """
    for method in ("__len__", "__getitem__"):
        expect(hasattr(dataset, method), "dataset", f"a map-style Dataset ({method})", type(dataset).__name__)
    expect(len(dataset) > 0, "dataset", "at least one image", f"none in {name}")
    # The options are those of files in a folder.
    kinds: dict[str, Any] = {"crop_margin": crop_margin, "flip": flip, "on_unreadable": on_unreadable}
    config = DataConfig("folder:.", n_bits=n_bits, in_memory=in_memory, **kinds)
    given = labels if labels is not None else getattr(dataset, "targets", None)
    known, class_names = (None, ()) if given is None else _classes(given, dataset, name)
    return images_of(name, dataset, config, labels=known, class_names=class_names)
