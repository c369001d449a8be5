"""One small trained run that the tests of the contract look at, made by the command line once for all of them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.machine import made_once
from support.program import done

CLASSES = ("bright", "dark")
SIDE = 16
IMAGES = 20  # of each class
HELD_OUT = 4
STEPS = 20
MODEL = ("--n-levels", "2", "--n-steps", "2", "--hidden", "4", "--device", "cpu")
OPTIONS = (
    *("--size", SIDE, "--batch-size", "8", "--max-steps", STEPS, "--log-every", "5", "--eval-every", "10"),
    *("--save-every", "5", "--eval-images", "8", "--sample-count", "4", "--class-conditional", *MODEL),
)


def write_images(
    folder: Path, count: int = IMAGES, side: int = SIDE, seed: int = 0, names: tuple[str, str] = CLASSES
) -> None:
    """Write soft colour images of two classes, a folder each."""
    rng = np.random.default_rng(seed)
    for name, base in zip(names, (170, 20), strict=True):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            values = (base + rng.integers(0, 60, (2, 2, 3))).astype(np.uint8)
            Image.fromarray(values).resize((side, side)).save(folder / name / f"{i:02}.png")


def _make(folder: Path) -> None:
    with contextlib.chdir(folder):
        write_images(folder / "images")
        (folder / "said.txt").write_text(done("train", "folder:images", "--out", "run", *OPTIONS))


def made(factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ``images`` and the run ``run`` on them, which no test changes: the current one is to be it.

    ``said.txt`` is what the training said.
    """
    return made_once(factory, "tiny-run", _make)
