"""What the command ``serve`` refuses before it serves, and what of the environment it does not heed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
from support import web
from support.program import pyglow_fast

web.require("gradio")

from pyglow_fast.app import web as package  # noqa: E402
from pyglow_fast.app.cli import main  # noqa: E402


@pytest.fixture
def run(tmp_path: Path) -> str:
    """What counts as a run until it is opened."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("")
    return str(tmp_path / "run")


def test_a_library_that_is_missing_is_refused_at_once(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda each, *rest: None if each == "PIL" else find(each, *rest))
    monkeypatch.setattr(package, "serve", lambda *args, **options: pytest.fail("served"))
    ended = pyglow_fast("serve", run)
    assert (ended.code, "Pillow is needed for the page and cannot be imported" in ended.err) == (2, True)


def test_settings_of_gradio_are_left_out(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are for other pages, and so are proxies."""
    seen: dict[str, str] = {}
    monkeypatch.setattr(package, "serve", lambda *args, **options: seen.update(os.environ))
    names = ("GRADIO_VIBE_MODE", "GRADIO_SHARE", "GRADIO_SERVER_PORT", "HTTP_PROXY")
    for name in names:
        monkeypatch.setenv(name, "1")
    assert main(["serve", run]) == 0
    assert not set(names) & set(seen)


def test_the_options_reach_the_page(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them; without a run that which is shipped is opened."""
    shelves: list[tuple[Any, ...]] = []
    served: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(package, "Shelf", lambda *args, **options: shelves.append((*args, options)))
    monkeypatch.setattr(package, "serve", lambda page, place, **options: served.append((place, options)))
    monkeypatch.setenv("PYGLOW_SERVE_AUTH", "ada:pass word")
    options = ["--last", "--device", "cpu", "--host", "[::]", "--port", "1234"]
    assert main(["serve", run, run, *options, "--no-browser"]) == 0
    monkeypatch.delenv("PYGLOW_SERVE_AUTH")
    assert main(["serve", "--device", "cpu"]) == 0
    assert shelves[0] == ([run, run], True, "cpu", {})
    assert shelves[1] == (["shown"], False, "cpu", {})
    assert served[0][0] == ("::", 1234, ("ada", "pass word"))
    assert served[1][0] == ("127.0.0.1", None, None)
    assert [each["open_browser"] for _, each in served] == [False, True]
