"""Declares the options of commands that look at images of DATA."""

from __future__ import annotations

import argparse

from pyglow_fast.data import DATA_HELP, Images
from pyglow_fast.models import Glow
from pyglow_fast.studio.reading import PARTS, selection
from pyglow_fast.train import Checkpoint


def add_images(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """Declare DATA, which argparse's ``nargs`` may let be left out, and which part of it is looked at."""
    parser.add_argument("data", nargs=nargs, metavar="DATA", help=f"{DATA_HELP}; prepared as the run's own images were")
    parser.add_argument(
        "--part",
        choices=PARTS,
        help="which part of them (default: held-out of the run's own images, all of any others)",
    )


def images_of(args: argparse.Namespace, checkpoint: Checkpoint, model: Glow) -> tuple[Images, Images | None, str]:
    """Load (the images to look at, the run's training images or None if DATA is not the run's, the part in words).

    Raises:
        ValueError: images that do not fit the model, or a part that they do not have.
    """
    found = selection(args.data, args.part, checkpoint, model)
    return found.images, found.train, found.part
