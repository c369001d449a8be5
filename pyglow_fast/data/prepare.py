"""Brings the images of a source to what the model sees: the one place of the options that sources share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.data.augment import MOST, Augmentation

FILE_SIZE = 32  # the side that files are scaled to where none is asked for
ON_UNREADABLE = ("raise", "skip")
_LUMA = (19595, 38470, 7471)  # 65536 times 0.299, 0.587, 0.114 (ITU-R 601), as Pillow rounds them


def check_whole(name: str, value: object, expected: str) -> None:
    """Refuse what is not an int from 1 to MOST.

    Args:
        name: of the value.
        value: any.
        expected: what is said of other things than ints of 1 or more.

    Raises:
        ValueError: it is not.
    """
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    expect(whole, name, expected, value)
    expect(whole and value <= MOST, name, f"at most {MOST}", value)  # type: ignore[operator]


def check_on_unreadable(on_unreadable: str) -> None:
    """Refuse anything but "raise" and "skip".

    Raises:
        ValueError: it is neither.
    """
    expect(on_unreadable in ON_UNREADABLE, "on_unreadable", f"one of {ON_UNREADABLE}", repr(on_unreadable))


@dataclass(frozen=True)
class Preparation:
    """Says which size, colours, levels and views the images of a source get.

    >>> import torch
    >>> from pyglow_fast.data import Preparation
    >>> preparation = Preparation(size=4, gray=True, n_bits=3)
    >>> white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    >>> preparation.to_levels(preparation.fixed_size(white, "squares"))
    tensor([[[[0, 0, 0, 0],
              [0, 7, 7, 0],
              [0, 7, 7, 0],
              [0, 0, 0, 0]]]], dtype=torch.uint8)

    Args:
        size: side of the square that the model sees. None: that of the source, and FILE_SIZE for files.
        gray: one channel, the luma of ITU-R 601, rather than three.
        n_bits: 1..8; the lower bits are dropped, so n_bins = 2^n_bits.
        crop_margin: images are kept with sides so much longer; training sees a random window of ``size``.
        flip: training sees half of the images mirrored.
        on_unreadable: "raise" on a file that cannot be read, or "skip" it.
        in_memory: keep all images in memory; None: if they take at most 1 GiB.

    Raises:
        ValueError: a value outside its range.
    """

    size: int | None = None
    gray: bool = False
    n_bits: int = 8
    crop_margin: int = 0
    flip: bool = False
    on_unreadable: str = "raise"
    in_memory: bool | None = None

    def __post_init__(self) -> None:
        if self.size is not None:
            check_whole("size", self.size, "a positive number")
        expect(self.n_bits in range(1, 9), "n_bits", "a value in 1..8", self.n_bits)
        for name in ("gray", "flip"):
            expect(isinstance(getattr(self, name), bool), name, "True or False", repr(getattr(self, name)))
        chosen = self.in_memory is None or isinstance(self.in_memory, bool)
        expect(chosen, "in_memory", "True, False or None", repr(self.in_memory))
        check_on_unreadable(self.on_unreadable)
        self.augmentation  # noqa: B018 - checks the margin

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
        """The number of levels that 8-bit images get, 2^n_bits."""
        return 1 << self.n_bits

    def to_levels(self, values: Tensor) -> Tensor:
        """Turns 8-bit values into levels, in place."""
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


def levels_of(values: Tensor, n_bins: int) -> Tensor:
    """Computes v n_bins // 256 for 8-bit values v, uint8: :meth:`Preparation.to_levels` where n_bins = 2^n_bits.

    A level l that is shown as the value nearest to 255 l / (n_bins - 1) comes back as l, with the 17 levels of the
    digits too.
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
