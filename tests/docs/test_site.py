"""The documentation site builds without a warning and without a network, and its reference has every public name."""

from __future__ import annotations

import importlib
import re
import socket
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocstrings import Inventory
from support import ROOT
from support.machine import no_network
from support.public_names import MODULES, PACKAGE, public


@pytest.mark.full
def test_the_site_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.chdir(ROOT)
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path))
    config.plugins.run_event("startup", command="build", dirty=False)
    build(config)  # a warning, such as that of a broken link, ends it
    config.plugins.run_event("shutdown")

    with (tmp_path / "objects.inv").open("rb") as file:
        known = set(Inventory.parse_sphinx(file))
    modules = [importlib.import_module(name) for name in (PACKAGE, *MODULES)]
    offered = {f"{value.__module__}.{value.__qualname__}" for module in modules for value in public(module)}
    assert len(offered) > 100
    assert sorted(offered - known) == []
    for path in tmp_path.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img)[^>]* src=\"(.*?)\"|<link[^>]* href=\"(.*?)\"", path.read_text("utf-8"))
        elsewhere = [name for pair in loaded for name in pair if name.startswith(("http:", "https:", "//"))]
        assert not elsewhere, path
