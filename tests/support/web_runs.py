"""Small runs that the tests of the page look at, and pictures of users, nice ones and others."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pyglow_fast.cli import main
from pyglow_fast.train import Checkpoint, RunFolder

DIGITS = "digits"  # with classes
COLOUR = "it's <b>$HOME & co"  # without, on images whose folders have hostile names
CLASSES = "with classes of hostile names"
UNBORN = "stopped before its first checkpoint"
NAMES = (
    "<img src=x onerror=alert(1)>",
    "{{7*7}} ${1+1}",
    'it\'s "quoted" & so on',
    "long " + "x" * 200,
    "größe \u202egnp",
)
SIDE = 16
TINY = ["--n-steps", "2", "--hidden", "4", "--device", "cpu", "--sample-count", "4", "--quiet"]


def write_images(root: Path) -> None:
    """Eight images of noise of each of NAMES, of another colour each."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(NAMES):
        (root / name).mkdir(parents=True)
        for j in range(8):
            values = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
            values[..., i % 3] += np.uint8(100 + 20 * (i // 3))
            Image.fromarray(values).save(root / name / f"{j}.png")


def make(root: Path) -> None:
    """Writes ``root/runs`` with all of them."""
    images, runs = root / "images", root / "runs"
    write_images(images)
    runs.mkdir()
    few = ["--max-steps", "20", "--eval-images", "32", "--n-levels", "1"]
    assert main(["train", "digits", "--out", str(runs / DIGITS), "--class-conditional", *few, *TINY]) == 0
    few = ["--max-steps", "10", "--batch-size", "8", "--eval-images", "10", "--n-levels", "2"]
    few += ["--size", str(SIDE), "--held-out", "0.3"]
    assert main(["train", f"folder:{images}", "--out", str(runs / COLOUR), *few, *TINY]) == 0
    assert main(["train", f"folder:{images}", "--out", str(runs / CLASSES), "--class-conditional", *few, *TINY]) == 0
    (runs / UNBORN).mkdir()
    written = RunFolder(runs / DIGITS).config.read_bytes()
    RunFolder(runs / UNBORN).config.write_bytes(written)


def train_on(run: RunFolder, step: int | None = None) -> Checkpoint:
    """Writes a checkpoint with other weights at a step, by default the next one, and returns it."""
    checkpoint = run.load()
    for name, value in checkpoint.model.items():
        if value.dim() == 4:  # kernels of the nets
            checkpoint.model[name] = value + 0.02 * torch.randn_like(value)
    checkpoint.ema = {}
    checkpoint.progress["step"] = checkpoint.progress["step"] + 1 if step is None else step
    run.save(checkpoint, keep=9)
    return run.load()


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of soft colours."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    """The bytes of a file of that format."""
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def turned_jpeg() -> bytes:
    """A JPEG that lies on its side, as a telephone writes it, with the place where it was taken, and a comment."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it clockwise to see it
    exif[0x010E] = "SECRET-DESCRIPTION"
    exif[0x8825] = {1: "N", 2: (48.0, 12.0, 34.0), 3: "E", 4: (11.0, 34.0, 12.0), 29: "SECRET-GPS"}
    return encoded(photo(64, 48), "JPEG", exif=exif, comment=b"SECRET-COMMENT")


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 50000 x 50000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
