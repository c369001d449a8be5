"""Defines what every data source gives: integer images, in memory or not, and how they are split."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from pyglow_fast._core.errors import check_count, expect
from pyglow_fast._core.settings import Range

DEFAULT_HELD_OUT = 0.1  # where nothing is asked for and the source has no split of its own
HELD_OUT = Range(above=0, below=1)


class Attributes(NamedTuple):
    """The attributes that each image has or has not: names, and a bool tensor (N, len(names))."""

    names: tuple[str, ...]
    has: Tensor


@dataclass(frozen=True)
class Augmentation:
    """Says how a training view is cut from a stored image; without a key the view is the central window as it is."""

    crop_margin: int = 0  # the sides of stored images are so many pixels longer, and training sees a random window
    flip: bool = False  # training sees half of the images mirrored, left to right

    def __post_init__(self) -> None:
        check_count("crop_margin", self.crop_margin, 0)

    def central(self, images: Tensor) -> Tensor:
        """Cuts the central windows out of images (..., H + margin, W + margin): a view (..., H, W)."""
        before, margin = self.crop_margin // 2, self.crop_margin
        height, width = images.shape[-2] - margin, images.shape[-1] - margin
        return images.narrow(-2, before, height).narrow(-1, before, width)

    def view(self, image: Tensor, key: int | None) -> Tensor:
        """Cuts one view, (C, H, W), out of a stored image; it is a function of the image and ``key`` alone."""
        if key is None:
            return self.central(image)
        # The window is drawn with or without a margin, so that the flip does not depend on whether there is one.
        draw, margin = torch.randint(1 << 30, (3,), generator=torch.Generator().manual_seed(key)), self.crop_margin
        top, left, side = (int(number) % count for number, count in zip(draw, (margin + 1, margin + 1, 2), strict=True))
        window = image[:, top : top + image.shape[1] - margin, left : left + image.shape[2] - margin]
        return window.flip(-1) if self.flip and side else window


@dataclass(frozen=True)
class Images(ABC):
    """A set of images as integer pixels, wherever they are kept; the base of what all sources give.

    Args:
        name: what the user calls it, such as ``digits``.
        pixels: a tensor (N, C, H, W), or what reads its images; with the margin of ``augmentation``.
        n_bins: number of grey levels, 2..256; every value is in 0..n_bins-1.
        labels: int64 (N,) in 0..len(class_names)-1, or None.
        class_names: one per class; empty without labels.
        groups: one key an image; images of one group (a photo's tiles, say) never part in :func:`split`.
        official: the source's own split as indices (train, test), or None.
        augmentation: what :meth:`item` draws for training.
        attributes: what each image has besides its class, or None; a fingerprint does not depend on it.
    """

    name: str
    pixels: Any
    n_bins: int
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    official: tuple[Tensor, Tensor] | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)
    attributes: Attributes | None = None

    def __post_init__(self) -> None:
        count = len(self)
        expect(count > 0, "pixels", "at least one image", f"none in {self.name}")
        expect(not self.groups or len(self.groups) == count, "groups", f"{count} keys", len(self.groups))
        if self.labels is not None:
            expect(self.labels.shape == (count,), "labels", f"shape ({count},)", tuple(self.labels.shape))
            low, high, last = int(self.labels.min()), int(self.labels.max()), len(self.class_names) - 1
            expect(low >= 0 and high <= last, "labels", f"values in 0..{last}", f"{low}..{high}")
        if self.attributes is not None:
            names, has = self.attributes
            fits = has.dtype == torch.bool and has.shape == (count, len(names))
            expected = f"a bool tensor of shape ({count}, {len(names)})"
            expect(fits, "attributes", expected, f"{has.dtype} {tuple(has.shape)}")

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape (C, H, W) of an image with its margin."""
        return tuple(self.pixels.shape[1:])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image as the model sees it."""
        channels, height, width = self.stored_shape
        return channels, height - self.augmentation.crop_margin, width - self.augmentation.crop_margin

    @property
    def n_dims(self) -> int:
        """The dimensions that bits/dim divides by: D = C*H*W."""
        return math.prod(self.image_shape)

    def item(self, index: int, key: int | None = None) -> Tensor:
        """Gives one image as uint8 (C, H, W): the central window, or with a key the view that it alone decides."""
        return self.augmentation.view(self.pixels[index], key)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gives (pixels uint8 (n, C, H, W), labels (n,) or None) at ``indices``: central windows, nothing random."""
        pixels = torch.stack([self.item(index) for index in indices.tolist()])
        return pixels, None if self.labels is None else self.labels[indices]

    def without_skipped(self, indices: Tensor) -> Tensor:
        """Leaves out of ``indices`` the images that cannot be read, where these are to be skipped; nothing here."""
        return indices

    @abstractmethod
    def fingerprint(self) -> str:
        """Makes a digest of everything a run depends on: a resumed run must see the same images in the same order."""

    def subset(self, indices: Tensor | Sequence[int]) -> Self:
        """Takes the images at ``indices``, in that order; they have no split of their own."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        return replace(
            self,
            labels=None if self.labels is None else self.labels[index],
            groups=tuple(self.groups[i] for i in index.tolist()) if self.groups else (),
            official=None,
            attributes=None if self.attributes is None else self.attributes._replace(has=self.attributes.has[index]),
            **self._at(index),
        )

    def _at(self, index: Tensor) -> dict[str, Any]:
        """The field that says which images these are, of the images at ``index``."""
        return {"pixels": self.pixels[index]}

    def digest(self, facts: str, *values: Tensor) -> str:
        """Makes the fingerprint of what is given and of the fields; those at their defaults add nothing."""
        digest = hashlib.sha256(facts.encode("utf-8", "surrogateescape"))
        for tensor in (*values, *(() if self.labels is None else (self.labels,))):
            digest.update(tensor.contiguous().numpy().data)
        digest.update("\0".join(self.groups).encode("utf-8", "surrogateescape"))
        if self.augmentation != Augmentation():
            digest.update(repr(self.augmentation).encode())
        for side in self.official or ():
            digest.update(b"official")
            digest.update(side.contiguous().numpy().data)
        return digest.hexdigest()[:32]


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

    ``pixels`` are uint8 (N, C, H, W); for the rest see :class:`Images`.
    """

    pixels: Tensor

    def __post_init__(self) -> None:
        pixels = self.pixels
        expect(2 <= self.n_bins <= 256, "n_bins", "a value in 2..256", self.n_bins)
        expect(pixels.dtype == torch.uint8, "pixels", "dtype uint8", pixels.dtype)
        expect(pixels.dim() == 4, "pixels", "shape (N, C, H, W)", tuple(pixels.shape))
        super().__post_init__()
        top, last = int(pixels.max()), self.n_bins - 1
        expect(top <= last, "pixels", f"values in 0..{last} (n_bins={self.n_bins})", f"a value of {top}")
        margin = self.augmentation.crop_margin
        expect(margin < min(pixels.shape[2:]), "pixels", f"sides above the margin of {margin}", tuple(pixels.shape))

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gives (pixels uint8 (n, C, H, W), labels (n,) or None) at ``indices``: central windows, nothing random."""
        return self.augmentation.central(self.pixels)[indices], None if self.labels is None else self.labels[indices]

    def fingerprint(self) -> str:
        """Makes a digest of every pixel, label and setting."""
        return self.digest(f"{tuple(self.pixels.shape)} {self.n_bins} {self.class_names}", self.pixels)


def split(data: Images, held_out: float | None, seed: int) -> tuple[Tensor, Tensor]:
    """Draws what is held out: sorted indices (train, held-out), whole groups at a time until they reach the fraction.

    Where ``held_out`` is None, the source's own split counts, if there is one, else 0.1. The same data and seed give
    the same split everywhere.
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
    sizes = Counter(keys)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted, count = max(1, round(held_out * len(data))), 0
    held: set[str] = set()
    for position in order[:-1]:  # the last group is never held out, so there is always something to train on
        if count >= wanted:
            break
        held.add(names[position])
        count += sizes[names[position]]
    chosen = torch.tensor([key in held for key in keys])
    return torch.nonzero(~chosen).flatten(), torch.nonzero(chosen).flatten()
