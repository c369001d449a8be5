"""What tests of the web page share: its server in a process, and a browser's page of which everything is noted."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from support import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import ConsoleMessage, Page, Request

MUST = "PYGLOW_BROWSER"  # "must": what is missing fails a test instead of skipping it
START = 60.0  # seconds that a server may take to print its address on a busy machine
SMALL_PAGE = ROOT / "tests" / "web" / "small_page.py"


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
        process: a ``subprocess.Popen``.
        cwd: its current folder, which also has its temporary files.
    """

    def __init__(self, arguments: list[str], cwd: Path, **environment: str) -> None:
        self.cwd = cwd
        self._err = Path(tempfile.mkstemp(prefix="serve-", suffix=".log", dir=cwd)[1])
        settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(cwd), **environment}
        with self._err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, *arguments], cwd=cwd, env=settings, stdout=subprocess.PIPE, stderr=err, text=True
            )
        assert self.process.stdout is not None
        guard = threading.Timer(START, self.process.kill)
        guard.start()
        self.first = self.process.stdout.readline()
        guard.cancel()
        words = [word for word in self.first.split() if word.startswith(("http://", "https://"))]
        if len(words) != 1:
            self.end()
            pytest.fail(f"no server: {self.first!r}, {self.log()}")
        self.address = words[0]

    @property
    def host(self) -> str:
        """The address as a Host header has it."""
        return urlsplit(self.address).netloc

    def log(self) -> str:
        """What it wrote to stderr."""
        return self._err.read_text()

    def end(self, signum: int = signal.SIGTERM) -> float:
        """Sends a signal and returns the seconds that the process lived on."""
        begun = time.monotonic()
        self.process.send_signal(signum)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        return time.monotonic() - begun

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.end()
        assert self.process.stdout is not None
        self.process.stdout.close()


def small_server(folder: Path, **options: Any) -> Server:
    """The server of tests/web/small_page.py; the options are those of ``serve``."""
    require("gradio")
    return Server([str(SMALL_PAGE), json.dumps(options)], folder)


def handler_index(server: Server, button: str) -> int:
    """The number by which a request names the handler of a button."""
    with urllib.request.urlopen(f"{server.address}config") as answer:
        config = json.load(answer)
    (target,) = [part["id"] for part in config["components"] if part["props"].get("value") == button]
    (index,) = [handler["id"] for handler in config["dependencies"] if [target, "click"] in handler["targets"]]
    return int(index)


class Watched:
    """Notes what a page asks for, what its console says and what it throws; :meth:`check` finds what must not be."""

    def __init__(self, page: Page) -> None:
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.dialogs: list[str] = []
        page.on("request", self._asked)
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.errors.append(f"thrown: {error}"))
        page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))

    def _asked(self, request: Request) -> None:
        self.requests.append(request.url)

    def _said(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(f"console: {message.text}")

    def check(self, address: str) -> None:
        """Fails on requests to any other server, on errors in the console, exceptions and dialogs."""
        foreign = self.foreign(address)
        assert not foreign, foreign
        assert not self.errors, self.errors
        assert not self.dialogs, self.dialogs

    def foreign(self, address: str) -> list[str]:
        """What was asked for of any other server than that at ``address``."""
        own = urlsplit(address)[:2]
        parts = [(url, urlsplit(url)) for url in self.requests]
        return [url for url, part in parts if part.scheme not in ("data", "blob") and part[:2] != own]
