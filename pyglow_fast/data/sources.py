"""Turns the words on a command line into images: the one table of data sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pyglow_fast._errors import expect, visible
from pyglow_fast._settings import IMAGES, check_settings, same_setting, setting, settings
from pyglow_fast.data.cache import cached
from pyglow_fast.data.celeba import load_celeba
from pyglow_fast.data.cifar import SIDE as CIFAR_SIDE
from pyglow_fast.data.cifar import load_cifar10
from pyglow_fast.data.digits import load_digits
from pyglow_fast.data.emoji import load_emoji
from pyglow_fast.data.folder import SPLIT_BY, load_folder
from pyglow_fast.data.idx import SIDE as IDX_SIDE
from pyglow_fast.data.idx import load_idx
from pyglow_fast.data.image_set import DEFAULT_HELD_OUT, HELD_OUT, Images
from pyglow_fast.data.imagenet import load_imagenet
from pyglow_fast.data.lsun import load_lsun
from pyglow_fast.data.photos import SCALE, load_photos
from pyglow_fast.data.prepare import FILE_SIZE, Preparation, check_side


@settings
@dataclass(frozen=True)
class DataConfig:
    """Says which images to load, and how they are prepared; a source takes only options that mean something to it.

    >>> from pyglow_fast.data import DataConfig, load_data
    >>> load_data(DataConfig("digits", size=16)).image_shape
    (1, 16, 16)

    Raises:
        ValueError: an unknown name, a value outside its range, or an option that the source does not take.
    """

    name: str = setting(
        "digits",
        "one of SOURCES, with :PATH where it takes one; docs/data.md lists them",
        expected="a name of docs/data.md",
    )
    size: int | None = same_setting(Preparation, "size")
    gray: bool = same_setting(Preparation, "gray")
    n_bits: int | None = same_setting(Preparation, "n_bits", default=None, absent="8; the digits have 17 grey levels")
    split_by: str = setting(
        "file",
        "what a random split keeps together: each file alone, or all files of one folder",
        choices=SPLIT_BY,
        group=IMAGES,
    )
    held_out: float | None = setting(
        None,
        "fraction of the images held out, drawn at random",
        range=HELD_OUT,
        absent=f"the source's own split where it has one, else {DEFAULT_HELD_OUT:g}",
        group=IMAGES,
    )
    crop_margin: int = same_setting(Preparation, "crop_margin")
    flip: bool = same_setting(Preparation, "flip")
    scale: int | None = setting(
        None,
        "photos alone: whole factor by which they are shrunk before they are cut into tiles",
        range=SCALE,
        absent="by the size: 4 up to 64, 2 up to 256, else 1",
        group=IMAGES,
    )
    attribute: str | None = setting(None, "celeba alone: the attribute that makes two classes", group=IMAGES)
    on_unreadable: str = same_setting(Preparation, "on_unreadable")
    in_memory: bool | None = same_setting(Preparation, "in_memory")

    def __post_init__(self) -> None:
        scheme, colon, path = self.name.partition(":") if isinstance(self.name, str) else ("", "", "")
        source = SOURCES.get(scheme)
        if source is None or (path == "" if colon else source.path == "needed") or (colon and source.path == "none"):
            raise ValueError(visible(f"data: expected {DATA_HELP}, found {self.name!r}"))
        check_settings(self)
        for option in fields(self):
            value = getattr(self, option.name)
            fits = option.name in ("name", "held_out", *source.options) or value == option.default
            expect(fits, option.name, f"no such option for {self.name} ({source.fixed})", value)
        if source.side is not None:
            check_side(self.size, source.side, scheme)

    def preparation(self) -> Preparation:
        """The options that all sources share."""
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
        "its images are 8x8, grey, with 17 grey levels",
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
    "emoji-google": _Source(
        lambda config, path: load_emoji(path, config.preparation(), "emoji-google"),
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
