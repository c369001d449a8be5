"""Fetchable data sets in miniature, in a cache: nothing is downloaded."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pyglow_fast.data.sources import TONES

CATEGORIES = ("People & Body", "Flags")
YELLOW = (255, 204, 77)
TONE_COLOURS = ((247, 222, 206), (243, 210, 162), (213, 171, 136), (175, 126, 87), (124, 83, 62))


def write_grey(folder: Path, seed: int, n_train: int = 60, n_test: int = 40) -> None:
    """IDX files as MNIST has them: ten classes in turn, each a bar at its own height, in noise."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for prefix, count in (("train", n_train), ("t10k", n_test)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = rng.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[4 + 2 * label : 8 + 2 * label, 4:24] += 150
        for content, values in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(f">{1 + values.ndim}I", 0x800 + values.ndim, *values.shape)
            (folder / f"{prefix}-{content}-ubyte").write_bytes(head + values.tobytes())


def write_emoji(folder: Path, people: int = 30, flags: int = 30) -> None:
    """Write files as emoji-datasource-twitter has them: people of six colours, each of another size, and flags."""
    rng = np.random.default_rng(3)
    images = folder / "img" / "twitter" / "64"
    images.mkdir(parents=True)
    entries = []
    for i in range(people):
        variants = {}
        for colour, tone in zip((YELLOW, *TONE_COLOURS), ("", *TONES), strict=True):
            name = f"person{i}{'-' * bool(tone)}{tone.lower()}.png"
            picture = Image.new("RGBA", (64, 64))
            ImageDraw.Draw(picture).ellipse((2, 2, 30 + i, 62 - i // 2), fill=colour)
            picture.save(images / name)
            variants[tone] = {"image": name}
        base = variants.pop("")
        entries.append({"short_name": f"person{i}", "category": CATEGORIES[0], **base, "skin_variations": variants})
    for i in range(flags):
        name = f"flag{i}.png"
        picture = Image.new("RGBA", (64, 64), tuple(int(value) for value in rng.integers(0, 256, 3)))
        picture.save(images / name)
        entries.append({"short_name": f"flag{i}", "category": CATEGORIES[1], "image": name})
    (folder / "emoji.json").write_text(json.dumps(entries))


def write_photos(folder: Path) -> None:
    """Two photographs of 2048x1024: eight tiles of 256x256 each once they are shrunk by 2."""
    folder.mkdir(parents=True)
    for i in range(2):
        values = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(values).resize((2048, 1024)).save(folder / f"photo{i}.jpg")


def fill_cache(cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Write all of them below ``cache``, and make it the cache."""
    writers: dict[str, Callable[[Path], None]] = {
        "fashion-mnist": lambda folder: write_grey(folder, 1),
        "mnist": lambda folder: write_grey(folder, 2),
        "emoji": write_emoji,
        "photos": write_photos,
    }
    patch.setenv("PYGLOW_DATA", str(cache))
    for name, write in writers.items():
        write(cache / name)
