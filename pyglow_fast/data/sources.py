"""From the words on a command line to images: the one table of data sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from pyglow_fast._errors import expect
from pyglow_fast.data.digits import load_digits
from pyglow_fast.data.folder import SPLIT_BY, load_folder
from pyglow_fast.data.image_set import ImageSet

DATA_HELP = "'digits' or 'folder:PATH'"


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are prepared.

    Args:
        name: ``digits`` or ``folder:PATH``.
        size: side of the square images; folders only (None: 32).
        gray: one channel; folders only.
        n_bits: bits kept of each sample; folders only (None: 8).
        split_by: "file" or "folder": what a held-out split keeps together; folders only.
        held_out: fraction of the images held out.

    Raises:
        ValueError: an unknown name, a value outside its range, or an option that the source does not take.
    """

    name: str = "digits"
    size: int | None = None
    gray: bool = False
    n_bits: int | None = None
    split_by: str = "file"
    held_out: float = 0.1

    def __post_init__(self) -> None:
        scheme, _, path = self.name.partition(":")
        expect(scheme in SOURCES and (path != "") == SOURCES[scheme].needs_path, "data", DATA_HELP, repr(self.name))
        expect(self.size is None or self.size >= 1, "size", "a positive number", self.size)
        expect(self.n_bits is None or self.n_bits in range(1, 9), "n_bits", "a value in 1..8", self.n_bits)
        expect(self.split_by in SPLIT_BY, "split_by", f"one of {SPLIT_BY}", repr(self.split_by))
        expect(0.0 < self.held_out < 1.0, "held_out", "a fraction between 0 and 1", self.held_out)
        source = SOURCES[scheme]
        for option, plain in (("size", None), ("gray", False), ("n_bits", None), ("split_by", "file")):
            fixed = f"no such option for {self.name} ({source.fixed})"
            expect(option in source.options or getattr(self, option) == plain, option, fixed, getattr(self, option))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)


@dataclass(frozen=True)
class _Source:
    load: Callable[[DataConfig, str], ImageSet]
    options: frozenset[str] = frozenset()
    needs_path: bool = False
    fixed: str = ""


def _folder(config: DataConfig, path: str) -> ImageSet:
    size, n_bits = config.size or 32, 8 if config.n_bits is None else config.n_bits
    return load_folder(path, size, config.gray, n_bits, config.split_by)


# A new source is one row: how it loads, which options it takes, whether a path follows its name.
SOURCES: dict[str, _Source] = {
    "digits": _Source(lambda config, path: load_digits(), fixed="its images are 8x8, grey, with 17 levels"),
    "folder": _Source(_folder, frozenset({"size", "gray", "n_bits", "split_by"}), needs_path=True),
}


def load_data(config: DataConfig) -> ImageSet:
    """Load what ``config`` names.

    Raises:
        ValueError: the source's own errors, each naming what is wrong.
        MissingExtraError: a library the source needs is not installed.
    """
    scheme, _, path = config.name.partition(":")
    return SOURCES[scheme].load(config, path)
