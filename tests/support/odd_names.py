"""A labelled run whose every name needs care on a command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from support.latent_runs import train, write_emoji

CLASSES = ("odd", "12", "\\back", "a 'quoted' \"$HOME\" `x`", "grün ✓")
FILES = ("./12", "./sample:1", "./-n", "a b.png", 'it\'s "$HOME"*.png', "grün ✓.png", "\\back.png", "digits", "~x")


def write_odd_images(root: Path) -> None:
    """Eight grey 8x8 images of each class below ``root``."""
    rng = np.random.default_rng(5)
    for i, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for k in range(8):
            pixels = rng.integers(0, 60, (8, 8), dtype=np.uint8)
            pixels[i : i + 3] += 150
            Image.fromarray(pixels).save(root / name / f"{k}.png")


def write_odd_files(folder: Path) -> None:
    """One grey 8x8 image by each name, all different."""
    for i, name in enumerate(FILES):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, "PNG")


def train_odd(images: Path, run: Path, *options: str) -> None:
    """A class-conditional run of two levels on them."""
    small = ["--size", "8", "--gray", "--n-levels", "2", "--class-conditional", "--held-out", "0.2"]
    train(f"folder:{images}", run, *small, *options)


def train_several(root: Path, odd: str) -> None:
    """Runs of two levels: on emoji ("emoji run"), labelled digits ("digits"), and images of odd classes (``odd``)."""
    write_emoji(root / "emoji")
    train(f"emoji:{root / 'emoji'}", root / "emoji run", "--size", "16", "--n-levels", "2")
    train("digits", root / "digits", "--n-levels", "2", "--class-conditional")
    write_odd_images(root / "odd images")
    train_odd(root / "odd images", root / odd)
