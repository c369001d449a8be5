"""Defines what every data source gives: integer images, in memory or not, and how they are split."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast._settings import Range
from pyglow_fast.data.augment import Augmentation

DEFAULT_HELD_OUT = 0.1  # where nothing is asked for and the source has no split of its own
HELD_OUT = Range(above=0, below=1)


class Attributes(NamedTuple):
    """What each image has or has not, besides its class: names, and a bool tensor (N, len(names)).

    >>> import torch
    >>> from pyglow_fast.data import Attributes
    >>> attributes = Attributes(("smiling",), torch.tensor([[True], [False]]))
    >>> attributes.at(torch.tensor([1])).has.tolist()
    [[False]]
    """

    names: tuple[str, ...]
    has: Tensor

    def at(self, index: Tensor) -> Attributes:
        """Gives the rows of the images at ``index``."""
        return Attributes(self.names, self.has[index])


class Images(ABC):
    """A set of images as integer pixels, wherever they are kept; the base of what all sources give.

    >>> import torch
    >>> from pyglow_fast.data import Images, ImageSet, split
    >>> data = ImageSet("squares", torch.zeros(10, 3, 4, 4, dtype=torch.uint8), n_bins=256)
    >>> isinstance(data, Images), len(data), data.image_shape, data.n_dims
    (True, 10, (3, 4, 4), 48)
    >>> train, held_out = split(data, 0.2, seed=0)
    >>> len(data.subset(train)), len(data.subset(held_out))
    (8, 2)

    Attributes:
        name: what the user calls it, such as ``digits``.
        n_bins: number of grey levels, 2..256; every value is in 0..n_bins-1.
        labels: int64 (N,) in 0..len(class_names)-1, or None.
        class_names: one per class; empty without labels.
        groups: one key an image; images of one group (a photo's tiles, say) never part in :func:`split`. Empty: each
            image is its own group.
        official: the source's own split as indices (train, test), or None.
        augmentation: what :meth:`item` draws for training.
        attributes: what each image has besides its class, or None; a fingerprint does not depend on it.
    """

    name: str
    n_bins: int
    labels: Tensor | None
    class_names: tuple[str, ...]
    groups: tuple[str, ...]
    official: tuple[Tensor, Tensor] | None
    augmentation: Augmentation
    attributes: Attributes | None

    @abstractmethod
    def __len__(self) -> int:
        """Counts the images, N."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image as the model sees it."""

    @property
    def n_dims(self) -> int:
        """The dimensions that bits/dim divides by: D = C*H*W."""
        return math.prod(self.image_shape)

    @abstractmethod
    def subset(self, indices: Tensor | Sequence[int]) -> Images:
        """Takes the images at ``indices``, in that order; they have no split of their own."""

    @abstractmethod
    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gives (pixels uint8 (n, C, H, W), labels (n,) or None) at ``indices``: central windows, nothing random."""

    @abstractmethod
    def item(self, index: int, key: int | None = None) -> Tensor:
        """Gives one image as uint8 (C, H, W).

        Args:
            index: 0..N-1.
            key: None for the central window, as in :meth:`batch`; otherwise the training view that this number alone
                decides, the same in every process.

        Raises:
            UnreadableImageError: it lies in a file that cannot be read.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Makes a digest of everything a run depends on: a resumed run must see the same images in the same order."""


def check_labels(labels: Tensor | None, class_names: Sequence[str], count: int) -> None:
    """Refuse labels that are not one in 0..len(class_names)-1 an image.

    Raises:
        ValueError: they are not.
    """
    if labels is None:
        return
    expect(labels.shape == (count,), "labels", f"shape ({count},)", tuple(labels.shape))
    low, high, n = int(labels.min()), int(labels.max()), len(class_names)
    expect(low >= 0 and high < n, "labels", f"values in 0..{n - 1}", f"{low}..{high}")


def check_attributes(attributes: Attributes | None, count: int) -> None:
    """Refuse attributes that are not a bool (count, len(names)).

    Raises:
        ValueError: they are not.
    """
    if attributes is None:
        return
    names, has = attributes
    fits = has.dtype == torch.bool and has.shape == (count, len(names))
    found = f"{has.dtype} {tuple(has.shape)}"
    expect(fits, "attributes", f"a bool tensor of shape ({count}, {len(names)})", found)


def hash_parts(digest: hashlib._Hash, data: Images) -> None:
    """Add to a digest what is said of the images besides their pixels; fields at their defaults add nothing."""
    if data.labels is not None:
        digest.update(data.labels.contiguous().numpy().data)
    digest.update("\0".join(data.groups).encode("utf-8", "surrogateescape"))
    if not data.augmentation.is_plain:
        digest.update(repr(data.augmentation).encode())
    for side in data.official or ():
        digest.update(b"official")
        digest.update(side.contiguous().numpy().data)


@dataclass(frozen=True)
class ImageSet(Images):
    """A set of images that are all in memory.

    >>> import torch
    >>> from pyglow_fast.data import ImageSet
    >>> pixels = torch.tensor([0, 5, 16], dtype=torch.uint8).reshape(3, 1, 1, 1)
    >>> data = ImageSet("dots", pixels, n_bins=17, labels=torch.tensor([0, 1, 1]), class_names=("dark", "light"))
    >>> images, labels = data.batch(torch.tensor([2, 0]))
    >>> images.flatten().tolist(), labels.tolist()
    ([16, 0], [1, 0])

    Args:
        name: what the user calls it, such as ``digits``.
        pixels: uint8 (N, C, H, W), grey levels 0..n_bins-1; its sides are augmentation.crop_margin longer than those
            of image_shape.
        n_bins: number of grey levels, 2..256.
        labels: int64 (N,) in 0..len(class_names)-1, or None.
        class_names: one per class; empty without labels.
        groups: one key an image, or empty; see :class:`Images`.
        official: the source's own split as indices (train, test), or None.
        augmentation: what training sees of them.
        attributes: what each image has besides its class, or None.

    Raises:
        ValueError: wrong shape or dtype, a value outside 0..n_bins-1, or labels, groups or a margin that do not fit.
    """

    name: str
    pixels: Tensor
    n_bins: int
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    official: tuple[Tensor, Tensor] | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)
    attributes: Attributes | None = None

    def __post_init__(self) -> None:
        pixels = self.pixels
        expect(2 <= self.n_bins <= 256, "n_bins", "a value in 2..256", self.n_bins)
        expect(pixels.dtype == torch.uint8, "pixels", "dtype uint8", pixels.dtype)
        expect(pixels.dim() == 4, "pixels", "shape (N, C, H, W)", tuple(pixels.shape))
        expect(len(pixels) > 0, "pixels", "at least one image", tuple(pixels.shape))
        top = int(pixels.max())
        last = self.n_bins - 1
        expect(top <= last, "pixels", f"values in 0..{last} (n_bins={self.n_bins})", f"a value of {top}")
        margin = self.augmentation.crop_margin
        expect(margin < min(pixels.shape[2:]), "pixels", f"sides above the margin of {margin}", tuple(pixels.shape))
        expect(not self.groups or len(self.groups) == len(pixels), "groups", f"{len(pixels)} keys", len(self.groups))
        check_labels(self.labels, self.class_names, len(pixels))
        check_attributes(self.attributes, len(pixels))

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image as the model sees it."""
        channels, height, width = self.central.shape[1:]
        return channels, height, width

    @property
    def central(self) -> Tensor:
        """What :meth:`batch` gives of all images, uint8 (N, C, H, W): a view of ``pixels``, not a copy."""
        return self.augmentation.central(self.pixels)

    def subset(self, indices: Tensor | Sequence[int]) -> ImageSet:
        """Takes the images at ``indices``, in that order; they have no split of their own."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        labels = None if self.labels is None else self.labels[index]
        groups = tuple(self.groups[i] for i in index.tolist()) if self.groups else ()
        had = None if self.attributes is None else self.attributes.at(index)
        return replace(self, pixels=self.pixels[index], labels=labels, groups=groups, official=None, attributes=had)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gives (pixels uint8 (n, C, H, W), labels (n,) or None) at ``indices``: central windows, nothing random."""
        return self.central[indices], None if self.labels is None else self.labels[indices]

    def item(self, index: int, key: int | None = None) -> Tensor:
        """Gives one image as uint8 (C, H, W); see :meth:`Images.item`."""
        return self.augmentation.view(self.pixels[index], key)

    def fingerprint(self) -> str:
        """Makes a digest of every pixel, label and setting."""
        digest = hashlib.sha256(f"{tuple(self.pixels.shape)} {self.n_bins} {self.class_names}".encode())
        digest.update(self.pixels.contiguous().numpy().data)
        hash_parts(digest, self)
        return digest.hexdigest()[:32]


def split(data: Images, held_out: float | None, seed: int) -> tuple[Tensor, Tensor]:
    """Draws what is held out: sorted indices (train, held-out), whole groups at a time until they reach the fraction.

    Args:
        data: the images.
        held_out: fraction of the images to hold out, in (0, 1). None: the source's own split where it has one, whose
            test images are held out and whose other images are in neither side; elsewhere as 0.1.
        seed: of the draw; the same data and seed give the same split everywhere.

    Raises:
        ValueError: a fraction outside (0, 1), or fewer than two groups, so that one side would be empty.
    """
    if held_out is None:
        if data.official is not None:
            train, test = data.official
            return train.sort().values, test.sort().values
        held_out = DEFAULT_HELD_OUT
    HELD_OUT.check("held_out", held_out, or_none=", or none")
    keys = data.groups or tuple(str(i) for i in range(len(data)))
    names = sorted(set(keys))
    expect(len(names) >= 2, "data", "at least 2 images (or groups of images) to hold some out", len(names))
    members: dict[str, list[int]] = {name: [] for name in names}
    for i, key in enumerate(keys):
        members[key].append(i)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = max(1, round(held_out * len(data)))
    held: list[int] = []
    for position in order[:-1]:  # the last group is never held out, so there is always something to train on
        if len(held) >= wanted:
            break
        held += members[names[position]]
    chosen = torch.zeros(len(data), dtype=torch.bool)
    chosen[held] = True
    return torch.nonzero(~chosen).flatten(), torch.nonzero(chosen).flatten()
