"""Shares what commands that work on latents need: options, images as the model takes them, and the picture."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from pyglow_fast._errors import check_seed, expect
from pyglow_fast.cli._common import check_counts, number, user_input, whole
from pyglow_fast.data import Images, optional
from pyglow_fast.latents import DEFAULT_SPACE, SPACES
from pyglow_fast.studio.reading import read as reading_of
from pyglow_fast.train import save_grid, to_pixels
from pyglow_fast.train.seeds import random_subset

SPACE_WORDS = "z of every level (latent), or what the priors standardise it to (noise)"


def add_picture(parser: argparse.ArgumentParser, seed_of: str, formats: str = "") -> None:
    """Declare the options of a picture: --out, --scale and --seed."""
    text = f"the picture to write{': ' if formats else ''}{formats}"
    parser.add_argument("--out", required=True, metavar="PNG", help=text)
    parser.add_argument(
        "--scale", type=whole, metavar="N", help="enlarge each pixel by this factor (default: to 64 pixels high)"
    )
    parser.add_argument("--seed", type=whole, metavar="N", default=0, help=f"of {seed_of}")


def add_space(parser: argparse.ArgumentParser) -> None:
    """Declare --space, the coordinates of latents that are worked in."""
    parser.add_argument("--space", choices=SPACES, default=DEFAULT_SPACE, help=SPACE_WORDS)


def add_temperature(parser: argparse.ArgumentParser, default: float, text: str) -> None:
    """Declare --temperature, which scales the spread of what is drawn."""
    parser.add_argument("--temperature", type=number, metavar="X", default=default, help=text)


def check_options(args: argparse.Namespace, *positive: str) -> None:
    """Refuse a seed or scale, or one of the options ``positive``, that is out of its range.

    Raises:
        ValueError: one is.
        MissingExtraError: a library for the picture is not installed: better missed now than after minutes.
    """
    for module in ("PIL.ImageDraw", "PIL.ImageFont", "matplotlib"):
        optional(module, "labelled pictures")
    check_counts(args, *positive, "scale")
    check_seed(args.seed)
    temperature = getattr(args, "temperature", 0.0)
    expect(0.0 <= temperature < float("inf"), "temperature", "a number, 0 or more", temperature)


def chosen(images: Images, count: int, seed: int) -> Tensor:
    """Draw ``count`` of the images' indices by the seed, or take all if there are not more."""
    return random_subset(seed, len(images), min(count, len(images)))


def read(images: Images, indices: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Read the images at ``indices`` in batches.

    Raises:
        InputError: one that cannot be read.
    """
    reading = reading_of(images, indices)
    while True:
        with user_input():
            batch = next(reading, None)
        if batch is None:
            return
        yield batch


def not_finite_note(count: int, of: str = "of them") -> str:
    """Say how many images were not finite, as the end of a sentence; empty for none."""
    return f" ({count} {of} not finite, shown grey)" if count else ""


def save(
    path: Path, rows: list[tuple[str, Tensor]], n_bins: int, columns: list[str], title: str, scale: int | None
) -> None:
    """Write rows of model outputs x (n, C, H, W) as a labelled grid."""
    shown = [(label, to_pixels(x, n_bins).cpu()) for label, x in rows]
    save_grid(shown, n_bins, path, columns, scale, title)
