"""Turns the words on a command line into images: the one table of data sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pyglow_fast._errors import expect, visible
from pyglow_fast.data.cache import cached
from pyglow_fast.data.celeba import load_celeba
from pyglow_fast.data.cifar import SIDE as CIFAR_SIDE
from pyglow_fast.data.cifar import load_cifar10
from pyglow_fast.data.digits import load_digits
from pyglow_fast.data.emoji import load_emoji
from pyglow_fast.data.folder import SPLIT_BY, load_folder
from pyglow_fast.data.idx import SIDE as IDX_SIDE
from pyglow_fast.data.idx import load_idx
from pyglow_fast.data.image_set import Images, check_held_out
from pyglow_fast.data.imagenet import load_imagenet
from pyglow_fast.data.lsun import load_lsun
from pyglow_fast.data.photos import load_photos
from pyglow_fast.data.prepare import FILE_SIZE, Preparation, check_side, check_whole


@dataclass(frozen=True)
class DataConfig:
    """Says which images to load, and how they are prepared.

    >>> from pyglow_fast.data import DataConfig, load_data
    >>> load_data(DataConfig("digits", size=16)).image_shape
    (1, 16, 16)

    Args:
        name: one of SOURCES, with ``:PATH`` where it takes one; DATA_HELP lists them.
        size: side of the square images (None: 32 for files, their own for images of a fixed size, which a larger size
            pads with zeros).
        gray: one channel; not for digits.
        n_bits: bits kept of each sample (None: 8); not for digits.
        split_by: "file" or "folder": what a held-out split keeps together; folders only.
        held_out: fraction of the images held out, drawn at random. None: the source's own split where it has one,
            otherwise 0.1.
        crop_margin: images are kept with sides so much longer; training sees a random window of ``size``.
        flip: training sees half of the images mirrored.
        scale: whole factor by which photos are shrunk before they are cut into tiles; photos only (None: by size).
        attribute: the CelebA attribute that gives two classes; celeba only.
        on_unreadable: "raise" on an image that cannot be read, or "skip" it; sources of files only.
        in_memory: whether all images are kept in memory (None: if they take at most 1 GiB); sources of files only, and
            not photos.

    Raises:
        ValueError: an unknown name, a value outside its range, or an option that the source does not take.
    """

    name: str = "digits"
    size: int | None = None
    gray: bool = False
    n_bits: int | None = None
    split_by: str = "file"
    held_out: float | None = None
    crop_margin: int = 0
    flip: bool = False
    scale: int | None = None
    attribute: str | None = None
    on_unreadable: str = "raise"
    in_memory: bool | None = None

    def __post_init__(self) -> None:
        scheme, colon, path = self.name.partition(":")
        source = SOURCES.get(scheme)
        if source is None or (path == "" if colon else source.path == "needed") or (colon and source.path == "none"):
            raise ValueError(visible(f"data: expected {DATA_HELP}, found {self.name!r}"))
        self.preparation()
        expect(self.split_by in SPLIT_BY, "split_by", f"one of {SPLIT_BY}", repr(self.split_by))
        if self.scale is not None:
            check_whole("scale", self.scale, "a whole factor, 1 or more")
        named = self.attribute is None or (isinstance(self.attribute, str) and self.attribute != "")
        expect(named, "attribute", "a name", repr(self.attribute))
        check_held_out(self.held_out)
        for option in fields(self):
            value = getattr(self, option.name)
            fits = option.name in ("name", "held_out", *source.options) or value == option.default
            expect(fits, option.name, f"no such option for {self.name} ({source.fixed})", value)
        if source.side is not None:
            check_side(self.size, source.side, scheme)

    def preparation(self) -> Preparation:
        """The options that all sources share.

        Raises:
            ValueError: a value outside its range.
        """
        n_bits = 8 if self.n_bits is None else self.n_bits
        views = (self.crop_margin, self.flip)
        return Preparation(self.size, self.gray, n_bits, *views, self.on_unreadable, self.in_memory)

    def to_dict(self) -> dict[str, Any]:
        """Gives the fields as a dict that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class _Source:
    load: Callable[[DataConfig, Path], Images]
    options: tuple[str, ...]
    path: str  # what follows the name: "needed", "optional" (else the cached copy) or "none"
    fixed: str  # why it does not take the other options
    side: int | None = None  # of its images, if they have one size


def _folder(config: DataConfig, path: Path) -> Images:
    rest = config.preparation()
    views = (rest.crop_margin, rest.flip, rest.on_unreadable, rest.in_memory)
    return load_folder(path, rest.size or FILE_SIZE, rest.gray, rest.n_bits, config.split_by, *views)


_VIEWS = ("size", "crop_margin", "flip")
_ARRAYS = (*_VIEWS, "gray", "n_bits")
_TILES = (*_ARRAYS, "on_unreadable")
_FILES = (*_TILES, "in_memory")
_GREY28 = "its images are 28x28, grey, and held in memory"

# A new source is one row: how it loads, which options it takes, whether a path follows its name.
SOURCES: dict[str, _Source] = {
    "digits": _Source(
        lambda config, path: load_digits(config.preparation()),
        _VIEWS,
        "none",
        "its images are 8x8, grey, with 17 levels",
        side=8,
    ),
    "mnist": _Source(
        lambda config, path: load_idx("mnist", path, config.preparation()),
        _ARRAYS,
        "optional",
        _GREY28,
        side=IDX_SIDE,
    ),
    "fashion-mnist": _Source(
        lambda config, path: load_idx("fashion-mnist", path, config.preparation()),
        _ARRAYS,
        "optional",
        _GREY28,
        side=IDX_SIDE,
    ),
    "emoji": _Source(
        lambda config, path: load_emoji(path, config.preparation()),
        _FILES,
        "optional",
        "its images are single small files",
    ),
    "photos": _Source(
        lambda config, path: load_photos(path, config.preparation(), config.scale),
        (*_TILES, "scale"),
        "optional",
        "its images are tiles of photos, held in memory",
    ),
    "cifar10": _Source(
        lambda config, path: load_cifar10(path, config.preparation()),
        _ARRAYS,
        "optional",
        "its images are 32x32 and held in memory",
        side=CIFAR_SIDE,
    ),
    "celeba": _Source(
        lambda config, path: load_celeba(path, config.preparation(), config.attribute),
        (*_FILES, "attribute"),
        "optional",
        "its images are single files, each of one person",
    ),
    "imagenet": _Source(
        lambda config, path: load_imagenet(path, config.preparation()),
        _FILES,
        "needed",
        "its images are single files with one label",
    ),
    "lsun": _Source(
        lambda config, path: load_lsun(path, config.preparation()),
        _FILES,
        "needed",
        "its images are the entries of databases",
    ),
    "folder": _Source(_folder, (*_FILES, "split_by"), "needed", "its images are files without attributes"),
}


def _help() -> str:
    ending = {"none": "", "optional": "[:PATH]", "needed": ":PATH"}
    *names, last = (name + ending[source.path] for name, source in SOURCES.items())
    return f"{', '.join(names)} or {last}"


DATA_HELP = _help()


def options_of(name: str) -> tuple[str, ...]:
    """Lists the fields of DataConfig that the source of ``name`` takes."""
    return SOURCES[name.partition(":")[0]].options


def side_of(name: str) -> int | None:
    """Says the side of the images of a source, if they have one size: what a larger size pads with zeros."""
    return SOURCES[name.partition(":")[0]].side


def load_data(config: DataConfig) -> Images:
    """Load the images that ``config`` names.

    Raises:
        ValueError: the source's own errors, each naming what is wrong.
        MissingExtraError: a library the source needs is not installed.
    """
    scheme, _, path = config.name.partition(":")
    source = SOURCES[scheme]
    return source.load(config, cached(scheme) if source.path == "optional" and not path else Path(path))
