"""What tests of the web page share: its server in a process, a Chromium, and small runs to look at."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import pytest
from PIL import Image

from pyglow_fast.cli import main
from support import ROOT

Value = TypeVar("Value")

MUST = "PYGLOW_BROWSER"  # "must": what is missing fails a test instead of skipping it
WAIT = 120.0  # seconds that anything may take on a busy machine, where a test waits for it
SMALL_PAGE = ROOT / "tests" / "web" / "small_page.py"
FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
NAMES = ("<img src=x onerror=alert(1)>", 'größe & "so" on')  # of folders of images
SIDE = 16


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
    """A program that serves a page: its first line has the address. ``with`` ends it, and so does the end of the tests.

    Attributes:
        address: such as http://127.0.0.1:7860/.
        process: a ``subprocess.Popen``.
        cwd: its current folder, which also has its temporary files.
    """

    def __init__(self, arguments: list[str], cwd: Path, **environment: str) -> None:
        self.cwd = cwd
        settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(cwd), **environment}
        setpriv = shutil.which("setpriv")
        command = [*([setpriv, "--pdeathsig", "TERM"] if setpriv else []), sys.executable, *arguments]
        with tempfile.NamedTemporaryFile("w", prefix="serve-", suffix=".log", dir=cwd, delete=False) as err:
            self._err = Path(err.name)
            self.process = subprocess.Popen(
                command, cwd=cwd, env=settings, stdout=subprocess.PIPE, stderr=err, text=True
            )
        assert self.process.stdout is not None
        guard = threading.Timer(2 * WAIT, self.process.kill)
        guard.start()
        try:
            first = self.process.stdout.readline()
        finally:
            guard.cancel()
        words = [word for word in first.split() if word.startswith(("http://", "https://"))]
        if len(words) != 1:
            self.end()
            pytest.fail(f"no server: {first!r}, {self.log()}")
        self.address = words[0]

    def log(self) -> str:
        """What it wrote to stderr."""
        return self._err.read_text()

    def files(self) -> list[Path]:
        """What was uploaded and is still on the disk; folders may vanish while they are listed, which os.walk bears."""
        (cache,) = self.cwd.glob("pyglow-serve-*")
        return [Path(place, name) for place, _, names in os.walk(cache) for name in names]

    def end(self, signum: int = signal.SIGTERM) -> int:
        """Sends a signal and returns the process's exit code: that of SIGKILL if it lives on for WAIT."""
        self.process.send_signal(signum)
        try:
            return self.process.wait(WAIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.end()
        assert self.process.stdout is not None
        self.process.stdout.close()


def wait_for(read: Callable[[], Any], wanted: Any) -> None:
    """Reads until what is read is what is wanted, and fails with both when it never is."""
    end, found = time.monotonic() + WAIT, read()
    while found != wanted:
        assert time.monotonic() < end, f"found {found!r}\nwanted {wanted!r}"
        time.sleep(0.02)
        found = read()


def make_runs(root: Path) -> None:
    """Writes small runs: ``digits`` with classes, ``colour`` on images whose folders have hostile names."""
    rng, images = np.random.default_rng(0), root / "images"
    for i, name in enumerate(NAMES):
        (images / name).mkdir(parents=True)
        for j in range(8):
            values = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
            values[..., i] += np.uint8(100)
            Image.fromarray(values).save(images / name / f"{j}.png")
    tiny = ["--n-steps", "2", "--hidden", "4", "--device", "cpu", "--sample-count", "4", "--quiet", "--max-steps", "10"]
    words = ["digits", "--out", str(root / "runs" / "digits"), "--class-conditional", "--n-levels", "1"]
    assert main(["train", *words, "--eval-images", "32", *tiny]) == 0
    words = [f"folder:{images}", "--out", str(root / "runs" / "colour"), "--size", str(SIDE), "--held-out", "0.3"]
    assert main(["train", *words, "--n-levels", "2", "--batch-size", "4", "--eval-images", "4", *tiny]) == 0


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
