"""The documentation site builds without a warning and without a network, and its reference has every public name."""

from __future__ import annotations

import html
import importlib
import re
import socket
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort
from mkdocstrings import Inventory
from support import ROOT
from support.machine import no_network
from support.public_names import MODULES, PACKAGE, public

# What nobody but the package itself imports; everything else has a page in docs/reference.
INTERNAL = {"autograd", "cli", "convolutions", "coupling_nets", "info", "ops", "reversible", "web"}


def build_site(folder: Path, **changes: object) -> Path:
    """The site in ``folder``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", no_network)
        patch.chdir(ROOT)
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), **changes)
        config.plugins.run_event("startup", command="build", dirty=False)
        try:
            build(config)
        finally:
            config.plugins.run_event("shutdown")
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site; a warning would have ended its making."""
    return build_site(tmp_path_factory.mktemp("site"))


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    with (site / "objects.inv").open("rb") as file:
        known = set(Inventory.parse_sphinx(file))
    modules = [importlib.import_module(name) for name in (PACKAGE, *MODULES)]
    offered = {f"{value.__module__}.{value.__qualname__}" for module in modules for value in public(module)}
    assert len(offered) > 100
    assert sorted(offered - known) == []


def test_every_part_of_the_package_has_a_page() -> None:
    parts = {path.stem for path in (ROOT / PACKAGE).iterdir() if path.suffix in ("", ".py")}
    public_parts = {name for name in parts if not name.startswith("_") and name != "py"} - INTERNAL
    assert sorted(public_parts - {name.split(".")[1] for name in MODULES}) == []


def test_docstrings_come_out_as_they_were_meant(site: Path) -> None:
    pages = sorted((site / "reference").glob("*.html"))
    assert len(pages) > 10
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r":(?:func|class|meth|mod):", text), path
        assert not re.findall(r"<em>[^<]*[ ,)]", text), path  # two asterisks of a formula taken for emphasis
        for line in re.findall(r'^.*class="gp">.*$', text, re.MULTILINE):  # an example is code, not Markdown
            shown = html.unescape(re.sub(r"<[^>]+>", "", line))
            assert "\\*" not in shown, (path, shown)
            assert "&lt;" not in shown, (path, shown)
    layers = (site / "reference" / "layers.html").read_text(encoding="utf-8")
    assert "y1 = x1, y2 = (x2 + shift) s with (shift, raw) = net(x1), s = scale_map(raw)" in layers
    assert "(N, C, *spatial)" in layers
    for name in ("scale_bias", "scale_eps"):  # one line of the docstring
        assert re.search(rf"<code>{name}</code>(?:(?!<li).)*<p>of the sigmoid map", layers, re.DOTALL), name


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img)[^>]* src=\"(.*?)\"|<link[^>]* href=\"(.*?)\"", path.read_text("utf-8"))
        assert not [name for pair in loaded for name in pair if name.startswith(("http:", "https:", "//"))], path


def test_a_broken_link_ends_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    sound = "[here](index.md)\n"
    (tmp_path / "docs" / "index.md").write_text(sound)
    build_site(tmp_path / "site", docs_dir=str(tmp_path / "docs"), nav=["index.md"])
    (tmp_path / "docs" / "index.md").write_text(sound + "[gone](gone.md)\n")
    with pytest.raises(Abort, match="1 warnings"):
        build_site(tmp_path / "site", docs_dir=str(tmp_path / "docs"), nav=["index.md"])
