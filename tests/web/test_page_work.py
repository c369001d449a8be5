"""What the page computes, and what it does not, while it is looked at in a browser: things are counted, never timed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import web

web.require("gradio", "playwright", "chromium")

from support.web import wait_for  # noqa: E402
from support.web_page import Site, Visitor, drag, slider  # noqa: E402
from support.web_runs import COLOUR, DIGITS  # noqa: E402

# The page, which tells in its log what it makes; no edit is done while there is a file "hold".
TELLING = """
import json, sys, time
from pathlib import Path
from pyglow_fast.cli import main
from pyglow_fast.studio import Between, Subject
from pyglow_fast.web import run_tab

def tell(place, name, words):
    function = getattr(place, name)
    def call(*args, **options):
        print("made:", words, file=sys.stderr, flush=True)
        while words == "edit" and Path("hold").exists():
            time.sleep(0.01)
        return function(*args, **options)
    setattr(place, name, call)

tell(run_tab, "page_of", "report")
tell(Between, "frames", "path")
tell(Subject, "edited", "edit")
sys.exit(main(json.loads(sys.argv[1])))
"""


@pytest.fixture
def telling(site: Site, tmp_path: Path) -> Iterator[Site]:
    for name in (DIGITS, COLOUR):
        shutil.copytree(site.path(name), tmp_path / "runs" / name)
    words = ["serve", "runs", "--no-browser", "--device", "cpu"]
    with web.Server(["-c", TELLING, json.dumps(words)], tmp_path) as server:
        yield Site(server, tmp_path)


def looking(visitors: Callable[..., Visitor], site: Site) -> Visitor:
    visitor = visitors(opened=False)
    visitor.site = site
    visitor.open()
    return visitor


def made(site: Site, words: str) -> int:
    return site.server.log().count(f"made: {words}\n")


def test_a_tab_is_made_when_it_is_looked_at(telling: Site, visitors: Callable[..., Visitor]) -> None:
    """The report once for all visitors; the strip and the frame of the paths once for a visitor and a run."""
    one, other = looking(visitors, telling), looking(visitors, telling)
    one.tab("Edit")
    one.idle()
    assert (made(telling, "report"), made(telling, "path")) == (0, 0)
    for name in ("Run", "Sample", "Run"):
        one.tab(name)
        one.idle()
    other.tab("Run")
    other.idle()
    assert (made(telling, "report"), made(telling, "path")) == (1, 0)
    other.choose_run(COLOUR)
    other.page.frame_locator("#run-page iframe").get_by_role("heading", name="a Glow on folder").wait_for()
    assert (made(telling, "report"), made(telling, "path")) == (2, 0)
    for name in ("Interpolate", "Sample", "Interpolate"):
        one.tab(name)
        wait_for(lambda: "\n" in one.command("path-command"), True)  # of the frame, and of the strip
        one.idle()
    assert (made(telling, "report"), made(telling, "path")) == (2, 2)
    one.choose_run(COLOUR)
    wait_for(lambda: "<b>" in one.command("path-command").partition("\n")[2], True)
    one.idle()
    assert (made(telling, "report"), made(telling, "path")) == (2, 4)
    for each in (one, other):
        each.page.goto("about:blank")


def test_of_the_drags_while_an_edit_is_computed_the_last_alone_follows(
    telling: Site, visitors: Callable[..., Visitor]
) -> None:
    """However slow the server is; and its image is the one that stays."""
    visitor = looking(visitors, telling)
    visitor.tab("Edit")
    visitor.idle()
    before = made(telling, "edit")
    (telling.folder / "hold").touch()
    drag(visitor.page, "add-1", 0.6)
    wait_for(lambda: made(telling, "edit"), before + 1)
    drag(visitor.page, "add-1", *(0.6 + i / 100 for i in range(30)))
    at = float(slider(visitor.page, "add-1").input_value())
    assert at > 2
    (telling.folder / "hold").unlink()
    wait_for(lambda: f"--add 1 rest {at:g} " in visitor.command("edit-command"), True)
    visitor.idle()
    assert f"--add 1 rest {at:g} " in visitor.command("edit-command")
    assert made(telling, "edit") == before + 2
    visitor.page.goto("about:blank")
