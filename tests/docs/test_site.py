"""The documentation site builds without a warning and without a network, and its reference has every public name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocstrings import Inventory
from support import ROOT, web
from support.machine import no_network

PACKAGE = "pyglow_fast"
# What pages of the reference show whole; of these the modules, but for the package itself, whose names are elsewhere.
SHOWN = [
    name
    for path in sorted((ROOT / "docs" / "reference").glob("*.md"))
    for name in re.findall(r"^::: ([\w.]+)$(?!\n    )", path.read_text(encoding="utf-8"), re.MULTILINE)
]
MODULES = [name for name in SHOWN if name != PACKAGE and isinstance(pkgutil.resolve_name(name), ModuleType)]


def public(module: ModuleType) -> Iterator[type]:
    """The classes and functions that a module offers and that are this package's."""
    names = [*getattr(module, "__all__", ()), *(item.__name__ for item in getattr(module, "OURS", ()))]
    for name in names or [name for name in vars(module) if not name.startswith("_")]:
        value = getattr(module, name)
        is_ours = (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith(f"{PACKAGE}.")
        if is_ours and (names or value.__module__ == module.__name__):
            yield value


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a network. A warning, such as that of a broken link, fails."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", no_network)
        patch.chdir(ROOT)
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
        config.plugins.run_event("startup", command="build", dirty=False)
        build(config)
        config.plugins.run_event("shutdown")
    return folder


@pytest.mark.full
def test_the_site_is_whole(site: Path) -> None:
    with (site / "objects.inv").open("rb") as file:
        known = set(Inventory.parse_sphinx(file))
    modules = [importlib.import_module(name) for name in (PACKAGE, *MODULES)]
    offered = {f"{value.__module__}.{value.__qualname__}" for module in modules for value in public(module)}
    aliased = [pkgutil.resolve_name(name) for name in SHOWN if name in known and name not in (PACKAGE, *MODULES)]
    known |= {f"{value.__module__}.{value.__qualname__}" for value in aliased}
    assert len(offered) > 100
    assert sorted(offered - known) == []
    for path in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img)[^>]* src=\"(.*?)\"|<link[^>]* href=\"(.*?)\"", path.read_text("utf-8"))
        elsewhere = [name for pair in loaded for name in pair if name.startswith(("http:", "https:", "//"))]
        assert not elsewhere, path


@pytest.mark.full
def test_the_search_works_from_the_disk(site: Path) -> None:
    """A word in the box of any page leads to a list of links, and a link to a page that is there."""
    web.require("playwright", "chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=web.chromium(), args=web.FLAGS)
        page = browser.new_page()
        page.goto((site / "tour.html").as_uri())
        page.fill("input[name=q]", "onnx")
        page.press("input[name=q]", "Enter")
        page.wait_for_selector("#mkdocs-search-results a")
        page.click("#mkdocs-search-results a >> nth=0")
        page.wait_for_url("**/export.html*")
        browser.close()
