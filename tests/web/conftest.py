"""A headless Chromium, and pages in it that fail a test on whatever goes elsewhere or wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from support import machine, web

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Playwright
    from support.web_page import Site, Visitor

WAIT = 1000 * web.WAIT  # in milliseconds
FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
FLAGS += ["--no-first-run", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@pytest.fixture(scope="session")
def playwright() -> Iterator[Playwright]:
    """What drives all browsers of a process: there can be one."""
    web.require("playwright", "chromium")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=WAIT)
    with sync_playwright() as found:
        yield found


@pytest.fixture(scope="module")
def browser(playwright: Playwright, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    """A Chromium with a profile of its own; it has a camera, whose picture is made up."""
    context = playwright.chromium.launch_persistent_context(
        tmp_path_factory.mktemp("profile"), executable_path=web.chromium(), headless=True, args=FLAGS
    )
    context.set_default_timeout(WAIT)
    yield context
    context.close()


@pytest.fixture
def visit(browser: BrowserContext) -> Iterator[Callable[[str], web.Watched]]:
    """Opens an address in a new page; at the end the page must have asked nobody else and have met no error."""
    seen: list[tuple[web.Watched, str]] = []

    def open_page(address: str) -> web.Watched:
        watched = web.Watched(browser.new_page())
        seen.append((watched, address))
        watched.page.goto(address)
        return watched

    yield open_page
    for watched, address in seen:
        watched.page.close()
        watched.check(address)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[web.Server]:
    """The small page, open to all on this machine, whose uploads may have 100 KB."""
    with web.small_server(tmp_path_factory.mktemp("server"), max_file_size=100 * 1024) as server:
        yield server


@pytest.fixture(scope="session")
def chromium(playwright: Playwright) -> Iterator[Browser]:
    """A Chromium in which each test has a context of its own."""
    browser = playwright.chromium.launch(executable_path=web.chromium(), headless=True, args=FLAGS)
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The page of small runs, served by the command. Its runs are not to be changed."""
    web.require("gradio", "playwright", "chromium")
    from support import figures, web_page, web_runs

    figures.leave_undrawn()
    made = machine.made_once(tmp_path_factory, "web-runs", web_runs.make)
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(made / "runs", folder / "runs")  # what is measured is kept in the folder of a run
    words = ["-m", "pyglow_fast", "serve", "runs", "--no-browser", "--device", "cpu"]
    with web.Server(words, folder) as server:
        yield web_page.Site(server, folder)


@pytest.fixture
def visitors(chromium: Browser, site: Site) -> Iterator[Callable[..., Visitor]]:
    """Opens the page in a context of its own. At the end nobody else was asked, and no error seen or logged.

    Its arguments are those of a browser's context. A test that causes an error empties ``watched.errors``.
    """
    from support.web_page import Visitor

    found: list[tuple[BrowserContext, Visitor]] = []
    before = len(site.server.log())

    def open_page(opened: bool = True, **options: Any) -> Visitor:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 1000}} | options)
        context.set_default_timeout(WAIT)
        visitor = Visitor(site, context.new_page())
        found.append((context, visitor))
        if opened:
            visitor.open()
        return visitor

    yield open_page
    for context, visitor in found:
        context.close()
        visitor.forgive()
        visitor.watched.check(visitor.site.server.address)
    if found:
        assert "Traceback" not in site.server.log()[before:]


@pytest.fixture
def visitor(visitors: Callable[..., Visitor]) -> Visitor:
    """A page that is loaded."""
    return visitors()
