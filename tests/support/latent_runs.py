"""Small runs that the tests of the latent tools look at, and emoji whose tones are known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pyglow_fast.app.cli import main
from support.machine import made_once

EMOJI = 12
SIDE = 64
TONES = {"1F3FB": 60, "1F3FF": 150}  # what each takes off the green of the disc


def write_emoji(root: Path, emoji: int = EMOJI) -> None:
    """``emoji`` discs of other places and sizes, each also in a light and a dark tone; and as many squares without."""
    folder = root / "img" / "test" / "64"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    entries = []
    for i in range(emoji):
        y, x, radius = (*rng.integers(24, 40, 2).tolist(), int(rng.integers(10, 20)))
        disc = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        variations = {}
        for tone, less in {"": 0, **TONES}.items():
            picture = np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)
            picture[disc] = (250, 200 - less, 40)
            name = f"disc{i}{tone}.png"
            Image.fromarray(picture).save(folder / name)
            if tone:
                variations[tone] = {"image": name}
        entries.append(
            {"short_name": f"disc{i}", "category": "Discs", "image": f"disc{i}.png", "skin_variations": variations}
        )
        square = np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)
        square[x : x + radius, y : y + radius] = (0, 20 * i, 200)
        Image.fromarray(square).save(folder / f"square{i}.png")
        entries.append({"short_name": f"square{i}", "category": "Squares", "image": f"square{i}.png"})
    (root / "emoji.json").write_text(json.dumps(entries))


def train(data: str, out: Path, *options: str) -> None:
    """The least that gives a run."""
    few = ["--hidden", "4", "--n-steps", "2", "--max-steps", "10", "--batch-size", "8", "--eval-images", "16"]
    command = ["train", data, "--out", str(out), "--quiet", "--device", "cpu", "--sample-count", "4", *few, *options]
    assert main(command) == 0


def _make(folder: Path) -> None:
    write_emoji(folder / "emoji")
    train(f"emoji:{folder / 'emoji'}", folder / "emoji run", "--size", "16", "--n-levels", "2", "--save-every", "5")
    train("digits", folder / "digits", "--n-levels", "2", "--class-conditional")


def made(factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two runs of two levels, ``emoji run`` and ``digits`` with classes: a copy for this worker.

    What commands compute is kept in it; the runs are not to be changed.
    """
    return Path(shutil.copytree(made_once(factory, "latent-runs", _make), factory.mktemp("latent") / "runs"))
