"""Writes and reads short texts: numbers as the command line takes them, and names of images."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from decimal import Decimal

from pyglow_fast._errors import expect
from pyglow_fast.studio.samples import Draw
from pyglow_fast.train.figures import holds_text

IMAGE_HELP = (
    "the number of a held-out image, from 0; a file; "
    "or sample:I[:n=N][:seed=S][:temperature=X][:label=C], C the number of a class"
)
NAME_HELP = r"A name that begins with - is written \-..."


def number_text(value: float) -> str:
    """Write a finite number exactly, without an exponent, which argparse would take for an option: 1.5, -0.25."""
    text = f"{Decimal(repr(value)):f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def name_word(name: str) -> str:
    """Write a class as a word of a command line: with a backslash where it begins with -, as options do."""
    return f"\\{name}" if name.startswith(("-", "\\")) else name


def word_name(word: str) -> str:
    """Read the class that :func:`name_word` made a word of."""
    return word.removeprefix("\\")


def one_line(text: str) -> bool:
    """Whether a text can be shown in a line and kept in a picture: without control characters, valid Unicode."""
    return holds_text(text) and not any(unicodedata.category(character) == "Cc" for character in text)


@dataclass(frozen=True)
class HeldOut:
    """The name of a held-out image of a run: its number, from 0.

    Examples:
        >>> from pyglow_fast.studio import HeldOut, parse_image
        >>> parse_image("12") == HeldOut(12), HeldOut(12).text
        (True, '12')
    """

    number: int

    @property
    def text(self) -> str:
        """The name as :func:`parse_image` reads it."""
        return str(self.number)


@dataclass(frozen=True)
class Sample:
    """The name of one image of the samples of ``draw``: its number, from 0.

    Examples:
        >>> from pyglow_fast.studio import Draw, Sample, parse_image
        >>> sample = Sample(2, Draw(n=4, temperature=0.7, seed=7))
        >>> sample.text
        'sample:2:n=4:seed=7:temperature=0.7'
        >>> parse_image(sample.text) == sample
        True
    """

    number: int
    draw: Draw

    @property
    def text(self) -> str:
        """The name as :func:`parse_image` reads it."""
        draw = self.draw
        options = {"n": str(draw.n), "seed": str(draw.seed), "temperature": number_text(draw.temperature)}
        parts = [f"sample:{self.number}", *(f"{name}={value}" for name, value in options.items())]
        return ":".join([*parts, *(f"label={label}" for label in draw.labels)])


@dataclass(frozen=True)
class File:
    """The name of the image in a file: its path.

    Raises:
        ValueError: its name has control characters, which no command line that is shown can hold.

    Examples:
        >>> from pyglow_fast.studio import File, parse_image
        >>> parse_image("photos/me.png")
        File(path='photos/me.png')
        >>> File("12").text  # a file of this name is told from held-out image 12
        './12'
    """

    path: str

    def __post_init__(self) -> None:
        expect(one_line(self.path), "file", "a name without control characters", ascii(self.path))

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
    """Read which image a text names; IMAGE_HELP lists the forms.

    Raises:
        ValueError: it names nothing.
    """
    if text.isascii() and text.isdecimal():
        expect(len(text) <= 99, argument, IMAGE_HELP, f"a number of {len(text)} digits")
        return HeldOut(int(text))
    if not text.startswith("sample:"):
        expect(text != "", argument, IMAGE_HELP, "an empty text")
        return File(text)
    number, *options = text.removeprefix("sample:").split(":")
    named: dict[str, list[str]] = {"n": [], "seed": [], "temperature": [], "label": []}
    for option in options:
        name, equals, value = option.partition("=")
        expect(equals == "=" and name in named, argument, IMAGE_HELP, repr(text))
        named[name].append(value)
    once = all(len(values) <= 1 for name, values in named.items() if name != "label")
    expect(once, argument, "each option of a sample once", repr(text))
    try:
        labels = tuple(map(int, named.pop("label")))
        types = {"n": int, "seed": int, "temperature": float}
        given = {name: types[name](values[0]) for name, values in named.items() if values}
        index = int(number)
    except ValueError as error:
        raise ValueError(f"{argument}: expected {IMAGE_HELP}, found {text!r}") from error
    try:
        draw = Draw(**given, labels=labels)
    except ValueError as error:  # says which number is out of its range
        raise ValueError(f"{argument}: expected {IMAGE_HELP}, found {text!r} ({error})") from error
    expect(0 <= index < draw.n, argument, f"a sample in 0..{draw.n - 1}", repr(text))
    return Sample(index, draw)
