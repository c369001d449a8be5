"""Shares what commands need: a parser that reports in one line, argument types, and telling bad input from bugs."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from pyglow_fast._errors import expect, visible
from pyglow_fast._settings import Range, value_text
from pyglow_fast.data import Yardstick, optional
from pyglow_fast.models import Glow
from pyglow_fast.studio.directions import Progress
from pyglow_fast.studio.opened import TRAIN_IMAGES, OpenRun
from pyglow_fast.studio.pictures import Made
from pyglow_fast.train import Checkpoint, RunFolder, Score, load_model, resolve_device
from pyglow_fast.train.figures import PICTURE_IMAGES
from pyglow_fast.train.files import write_bytes

LOOSE = ("folder", "photos")  # images that are whatever lies below a folder: a file more there would be one of them


_COUNTS = {
    "n": PICTURE_IMAGES,
    "columns": PICTURE_IMAGES,
    "scale": Range(least=1, most=256, why="a pixel of the image is then a picture of its own"),
    "frames": Range(least=2, most=1000, why="each is a pass through the model"),
    "samples": Range(least=1, most=10_000, why="each goes through all images once more"),
    "batch_size": Range(least=1, most=1 << 16, why="all of them are in memory at once"),
}


class InputError(Exception):
    """Raised when something the user gave is wrong; the message says what, what was expected and what was found."""


@contextmanager
def user_input() -> Iterator[None]:
    """A context for code that looks at what the user gave: a ValueError there is the user's to mend.

    Errors raised outside of it are bugs and keep their traceback.
    """
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error


def say(text: object, lines: bool = False) -> None:
    """Print a line, or a text that has lines of its own, in which nothing acts on the terminal."""
    print(visible(str(text), lines))


def say_error(error: object, lines: bool = False) -> None:
    """Print an error, in one line unless it has lines of its own."""
    print(f"error: {visible(str(error), lines)}", file=sys.stderr)


# What begins with a minus and is a number, in any notation that float reads.
_NEGATIVE = re.compile(
    r"-(?:(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:e[-+]?[0-9]+)?|inf|infinity|nan)", re.IGNORECASE
)


class HelpFormatter(argparse.HelpFormatter):
    """Writes behind the help of each option the default that it has, which nobody then types by hand."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        value = action.default
        if not action.option_strings or value is None or value is argparse.SUPPRESS or isinstance(value, bool):
            return text
        return f"{text} (default: {value_text(value).replace('%', '%%')})".strip()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, like all others of this command.

    Options must be written out: an abbreviation that works today would be ambiguous with tomorrow's options.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        ours: dict[str, Any] = {"allow_abbrev": False, "formatter_class": HelpFormatter}
        super().__init__(*args, **ours | options)

    def _parse_optional(self, arg_string: str) -> Any:
        """As of any, but that -1e-1 is a number as -0.1 is: None means that it is no option."""
        return None if _NEGATIVE.fullmatch(arg_string) else super()._parse_optional(arg_string)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; a last positional that may be left out (``optional_last``) may stand behind options.

        Before Python 3.13 argparse does not look for it behind options.
        """
        found, rest = super().parse_known_args(args, namespace)
        name = self.get_default("optional_last")
        if name and getattr(found, name) is None and len(rest) == 1 and not rest[0].startswith("-"):
            setattr(found, name, rest.pop())
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        say_error(f"{message} (see {self.prog} --help)")
        raise SystemExit(2)


def whole(text: str) -> int:
    """Read an int, as an argument type of argparse."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}") from None


def number(text: str) -> float:
    """Read a float, as an argument type of argparse."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}") from None


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Refuse those of the options that are given and are below 1 (2 frames), or above what they may be.

    Raises:
        ValueError: one is.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None:
            _COUNTS.get(name, Range(least=1)).check(name, value, whole=True)


def folder_name(text: str) -> str:
    """Read the name of a folder, as an argument type: an empty one, which would mean the current folder, is refused."""
    if not text:
        raise argparse.ArgumentTypeError(f"expected the name of a folder, found {text!r}")
    return text


def add_run(parser: argparse.ArgumentParser) -> None:
    """Declare RUN, which of its checkpoints, and the device."""
    parser.add_argument("run", type=folder_name, metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--best", action="store_true", help="the checkpoint with the best held-out bits/dim, not the last"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto")


def open_run(args: argparse.Namespace) -> tuple[RunFolder, Checkpoint, Glow]:
    """Load the run that ``add_run`` parsed, its checkpoint, and the model on the device asked for.

    Raises:
        ValueError: it is no run, or what it holds does not fit together.
    """
    folder = RunFolder(args.run)
    device = resolve_device(args.device)
    checkpoint = folder.load(args.best)
    return folder, checkpoint, load_model(checkpoint, str(folder.path), device)


def open_to_look(args: argparse.Namespace) -> OpenRun:
    """Open the run that ``add_run`` parsed with pyglow_fast.studio, to look at it.

    Raises:
        ValueError: it is no run, or what it holds does not fit together.
    """
    return OpenRun.open(args.run, args.best, args.device, getattr(args, "train_images", TRAIN_IMAGES))


@contextmanager
def progress_bar(words: str) -> Iterator[Progress]:
    """A context with a function that is told (done, total) and shows a bar on a terminal from the first call on."""
    bar: Any = None

    def told(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = optional("tqdm", "progress bars").tqdm(total=total, desc=words, leave=False, disable=None)
        bar.update(done - bar.n)

    try:
        yield told
    finally:
        if bar is not None:
            bar.close()


def write_made(made: Made, path: Path) -> None:
    """Write a file that was made to ``path``, which is replaced whole or not at all."""
    write_bytes(path, made.data)


def picture_path(text: str, *images: str) -> Path:
    """Find where a picture will go: see :func:`output_path`."""
    return output_path(text, ".png", "out", *images)


def output_path(text: str, suffix: str, argument: str = "out", *images: str) -> Path:
    """Find where a file will go, and check it before anything is computed.

    Args:
        text: the path.
        suffix: what the path must end in.
        argument: the name of the argument, for messages.
        images: names of the images that are read; nothing is written over them, or among loose files.

    Raises:
        ValueError: the folder is not there or cannot be written, the name does not end in ``suffix``, or the file is
            one that a run keeps, or would be among the images.
    """
    path = Path(text)
    expect(path.suffix.lower() == suffix, argument, f"a name ending in {suffix}", repr(text))
    expect(path.parent.is_dir(), argument, "a file in an existing folder", repr(text))
    expect(not path.is_dir(), argument, "a file", f"a folder, {text!r}")
    expect(os.access(path.parent, os.W_OK), argument, "a file in a folder that can be written", repr(text))
    place = path.resolve()
    folder = RunFolder(place.parent)
    kept = folder.exists and place in folder.kept
    expect(not kept, argument, "another file than those that a run keeps", repr(text))
    for name in images:
        expect(Path(name).resolve() != place, argument, "another file than one that is read", repr(text))
        scheme, _, root = name.partition(":")
        among = scheme in LOOSE and bool(root) and Path(root).resolve() in place.parents
        expect(not among, argument, f"a file outside of the folder of {name}", repr(text))
    return path


def stream(device: torch.device, seed: int) -> torch.Generator:
    """Make a random generator on ``device`` from a seed."""
    return torch.Generator(device).manual_seed(seed)


def table(scores: dict[str, Score], yardsticks: tuple[Yardstick, ...] | list[Yardstick] = ()) -> str:
    """Write scores and yardsticks as aligned lines."""
    rows = [
        (name, f"{score.mean:.3f}", f"± {score.error_text} bits/dim, {score.images} images{_labels(score)}")
        for name, score in scores.items()
    ]
    rows += [(item.name, f"{item.bits_per_dim:.3f}", f"bits/dim, {item.how}") for item in yardsticks]
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"  {name.ljust(width)}  {value:>7}  {rest}" for name, value, rest in rows)


def _labels(score: Score) -> str:
    """What a classifier made of the labels, if there is one."""
    return "" if score.accuracy is None else f"; labels {score.accuracy:.1%} right, {score.class_bits:.3f} bits"
