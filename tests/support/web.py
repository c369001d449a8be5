"""What tests of the web page share: its server in a process, and a browser's page of which everything is noted."""

from __future__ import annotations

import asyncio
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
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import pytest
import torch

from support import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import ConsoleMessage, Page, Request

Value = TypeVar("Value")

MUST = "PYGLOW_BROWSER"  # "must": what is missing fails a test instead of skipping it
WAIT = 120.0  # seconds that anything may take on a busy machine, where a test waits for it
START = 2 * WAIT  # seconds that a server may take to print its address
SMALL_PAGE = ROOT / "tests" / "web" / "small_page.py"
# Tells of each message that pops up on a page, which goes by itself after some seconds: its text, and how many elements
# are in it.
NOTE_TOASTS = """
if (window === window.top) {
    const seen = new WeakSet();
    new MutationObserver(() => document.querySelectorAll("[data-testid=toast-text]").forEach(found => {
        if (seen.has(found) || !found.textContent) return;
        seen.add(found);
        noteToast(found.innerText, found.querySelectorAll("*").length);
    })).observe(document, {childList: true, subtree: true, characterData: true});
}
"""


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
        command = [*_with_its_parent(), sys.executable, *arguments]
        with tempfile.NamedTemporaryFile("w", prefix="serve-", suffix=".log", dir=cwd, delete=False) as err:
            self._err = Path(err.name)
            self.process = subprocess.Popen(
                command, cwd=cwd, env=settings, stdout=subprocess.PIPE, stderr=err, text=True
            )
        try:
            self.address = self._started()
        except BaseException:  # a test that is interrupted, too
            self.__exit__(None, None, None)
            raise

    def _started(self) -> str:
        """Waits for the first line and returns the address in it."""
        assert self.process.stdout is not None
        guard = threading.Timer(START, self.process.kill)
        guard.start()
        try:
            self.first = self.process.stdout.readline()
        finally:
            guard.cancel()
        words = [word for word in self.first.split() if word.startswith(("http://", "https://"))]
        if len(words) != 1:
            self.end()
            pytest.fail(f"no server: {self.first!r}, {self.log()}")
        return words[0]

    @property
    def host(self) -> str:
        """The address as a Host header has it."""
        return urlsplit(self.address).netloc

    def log(self) -> str:
        """What it wrote to stderr."""
        return self._err.read_text()

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


def _with_its_parent() -> list[str]:
    """The beginning of a command that ends when the process that starts it does, killed or not, where there is one."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM"] if setpriv else []


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
    """Notes what a page asks for, says in its console, throws and pops up; :meth:`check` finds what must not be.

    Attributes:
        page: the page.
        requests: the addresses that were asked for.
        errors: those of the console, and exceptions.
        dialogs: texts of dialogs.
        toasts: messages that popped up and were not read yet, each with how many elements are in it.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.dialogs: list[str] = []
        self.toasts: list[tuple[str, int]] = []
        page.expose_function("noteToast", self._popped_up)
        page.add_init_script(NOTE_TOASTS)
        page.on("request", self._asked)
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.errors.append(f"thrown: {error}"))
        page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))

    def _popped_up(self, text: str, elements: int) -> None:
        if not text.startswith("Connection to the server was lost"):  # Gradio says it of a page that is left
            self.toasts.append((text, elements))

    def _asked(self, request: Request) -> None:
        self.requests.append(request.url)

    def _said(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(f"console: {message.text}")

    def wait_for_toasts(self) -> None:
        """Waits until a message has popped up."""
        wait_for(lambda: (self.page.evaluate("1"), len(self.toasts) > 0)[1], True)  # calls come while the page is asked

    def toast(self) -> str:
        """Waits for messages that pop up, which say one thing and have no elements in them; closes them, returns it."""
        self.wait_for_toasts()
        close = self.page.get_by_test_id("toast-close")
        wait_for(lambda: close.evaluate_all("found => (found.forEach(each => each.click()), found.length)"), 0)
        found = set(self.toasts)
        self.toasts.clear()
        ((text, elements),) = found
        assert elements == 0, text
        return text

    def check(self, address: str) -> None:
        """Fails on requests to any other server, errors in the console, exceptions, dialogs, messages nobody read."""
        foreign = self.foreign(address)
        assert not foreign, foreign
        assert not self.errors, self.errors
        assert not self.dialogs, self.dialogs
        assert not self.toasts, self.toasts

    def foreign(self, address: str) -> list[str]:
        """What was asked for of any other server than that at ``address``."""
        own = urlsplit(address)[:2]
        parts = [(url, urlsplit(url)) for url in self.requests]
        return [url for url, part in parts if part.scheme not in ("data", "blob") and part[:2] != own]


def completed(work: Coroutine[Any, Any, Value]) -> Value:
    """Runs a coroutine to its end in a thread of its own: in this one Playwright's event loop may be running."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def wait_for(read: Callable[[], Value], wanted: Value) -> None:
    """Reads until what is read is what is wanted, and fails with both when it never is."""
    end, found = time.monotonic() + WAIT, read()
    while not _same(found, wanted):
        if time.monotonic() > end:
            assert _same(found, wanted), f"found {found!r}\nwanted {wanted!r}"
        time.sleep(0.02)
        found = read()


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, torch.Tensor):
        return found.shape == wanted.shape and torch.equal(found, wanted)
    return bool(found == wanted)
