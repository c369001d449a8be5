"""The page of ``pyglow-fast serve``, once through in a browser, as a visitor finds it: by what is written on it.

A user loses the page where this fails: the login, samples, sliders, paths, scores, or files that tell how they were
made.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from support import web
from support.edits import assert_repeatable
from support.program import done

web.require("gradio")

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page


def log_in(page: Page, password: str) -> None:
    page.get_by_label("username").fill("ada")
    page.get_by_label("password").fill(password)
    page.get_by_role("button", name="Login").click()


def slide(page: Page, name: str) -> None:
    """Moves a slider to its right end."""
    page.get_by_role("slider", name=re.compile(name)).press("End")


def sources(page: Page) -> list[str]:
    """What the pictures show that are in sight."""
    found: Locator = page.get_by_role("img")
    return [address for address in found.evaluate_all("all => all.map(x => x.src || '')") if address]


def changed(page: Page, before: list[str]) -> None:
    web.wait_for(lambda: sources(page) not in ([], before), True)


def saved(page: Page) -> bytes:
    with page.expect_download() as found:
        page.get_by_role("link", name=re.compile("^Save")).first.click()
    return Path(found.value.path()).read_bytes()


def visit(address: str, upload: Path, number: str) -> dict[str, bytes]:
    """Goes through the page and returns the pictures that were saved, by the name of the tab."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=1000 * web.WAIT)
    pictures = {}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=web.chromium(), headless=True, args=web.FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(1000 * web.WAIT)
        thrown: list[object] = []
        asked: list[str] = []
        page.on("pageerror", lambda error: thrown.append(error))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        log_in(page, "wrong")
        expect(page.get_by_text(re.compile("incorrect|wrong", re.IGNORECASE)).first).to_be_visible()
        assert page.get_by_role("tab").count() == 0
        log_in(page, "secret word")

        expect(page.get_by_role("tab", name="Sample", exact=True)).to_be_visible()
        changed(page, [])
        before = sources(page)
        assert len(before) > 4
        slide(page, "temperature")
        changed(page, before)
        pictures["Sample"] = saved(page)

        page.get_by_role("tab", name="Edit", exact=True).click()
        page.get_by_role("slider", name="more like bright").wait_for()
        page.add_style_tag(content="input[type=range] { margin-bottom: 60rem }")  # as far down as many sliders reach
        page.get_by_role("slider", name="level 0").scroll_into_view_if_needed()
        expect(page.get_by_role("img", name="edited")).to_be_in_viewport()
        before = sources(page)
        slide(page, "more like bright")
        changed(page, before)
        pictures["Edit"] = saved(page)

        page.get_by_role("tab", name="Interpolate", exact=True).click()
        expect(page.get_by_role("link", name=re.compile("^Save")).first).to_be_visible()
        before = sources(page)
        slide(page, "the way along the path")
        changed(page, before)
        pictures["Interpolate"] = saved(page)

        page.get_by_role("tab", name="Score", exact=True).click()
        page.get_by_role("tabpanel").locator("input[type=file]").first.set_input_files(upload)
        expect(page.get_by_text(number).first).to_be_visible()

        page.set_viewport_size({"width": 400, "height": 800})  # a phone's
        for tab in ("Sample", "Edit", "Interpolate", "Score", "Run"):
            page.get_by_role("tab", name=tab, exact=True).click()
            expect(page.get_by_role("tab", name=tab, exact=True)).to_have_attribute("aria-selected", "true")
            assert page.evaluate("document.documentElement.scrollWidth") <= 400, tab
        report = page.frame_locator("iframe").locator("html")  # which has no scrollbar of its own
        web.wait_for(lambda: report.evaluate("x => x.scrollHeight > 800 && x.scrollHeight <= innerHeight"), True)
        browser.close()
    assert not thrown
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]  # nobody else was asked
    return pictures


def test_the_page(tiny: Path) -> None:
    """A login; samples and edits that follow a slider; a path; an upload's score; files that tell their command."""
    web.require("playwright", "chromium")
    upload = tiny / "images" / "dark" / "00.png"
    found = re.search(r"([\d.]+) bits/dim", done("score", "run", "images/dark/00.png", "--out", "x.csv"))
    assert found is not None
    words = ["-m", "pyglow_fast", "serve", "run", "--no-browser", "--device", "cpu"]
    with web.Server(words, tiny, PYGLOW_SERVE_AUTH="ada:secret word") as server:
        # In a thread of its own: other tests of this process may drive a browser too.
        with ThreadPoolExecutor(1) as thread:
            pictures = thread.submit(visit, server.address, upload, found[1]).result()
        assert "Traceback" not in server.log()
    for name, data in pictures.items():
        (tiny / f"{name}.png").write_bytes(data)
        assert_repeatable(tiny / f"{name}.png")
