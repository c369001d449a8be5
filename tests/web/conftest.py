"""A headless Chromium, and pages in it that fail a test on whatever goes elsewhere or wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from support import web

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

WAIT = 20_000  # milliseconds that anything may take on a busy machine
FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
FLAGS += ["--no-first-run", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    """A Chromium with a profile of its own; it has a camera, whose picture is made up."""
    web.require("playwright", "chromium")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=WAIT)
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=web.chromium(), headless=True, args=FLAGS
        )
        context.set_default_timeout(WAIT)
        yield context
        context.close()


@pytest.fixture
def visit(browser: BrowserContext) -> Iterator[Callable[[str], Page]]:
    """Opens an address in a new page; at the end the page must have asked nobody else and have met no error."""
    seen: list[tuple[Page, web.Watched, str]] = []

    def open_page(address: str) -> Page:
        page = browser.new_page()
        seen.append((page, web.Watched(page), address))
        page.goto(address)
        return page

    yield open_page
    for page, watched, address in seen:
        page.close()
        watched.check(address)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[web.Server]:
    """The small page, open to all on this machine, whose uploads may have 100 KB."""
    with web.small_server(tmp_path_factory.mktemp("server"), max_file_size=100 * 1024) as server:
        yield server
