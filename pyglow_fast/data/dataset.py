"""Makes any map-style torch Dataset a source of images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.data._optional import optional
from pyglow_fast.data.decode import UnreadableImageError, pixels, plain, to_square
from pyglow_fast.data.image_set import Images, ImageSet
from pyglow_fast.data.lazy import LazyImages, kept
from pyglow_fast.data.prepare import Preparation, luma

_LOOKED_AT = 16  # images that go into the fingerprint of a set that is not read into memory


def _values(image: Any, where: str, gray: bool) -> Tensor:
    """A PIL image, tensor or array as uint8 (C, H, W).

    Raises:
        ValueError: it is none of these.
    """
    if hasattr(image, "getbands"):
        # A dataset of grey PIL images stays grey.
        return pixels(plain(image, gray or image.mode in ("L", "1", "I;16")))
    expected = f"{where}: expected a PIL image, or a uint8 tensor or array (C, H, W) or (H, W), found "
    if not isinstance(image, Tensor):
        if not hasattr(image, "__array_interface__"):
            raise ValueError(expected + type(image).__name__)
        image = torch.from_numpy(optional("numpy", "arrays").array(image))
    if image.dtype != torch.uint8 or image.dim() not in (2, 3):
        raise ValueError(expected + f"{image.dtype} {tuple(image.shape)}")
    image = image.unsqueeze(0) if image.dim() == 2 else image
    if gray and image.shape[0] != 1:
        expect(image.shape[0] == 3, where, "1 or 3 channels to make gray", tuple(image.shape))
        image = luma(image.unsqueeze(0))[0]
    return image.contiguous()


def _scaled(values: Tensor, side: int, where: str) -> Tensor:
    """The centred square of uint8 (C, H, W), scaled down to (C, side, side)."""
    if values.shape[1:] == (side, side):
        return values
    expect(values.shape[0] in (1, 3), where, "1 or 3 channels to scale", tuple(values.shape))
    array = values[0].numpy() if values.shape[0] == 1 else values.permute(1, 2, 0).numpy()
    return pixels(to_square(optional("PIL.Image", "to scale images").fromarray(array), side, where))


@dataclass(frozen=True)
class _DatasetReader:
    dataset: Any
    name: str
    side: int | None  # None: as they are, all of one shape
    gray: bool
    shape: tuple[int, ...] = ()
    parallel: bool = False  # nothing says that a Dataset may be used by several threads
    seen: dict[int, Any] = field(default_factory=dict, compare=False, repr=False)  # the labels of what was read

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> Tensor:
        """Reads one image, uint8 (C, H, W)."""
        where = f"{self.name}[{index}]"
        try:
            item = self.dataset[index]
        except Exception as error:  # whatever it raises, this image cannot be had
            raise UnreadableImageError(f"{where}: expected an image, found {type(error).__name__}: {error}") from error
        labelled = isinstance(item, tuple | list)
        values = _values(item[0] if labelled else item, where, self.gray)
        values = values if self.side is None else _scaled(values, self.side, where)
        fits = not self.shape or tuple(values.shape) == self.shape
        expect(fits, where, f"the shape of the first image, {self.shape} (or a size to scale to)", tuple(values.shape))
        self.seen[index] = item[1] if labelled and len(item) > 1 else None
        return values

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "seen": {}}

    def identity(self) -> str:
        """Makes a digest of the name, the length and a few images spread over the set."""
        count = len(self)
        digest = hashlib.sha256(f"{self.name} {count} {self.side} {self.gray}".encode())
        for i in range(min(count, _LOOKED_AT)):
            try:
                digest.update(self.read(i * count // min(count, _LOOKED_AT)).numpy().data)
            except UnreadableImageError:
                digest.update(b"unreadable")
        return digest.hexdigest()


def _classes(labels: Sequence[Any] | None, dataset: Any, name: str) -> tuple[Tensor | None, tuple[str, ...]]:
    """(labels, class names); the names are dataset.classes where there are enough, else numbers."""
    if labels is None:
        return None, ()
    values = torch.as_tensor(labels)
    whole = values.dim() == 1 and not values.is_floating_point() and values.dtype != torch.bool
    expect(whole, name, "one whole number an image as labels", f"{values.dtype} {tuple(values.shape)}")
    low, high = int(values.min()), int(values.max())
    expect(low >= 0, name, "labels of 0 or more", low)
    names = getattr(dataset, "classes", None)
    if not (isinstance(names, list | tuple) and len(names) > high):
        names = range(high + 1)
    return values.long(), tuple(str(word) for word in names)


def from_dataset(
    dataset: Any,
    name: str,
    n_bits: int = 8,
    size: int | None = None,
    gray: bool = False,
    crop_margin: int = 0,
    flip: bool = False,
    labels: Sequence[int] | None = None,
    on_unreadable: str = "raise",
    in_memory: bool | None = None,
) -> Images:
    """Takes the images of a map-style Dataset whose items are an image or (image, label, ...).

    An image is a PIL image, or a uint8 tensor or array (C, H, W) or (H, W). What the Dataset draws at random it would
    draw anew each time: give it no random transforms, use ``crop_margin`` and ``flip``.

    Args:
        dataset: has ``__len__`` and ``__getitem__``; where it is read later it goes to worker processes.
        name: what to call it.
        n_bits: 1..8; the lower bits are dropped, so n_bins = 2^n_bits.
        size: side of the square that each image is cropped and scaled to, plus crop_margin. None: they stay as they
            are, all of one shape, and what the model sees is crop_margin smaller.
        gray: one channel.
        crop_margin: training sees a random window of images that are so many pixels larger.
        flip: training sees half of the images mirrored.
        labels: one an image. None: dataset.targets; without it those of the items if they are read into memory, and
            otherwise none, since every image would have to be read to know them.
        on_unreadable: "raise" when an item raises an exception or is smaller than ``size``, or "skip" it.
        in_memory: read all of them now (True) or each when it is used (False); None: now if they take up to 1 GiB.

    Raises:
        ValueError: no images, an item that is no image or has another shape, or labels that do not fit.
    """
    for method in ("__len__", "__getitem__"):
        expect(hasattr(dataset, method), "dataset", f"a map-style Dataset ({method})", type(dataset).__name__)
    preparation = Preparation(size, gray, n_bits, crop_margin, flip, on_unreadable, in_memory)
    expect(len(dataset) > 0, "dataset", "at least one image", f"none in {name}")
    side = None if size is None else size + crop_margin
    reader = _DatasetReader(dataset, name, side, gray)
    channels, height, width = _first(reader, on_unreadable).shape
    shape = (int(channels), int(height), int(width))
    expect(crop_margin < min(height, width), "crop_margin", f"less than the sides {shape[1:]}", crop_margin)
    reader = replace(reader, shape=shape, seen={})
    given = labels if labels is not None else getattr(dataset, "targets", None)
    known, classes = _classes(given, dataset, name)
    lazy = LazyImages(
        name,
        reader,
        shape,
        preparation.n_bins,
        reader.identity(),
        known,
        classes,
        augmentation=preparation.augmentation,
        on_unreadable=on_unreadable,
    )
    data = kept(lazy, in_memory)
    seen = [label for _, label in sorted(reader.seen.items())]
    if isinstance(data, ImageSet) and known is None and all(label is not None for label in seen):
        known, classes = _classes(seen, dataset, name)
        data = replace(data, labels=known, class_names=classes)
    return data


def _first(reader: _DatasetReader, on_unreadable: str) -> Tensor:
    """The first image that can be read."""
    for index in range(len(reader) - 1):
        try:
            return reader.read(index)
        except UnreadableImageError:
            if on_unreadable == "raise":
                raise
    return reader.read(len(reader) - 1)
