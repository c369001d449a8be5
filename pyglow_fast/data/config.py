"""Says which images to load and how they are prepared: DataConfig, and the table of sources."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import NamedTuple

from pyglow_fast._core.errors import expect, visible
from pyglow_fast._core.settings import IMAGES, Range, check_settings, setting, settings
from pyglow_fast.data.image_set import DEFAULT_HELD_OUT, HELD_OUT, Augmentation

FILE_SIZE = 32  # the side that files are scaled to where none is asked for
_PIXELS = "more pixels are a slip of the pen"
_MOST = 1 << 20
_images = functools.partial(setting, group=IMAGES)


class Source(NamedTuple):
    """The facts that DataConfig must know of a source of images."""

    options: tuple[str, ...]  # the fields of DataConfig that mean something to it, beside the name and held_out
    path: str = "optional"  # what follows the name: "needed", "optional" (else the copy that was fetched) or "none"
    side: int | None = None  # of its images, if they have one size; a larger size is padded with zeros


_VIEWS = ("size", "crop_margin", "flip")
_ARRAYS = (*_VIEWS, "gray", "n_bits")
_FILES = (*_ARRAYS, "on_unreadable", "in_memory", "fit", "background", "enlarge")

SOURCES: dict[str, Source] = {
    "digits": Source(_VIEWS, "none", side=8),
    "emoji-small": Source((*_VIEWS, "n_bits"), "none", side=32),
    "mnist": Source(_ARRAYS, side=28),
    "fashion-mnist": Source(_ARRAYS, side=28),
    "emoji": Source(_FILES),
    "emoji-google": Source(_FILES),
    "photos": Source((*_ARRAYS, "scale")),
    "cifar10": Source(_ARRAYS, side=32),
    "celeba": Source((*_FILES, "attribute")),
    "imagenet": Source(_FILES, "needed"),
    "folder": Source((*_FILES, "split_by"), "needed"),
}


_PATHS = {"none": "", "optional": "[:PATH]", "needed": ":PATH"}
_FORMS = [name + _PATHS[source.path] for name, source in SOURCES.items()]
DATA_HELP = f"{', '.join(_FORMS[:-1])} or {_FORMS[-1]}"


@settings
@dataclass(frozen=True)
class DataConfig:
    """Says which images to load, and how they are prepared; a source takes only options that mean something to it.

    >>> from pyglow_fast.data import DataConfig, load_data
    >>> load_data(DataConfig("digits", size=16)).image_shape
    (1, 16, 16)

    An unknown name, a value outside its range and an option that the source does not take are a ValueError.
    """

    name: str = setting("digits", "one of SOURCES, with :PATH where it takes one", expected="a name of docs/data.md")
    size: int | None = _images(
        None,
        "side of the square that the model sees: files are cropped and scaled to it, smaller images of a fixed size "
        "padded with zeros",
        range=Range(least=1, most=_MOST, why=_PIXELS),
        absent=f"{FILE_SIZE} for files, their own for images of a fixed size",
    )
    gray: bool = _images(False, "one channel, the luma of ITU-R 601", other=("--color", "three channels"))
    n_bits: int | None = _images(
        None,
        "bits kept of each sample, n_bins = 2^n_bits grey levels; the lower bits are dropped",
        range=Range(least=1, most=8),
        absent="8; the digits have 17 grey levels",
    )
    split_by: str = _images("file", "what a random split keeps together: file or folder", choices=("file", "folder"))
    held_out: float | None = _images(
        None,
        "fraction of the images held out, drawn at random",
        range=HELD_OUT,
        absent=f"the source's own split where it has one, else {DEFAULT_HELD_OUT:g}",
    )
    crop_margin: int = _images(
        0,
        "images are kept with sides so many pixels longer, and training sees a random window",
        range=Range(least=0, most=_MOST, why=_PIXELS),
    )
    flip: bool = _images(False, "training sees half of the images mirrored, left to right")
    scale: int | None = _images(
        None,
        "photos alone: whole factor by which they are shrunk before they are cut into tiles",
        range=Range(least=1, most=_MOST, why="a larger factor is a slip of the pen"),
        absent="by the size: 4 up to 64, 2 up to 256, else 1",
    )
    attribute: str | None = _images(None, "celeba alone: the attribute that makes two classes")
    fit: str = _images(
        "crop",
        "how a file becomes a square: its centre cut out (crop), the background around it (pad), or stretched",
        choices=("crop", "pad", "stretch"),
    )
    background: str = _images(
        "white", "what transparent pixels are laid on, and what pad surrounds with", choices=("white", "grey", "black")
    )
    enlarge: bool = _images(True, "files smaller than the square are enlarged; else they count as unreadable")
    on_unreadable: str = _images(
        "raise",
        "raise on an image file that cannot be read, or skip it; training --from-files takes another",
        choices=("raise", "skip"),
        adjustable=True,
    )
    in_memory: bool | None = _images(
        None,
        "read all images at the start and keep them in memory",
        absent="if they take at most 1 GiB",
        other=("--from-files", "read them when they are needed"),
    )

    def __post_init__(self) -> None:
        scheme, colon, path = self.name.partition(":") if isinstance(self.name, str) else ("", "", "")
        source = SOURCES.get(scheme)
        if source is None or (path == "" if colon else source.path == "needed") or (colon and source.path == "none"):
            raise ValueError(visible(f"data: expected {DATA_HELP}, found {self.name!r}"))
        check_settings(self)
        for option in fields(self):
            value = getattr(self, option.name)
            fits = option.name in ("name", "held_out", *source.options) or value == option.default
            expect(fits, option.name, f"no such option for {scheme} (it takes {', '.join(source.options)})", value)
        if source.side is not None:
            padded = f"at least {source.side}, the side of the images of {scheme}"
            found = f"{self.size}: they are padded, never cut or scaled"
            expect(self.size is None or self.size >= source.side, "size", padded, found)

    @property
    def scheme(self) -> str:
        """The key of SOURCES that the name begins with."""
        return self.name.partition(":")[0]

    @property
    def side(self) -> int:
        """The side of the images as they are kept, with their margin."""
        own = SOURCES[self.scheme].side or FILE_SIZE
        return (own if self.size is None else self.size) + self.crop_margin

    @property
    def n_bins(self) -> int:
        """The number of grey levels that 8-bit images get, 2^n_bits."""
        return 1 << (8 if self.n_bits is None else self.n_bits)

    @property
    def augmentation(self) -> Augmentation:
        """The way in which the views that training sees are cut."""
        return Augmentation(self.crop_margin, self.flip)
