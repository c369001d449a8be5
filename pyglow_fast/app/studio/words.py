"""Names images in short texts that a command line takes: a held-out image, a sample, a file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from pyglow_fast._core.errors import check_seed, expect
from pyglow_fast.train.figures import PICTURE_IMAGES

IMAGE_HELP = (
    "the number of a held-out image, from 0; a file; "
    "or sample:I[:n=N][:seed=S][:temperature=X][:label=C], C the number of a class"
)
N, TEMPERATURE = 64, 0.7  # of samples, unless told otherwise
_SAMPLE = re.compile(
    r"sample:(\d{1,9})(?::n=(\d{1,9}))?(?::seed=(\d{1,19}))?(?::temperature=(\d+(?:\.\d+)?))?((?::label=\d{1,9})*)",
    re.ASCII,
)
_NOT_SHOWN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # in no line, and in no picture's text


def number_text(value: float) -> str:
    """Write a finite number exactly, without an exponent, which argparse would take for an option: 1.5, -0.25."""
    text = f"{Decimal(repr(value)):f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


@dataclass(frozen=True)
class Draw:
    """A description of samples to draw: how many, at which temperature, from which seed, of which classes in turn."""

    n: int = N
    temperature: float = TEMPERATURE  # multiplies the standard deviation of the priors; 0 is the mode
    seed: int = 0
    labels: tuple[int, ...] = ()  # numbers of classes; empty: all of them

    def __post_init__(self) -> None:
        PICTURE_IMAGES.check("n", self.n, whole=True)
        expect(0.0 <= self.temperature < float("inf"), "temperature", "a number, 0 or more", self.temperature)
        check_seed(self.seed)


@dataclass(frozen=True)
class HeldOut:
    """The name of a held-out image of a run: its number, from 0."""

    number: int

    @property
    def text(self) -> str:
        """The name as :func:`parse_image` reads it."""
        return str(self.number)


@dataclass(frozen=True)
class Sample:
    """The name of one image of the samples of ``draw``: its number, from 0."""

    number: int
    draw: Draw

    @property
    def text(self) -> str:
        """The name as :func:`parse_image` reads it."""
        draw = self.draw
        parts = [f"sample:{self.number}", f"n={draw.n}", f"seed={draw.seed}"]
        parts.append(f"temperature={number_text(draw.temperature)}")
        return ":".join([*parts, *(f"label={label}" for label in draw.labels)])


@dataclass(frozen=True)
class File:
    """The name of the image in a file: its path, without control characters, which no line that is shown can hold."""

    path: str

    def __post_init__(self) -> None:
        expect(not _NOT_SHOWN.search(self.path), "file", "a name without control characters", ascii(self.path))

    @property
    def text(self) -> str:
        """The name as :func:`parse_image` reads it, which never takes it for a number, a sample or an option."""
        plain = not (self.path.isdecimal() or self.path.startswith(("sample:", "-")))
        return self.path if plain else f"./{self.path}"


Image = HeldOut | Sample | File


def shown_name(image: Image) -> str:
    """Write for people which image it is: the name of a file without its folders, else its number and what it is."""
    if isinstance(image, File):
        return image.path.replace("\\", "/").rpartition("/")[2]
    return f"{'held-out image' if isinstance(image, HeldOut) else 'sample'} {image.number}"


def parse_image(text: str, argument: str = "image") -> Image:
    """Read which image a text names; IMAGE_HELP lists the forms."""
    if text.isascii() and text.isdecimal():
        expect(len(text) <= 18, argument, IMAGE_HELP, f"a number of {len(text)} digits")
        return HeldOut(int(text))
    if not text.startswith("sample:"):
        expect(text != "", argument, IMAGE_HELP, "an empty text")
        return File(text)
    found = _SAMPLE.fullmatch(text)
    expect(found is not None, argument, IMAGE_HELP, repr(text)[:99])
    assert found is not None  # for the type checker: refused above
    number, n, seed, temperature, labels = found.groups()
    of_classes = tuple(map(int, labels.split(":label=")[1:]))
    draw = Draw(int(n or N), float(temperature or TEMPERATURE), int(seed or 0), of_classes)
    expect(int(number) < draw.n, argument, f"a sample in 0..{draw.n - 1}", repr(text))
    return Sample(int(number), draw)
