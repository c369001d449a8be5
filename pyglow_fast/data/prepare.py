"""Brings the images of a source to what the model sees: the one place of the options that sources share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast._settings import IMAGES, Range, check_settings, same_setting, setting, settings
from pyglow_fast.data.augment import MOST, Augmentation

FILE_SIZE = 32  # the side that files are scaled to where none is asked for
ON_UNREADABLE = ("raise", "skip")
_LUMA = (19595, 38470, 7471)  # 65536 times 0.299, 0.587, 0.114 (ITU-R 601), as Pillow rounds them


SIDE = Range(least=1, most=MOST, why="more pixels are a slip of the pen")


@settings
@dataclass(frozen=True)
class Preparation:
    """Says which size, colours, grey levels and views the images of a source get.

    >>> import torch
    >>> from pyglow_fast.data import Preparation
    >>> preparation = Preparation(size=4, gray=True, n_bits=3)
    >>> white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    >>> preparation.to_pixels(preparation.fixed_size(white, "squares"))
    tensor([[[[0, 0, 0, 0],
              [0, 7, 7, 0],
              [0, 7, 7, 0],
              [0, 0, 0, 0]]]], dtype=torch.uint8)

    Raises:
        ValueError: a value outside its range.
    """

    size: int | None = setting(
        None,
        "side of the square that the model sees: files are cropped and scaled to it, smaller images of a fixed size "
        "padded with zeros",
        range=SIDE,
        absent=f"{FILE_SIZE} for files, their own for images of a fixed size",
        group=IMAGES,
    )
    gray: bool = setting(
        False,
        "one channel, the luma of ITU-R 601",
        group=IMAGES,
        other=("--color", "three channels"),
    )
    n_bits: int = setting(
        8,
        "bits kept of each sample, n_bins = 2^n_bits grey levels; the lower bits are dropped",
        range=Range(least=1, most=8),
        group=IMAGES,
    )
    crop_margin: int = same_setting(Augmentation, "crop_margin")
    flip: bool = same_setting(Augmentation, "flip")
    on_unreadable: str = setting(
        "raise",
        "raise on an image file that cannot be read, or skip it: another image is taken and it is counted",
        choices=ON_UNREADABLE,
        group=IMAGES,
        adjustable=True,
    )
    in_memory: bool | None = setting(
        None,
        "read all images at the start and keep them in memory",
        absent="if they take at most 1 GiB",
        group=IMAGES,
        other=("--from-files", "read them when they are needed"),
    )

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def augmentation(self) -> Augmentation:
        """How the views that training sees are cut."""
        return Augmentation(self.crop_margin, self.flip)

    @property
    def stored_side(self) -> int:
        """The side that files are scaled to."""
        return (FILE_SIZE if self.size is None else self.size) + self.crop_margin

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of a file's image as it is kept."""
        return (1 if self.gray else 3), self.stored_side, self.stored_side

    @property
    def n_bins(self) -> int:
        """The number of grey levels that 8-bit images get, 2^n_bits."""
        return 1 << self.n_bits

    def to_pixels(self, values: Tensor) -> Tensor:
        """Turns 8-bit values into grey levels 0..n_bins-1, in place."""
        return values.bitwise_right_shift_(8 - self.n_bits) if self.n_bits < 8 else values

    def fixed_size(self, values: Tensor, source: str) -> Tensor:
        """Gives images of one size, uint8 (N, C, H, W), the side and the channels asked for; pads with zeros evenly.

        Raises:
            ValueError: the size asked for is smaller than theirs.
        """
        if self.gray and values.shape[1] == 3:
            values = luma(values)
        own = values.shape[-1]
        side = (own if self.size is None else self.size) + self.crop_margin
        check_side(self.size, own, source)
        before = (side - own) // 2
        return torch.nn.functional.pad(values, (before, side - own - before) * 2) if side > own else values


def rebinned(values: Tensor, n_bins: int) -> Tensor:
    """Computes v n_bins // 256 for 8-bit values v, uint8: :meth:`Preparation.to_pixels` where n_bins = 2^n_bits.

    A grey level l that is shown as the value nearest to 255 l / (n_bins - 1) comes back as l, with the 17 of
    the digits too.
    """
    return (values.int() * n_bins // 256).to(torch.uint8)


def check_side(size: int | None, own: int, source: str) -> None:
    """Refuse a size that would have to cut into images of one fixed size.

    Raises:
        ValueError: ``size`` is below ``own``.
    """
    found = f"{size}: they are padded, never cut or scaled"
    expect(size is None or size >= own, "size", f"at least {own}, the side of the images of {source}", found)


def luma(values: Tensor) -> Tensor:
    """Turns RGB uint8 (N, 3, H, W) into grey (N, 1, H, W), rounded as Pillow's "L"."""
    grey = torch.empty_like(values[:, :1])
    for part, out in zip(values.split(4096), grey.split(4096), strict=True):  # so that the wide sums stay small
        red, green, blue = part.int().unbind(1)
        out[:, 0] = (red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2] + 0x8000) >> 16
    return grey
