"""What the command ``serve`` refuses before it serves, and what of the environment it does not heed."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support import web

web.require("gradio")

from support.web import wait_for  # noqa: E402

from pyglow_fast import web as package  # noqa: E402
from pyglow_fast.cli import main  # noqa: E402


@pytest.fixture
def run(tmp_path: Path) -> str:
    """What counts as a run until it is opened."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("")
    return str(tmp_path / "run")


@pytest.mark.parametrize("version", ["5.49.1", "4.0", "?"])
def test_a_gradio_that_is_too_old(
    version: str, run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = ModuleType("gradio")
    old.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gradio", old)
    assert main(["serve", run]) == 2
    wanted = 'gradio: expected version 6 or newer (pip install --upgrade "pyglow-fast[web]")'
    assert capsys.readouterr().err == f"error: {wanted}, found {version}\n"


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_there_is_not(device: str, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    """At once, not when the page is used."""
    assert main(["serve", run, "--device", device]) == 2
    assert capsys.readouterr().err.startswith("error: device: expected")


def test_settings_of_gradio_are_left_out(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come back; a browser that is opened keeps its proxy."""
    seen: dict[str, str] = {}

    def serve(page: Any, **options: Any) -> None:
        seen.update(os.environ)

    monkeypatch.setattr(package, "serve", serve)
    for name in ("GRADIO_VIBE_MODE", "GRADIO_SHARE", "HTTP_PROXY"):
        monkeypatch.setenv(name, "1")
    assert main(["serve", run]) == 0
    assert "HTTP_PROXY" in seen
    assert not [name for name in seen if name.startswith("GRADIO_")]
    assert os.environ["GRADIO_VIBE_MODE"] == os.environ["GRADIO_SHARE"] == "1"


def test_the_options_reach_the_page(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them, and the style of the page."""
    shelves: list[tuple[Any, ...]] = []
    served: list[dict[str, Any]] = []
    monkeypatch.setattr(package, "Shelf", lambda *args: shelves.append(args))
    monkeypatch.setattr(package, "serve", lambda page, **options: served.append(options))
    monkeypatch.setenv("PYGLOW_SERVE_AUTH", "ada:pass word")
    monkeypatch.setattr("sys.stdin", None)
    options = ["--best", "--device", "cpu", "--train-images", "7", "--host", "0.0.0.0", "--port", "1234"]
    assert main(["serve", run, run, *options, "--auth", "ada", "--no-browser"]) == 0
    monkeypatch.delenv("PYGLOW_SERVE_AUTH")
    assert main(["serve", run, "--device", "cpu"]) == 0
    assert shelves[0] == ([run, run], True, "cpu", 7)
    assert shelves[1][:3] == ([run], False, "cpu")
    wanted = {"host": "0.0.0.0", "port": 1234, "auth": ("ada", "pass word"), "open_browser": False}
    assert wanted.items() <= served[0].items()
    assert {"host": "127.0.0.1", "port": None, "auth": None, "open_browser": True}.items() <= served[1].items()
    assert ".pgf-" in served[0]["css"]


def test_a_host_without_a_login_is_refused_before_runs_are_looked_at(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(package, "Shelf", lambda *args: pytest.fail("looked"))
    monkeypatch.delenv("PYGLOW_SERVE_AUTH", raising=False)
    assert main(["serve", run, "--device", "cpu", "--host", "0.0.0.0"]) == 2
    assert capsys.readouterr().err.startswith("error: host: expected 127.0.0.1, or a login")


def test_a_password_is_asked_for_on_a_terminal_alone(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PYGLOW_SERVE_AUTH", raising=False)
    monkeypatch.setattr("getpass.getpass", lambda prompt: pytest.fail("asked"))
    monkeypatch.setattr("sys.stdin", io.StringIO("secret\n"))
    assert main(["serve", run, "--device", "cpu", "--auth", "ada"]) == 2
    assert capsys.readouterr().err.startswith("error: auth: expected a terminal")


@pytest.mark.full
def test_odd_settings_and_proxies_do_not_hinder_the_start(run: str, tmp_path: Path) -> None:
    """Those that Gradio, when imported, takes for a number or cannot speak with."""
    odd = {"GRADIO_SERVER_PORT": "x", "ALL_PROXY": "socks5://127.0.0.1:9", "all_proxy": "nonsense"}
    code = "import sys\nfrom pyglow_fast.cli import main\nsys.exit(main(sys.argv[1:]))"
    with web.Server(["-c", code, "serve", run, "--no-browser"], tmp_path, **odd) as running:
        assert running.log() == ""


@pytest.mark.full
def test_what_takes_long_to_import_waits_until_the_page_answers(run: str, tmp_path: Path) -> None:
    """It is imported then, though nobody has asked for anything, and the first run is opened."""
    code = """
import sys, threading, time
import pyglow_fast.web as web
from pyglow_fast.cli import main
slow = ("matplotlib.figure", "torchvision")
def told(*names):
    return " ".join(name for name in names if name in sys.modules)
def open_run(self, name):
    print("opened", name, file=sys.stderr, flush=True)
    raise ValueError("no run")
def wait():
    while len(told(*slow).split()) < len(slow):
        time.sleep(0.05)
    print("imported:", told(*slow), file=sys.stderr, flush=True)
web.Shelf.open = open_run
threading.excepthook = lambda found: print("thrown:", found, file=sys.stderr, flush=True)
serve = web.serve
def serve_late(*args, **options):
    print("imported:", told(*slow), file=sys.stderr, flush=True)
    threading.Thread(target=wait, daemon=True).start()
    serve(*args, **options)
web.serve = serve_late
sys.exit(main(sys.argv[1:]))
"""
    with web.Server(["-c", code, "serve", run, "--no-browser"], tmp_path) as running:
        wait_for(
            lambda: running.log().splitlines(),
            ["imported: ", f"opened {run}", "imported: matplotlib.figure torchvision"],
        )


@pytest.mark.parametrize("name", ["matplotlib", "torchvision", "PIL"])
def test_a_library_that_is_missing_is_refused_at_once(
    name: str, run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda each, *rest: None if each == name else find(each, *rest))
    monkeypatch.setattr(package, "serve", lambda *args, **options: pytest.fail("served"))
    assert main(["serve", run]) == 2
    assert f"{name.replace('PIL', 'Pillow')} is needed for the page and cannot be imported" in capsys.readouterr().err
