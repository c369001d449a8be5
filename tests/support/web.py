"""What tests of the web page share: its server in a process, a Chromium, and small runs to look at."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support import ROOT
from support.commands import Command
from support.latent_runs import train
from support.tiny_run import SIDE, write_images

MUST = "PYGLOW_BROWSER"  # "must": what is missing fails a test instead of skipping it
WAIT = 120.0  # seconds that anything may take on a busy machine, where a test waits for it
SMALL_PAGE = ROOT / "tests" / "app" / "web" / "small_page.py"
FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
NAMES = ("<img src=x onerror=alert(1)>", 'größe & "so" on')  # of folders of images


def chromium() -> str | None:
    """The path of a Chromium, or None."""
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return next((path for path in found if path), None)


def require(*names: str) -> None:
    """Skips a test, or the module that calls this at its top, unless gradio, playwright, chromium are there, as named.

    With PYGLOW_BROWSER=must it fails instead.
    """
    missing = [name for name in names if not (chromium() if name == "chromium" else importlib.util.find_spec(name))]
    if missing:
        said = f"the web page's tests need {' and '.join(missing)}"
        if os.environ.get(MUST) == "must":
            pytest.fail(f"{said}, and {MUST}=must says that they run", pytrace=False)
        pytest.skip(said, allow_module_level=True)


class Server:
    """A program that serves a page: its first line has the address. ``with`` ends it.

    Attributes:
        address: such as http://127.0.0.1:7860/.
        cwd: its current folder, which also has its temporary files.
    """

    def __init__(self, arguments: list[str], cwd: Path, **environment: str) -> None:
        self.cwd = cwd
        self._process = Command(arguments, cwd, {**os.environ, "TMPDIR": str(cwd), **environment})
        try:
            wait_for(lambda: bool(self._addresses()) or self._process.returncode is not None, True)
            (self.address,) = self._addresses()
        except BaseException:
            self._process.kill()
            pytest.fail(f"no server: {self._process.read()}")

    def _addresses(self) -> list[str]:
        """What is whole of its first line."""
        first, ended, _ = self._process.read()[0].partition("\n")
        return [word for word in first.split() if ended and word.startswith(("http://", "https://"))]

    def log(self) -> str:
        """What it wrote to stderr."""
        return self._process.read()[1]

    def files(self) -> list[Path]:
        """What was uploaded and is still on the disk; folders may vanish while they are listed, which os.walk bears."""
        (cache,) = self.cwd.glob("pyglow-serve-*")
        return [Path(place, name) for place, _, names in os.walk(cache) for name in names]

    def end(self, signum: signal.Signals = signal.SIGTERM) -> int | None:
        """Sends a signal and returns the process's exit code: that of SIGKILL if it lives on for WAIT."""
        self._process.send_signal(signum)
        with contextlib.suppress(TimeoutError):
            self._process.communicate(WAIT)
        self._process.kill()
        self._process.communicate()
        return self._process.returncode

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *raised: object) -> None:
        self.end()


def wait_for(read: Callable[[], Any], wanted: Any) -> None:
    """Reads until what is read is what is wanted, and fails with both when it never is."""
    end, found = time.monotonic() + WAIT, read()
    while found != wanted:
        assert time.monotonic() < end, f"found {found!r}\nwanted {wanted!r}"
        time.sleep(0.02)
        found = read()


def make_runs(root: Path) -> None:
    """Writes small runs: ``digits`` with classes, ``colour`` on images whose folders have hostile names."""
    write_images(root / "images", 8, SIDE, names=NAMES)
    train("digits", root / "runs" / "digits", "--n-levels", "1", "--class-conditional")
    options = ["--size", f"{SIDE}", "--held-out", "0.3", "--n-levels", "2", "--batch-size", "4", "--eval-images", "4"]
    train(f"folder:{root / 'images'}", root / "runs" / "colour", *options)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of soft colours."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


def headed(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels, and has none."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
