"""Pictures of the page, for the documentation and for whoever changes how it looks.

PYGLOW_SCREENSHOTS=FOLDER has them written there, and PYGLOW_SCREENSHOT_RUN=RUN shows a copy of that run on them rather
than the smallest one there is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from support import web

web.require("gradio", "playwright", "chromium")

from support.web import wait_for  # noqa: E402
from support.web_page import Site, Visitor, data_of, set_slider  # noqa: E402
from support.web_runs import DIGITS, encoded  # noqa: E402

pytestmark = pytest.mark.full  # what a user sees of the page is in tests/contract/test_page.py

FOLDER, RUN = "PYGLOW_SCREENSHOTS", "PYGLOW_SCREENSHOT_RUN"
NO_MOTION = "* { transition: none !important; animation: none !important; caret-color: transparent !important; }"


def prepare(visitor: Visitor) -> None:
    """An edit that is worth looking at."""
    visitor.page.add_style_tag(content=NO_MOTION)
    visitor.tab("Edit")
    visitor.page.locator("#edit-thumbs button").nth(1).click()
    visitor.page.get_by_role("checkbox", name="beside it").check()
    set_slider(visitor.page, "add-0", 1)
    wait_for(lambda: visitor.command("edit-command").count(" rest 1 "), 2)
    visitor.page.locator("#edited [data-part=shifted]").wait_for()
    visitor.idle()


def shot(visitor: Visitor, path: Path) -> None:
    visitor.idle()
    visitor.page.evaluate("() => { document.activeElement.blur(); window.scrollTo(0, 0); }")
    visitor.page.screenshot(path=path, full_page=True, animations="disabled")
    image = Image.open(path).convert("L")
    assert image.width in (1280, 400)
    assert image.height > 300
    dark = sum(image.histogram()[:128])
    assert 0.001 < dark / (image.width * image.height) < 0.999
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # half the bytes, for the documentation


@pytest.mark.drawn
def test_screenshots(visitors: Callable[..., Visitor], site: Site, tmp_path: Path) -> None:
    """One of each tab; of edits also in the dark and on a narrow screen."""
    out = Path(os.environ.get(FOLDER, tmp_path))
    run = Path(os.environ.get(RUN, site.path(DIGITS)))
    served = tmp_path / "served"
    shutil.copytree(run, served / "runs" / run.name)
    words = ["-m", "pyglow_fast", "serve", "runs", "--no-browser", "--device", "cpu"]
    with web.Server(words, served) as server:
        looked: list[Visitor] = []

        def look(name: str, **options: object) -> Visitor:
            visitor = visitors(opened=False, **options)
            visitor.site = Site(server, served)
            visitor.open()
            prepare(visitor)
            shot(visitor, out / name)
            looked.append(visitor)
            return visitor

        visitor = look("edit.png", viewport={"width": 1280, "height": 800})
        saved = visitor.download("Save PNG", "edited")
        visitor.tab("Sample")
        shot(visitor, out / "sample.png")
        visitor.tab("Interpolate")
        shot(visitor, out / "interpolate.png")
        visitor.tab("Score")
        held_out = visitor.page.locator("#path-strip button img").first.get_attribute("src") or ""
        assert held_out.startswith("data:")
        noise = Image.effect_noise((64, 64), 120)
        files = ("edited.png", saved), ("held-out.png", data_of(held_out)), ("noise.png", encoded(noise, "PNG"))
        visitor.give("score-files", *files)
        visitor.page.locator("#scores td", has_text="noise.png").wait_for()
        shot(visitor, out / "score.png")
        visitor.tab("Run")
        visitor.page.frame_locator("#run-page iframe").get_by_role("heading", name="Scores").wait_for()
        shot(visitor, out / "run.png")
        look("edit-dark.png", viewport={"width": 1280, "height": 800}, color_scheme="dark")
        look("edit-narrow.png", viewport={"width": 400, "height": 800})
        for each in looked:
            each.page.goto("about:blank")  # before the server ends
