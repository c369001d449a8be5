"""The page in a browser, as it looks and follows: what tests/contract/test_page.py, which goes through it, leaves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import web
from support.web import Server, wait_for

web.require("gradio", "playwright", "chromium")

from playwright.sync_api import sync_playwright  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.full
TABS = ("Sample", "Edit", "Interpolate", "Score", "Run")
FILLED = {"Sample": "#samples img", "Edit": "#edited img", "Interpolate": "#path-frame img"}
FILLED |= {"Score": "#scores img", "Run": "#run-page iframe"}


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[Server]:
    """The page of two runs."""
    words = ["-m", "pyglow_fast", "serve", "runs/digits", "runs/colour", "--no-browser", "--device", "cpu"]
    with Server(words, runs.parent) as server:
        yield server
        assert "Traceback" not in server.log()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=web.chromium(), args=web.FLAGS)
        yield browser
        browser.close()


@pytest.fixture(params=[1280, 400])
def page(request: pytest.FixtureRequest, server: Server, browser: Browser) -> Iterator[Page]:
    """A visitor's, of 1280 x 800 pixels or a phone's; nobody else was asked, and nothing thrown."""
    context = browser.new_context(viewport={"width": request.param, "height": 800})
    page = context.new_page()
    page.set_default_timeout(1000 * web.WAIT)
    asked: list[str] = []
    thrown: list[object] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: thrown.append(error))
    page.goto(server.address)
    page.locator(FILLED["Sample"]).first.wait_for()
    yield page
    context.close()
    assert not [url for url in asked if not url.startswith((server.address, "data:", "blob:"))]
    assert not thrown


def look(page: Page, tab: str) -> None:
    page.get_by_role("tab", name=tab, exact=True).click()
    page.locator(FILLED[tab]).first.wait_for()


def command(page: Page) -> str:
    return page.locator("textarea:visible").first.input_value()


def drag(page: Page, name: str, key: str = "ArrowRight") -> None:
    page.get_by_role("slider", name=name).first.press(key)


def test_every_tab_fits_and_shows_a_picture(page: Page) -> None:
    """On the first screen, and no wider than it; the picture is the run's."""
    screen = page.viewport_size
    assert screen is not None
    for tab in TABS:
        look(page, tab)
        picture = page.locator(FILLED[tab]).first.bounding_box()
        assert picture is not None
        assert picture["y"] + min(picture["height"], 100) <= screen["height"], tab
        assert page.evaluate("document.documentElement.scrollWidth") <= screen["width"], tab
    look(page, "Edit")
    edited, original = (page.locator(f"[data-part={part}] img").bounding_box() for part in ("edited", "original"))
    assert edited is not None
    assert original is not None
    assert edited["width"] > 2 * original["width"]
    assert edited["width"] > 0.5 * min(screen["width"], 700)


def test_edits_follow_their_sliders(page: Page) -> None:
    """The image, its words and its command; a sample that is clicked and an upload come under edit; errors are told."""
    page.locator("#samples button").nth(3).click()
    page.locator(FILLED["Edit"]).first.wait_for()
    wait_for(lambda: "sample:3" in command(page), True)
    page.get_by_role("slider", name="more like 3").first.wait_for()
    before = page.locator("[data-part=edited] img").get_attribute("src")
    drag(page, "more like 3", "End")
    wait_for(lambda: "--add 3 rest " in command(page), True)
    wait_for(lambda: page.locator("[data-part=edited] img").get_attribute("src") != before, True)
    page.get_by_role("button", name="Back to the original").click()
    wait_for(lambda: "--add" in command(page), False)
    give = page.locator("#edit-upload input[type=file]")
    give.set_input_files({"name": "no.png", "mimeType": "image/png", "buffer": b"no"})
    page.get_by_test_id("toast-text").get_by_text("no.png: expected an image").first.wait_for()
    wait_for(lambda: page.locator("#edit-upload img").count(), 0)  # it can be dropped into again
    photo = web.encoded(web.photo(40, 30))
    give.set_input_files({"name": "mine.png", "mimeType": "image/png", "buffer": photo})
    wait_for(lambda: " mine.png " in command(page), True)
