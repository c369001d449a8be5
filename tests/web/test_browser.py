"""The small page in a Chromium: it works under its policy, shows errors as text, and takes pictures from everywhere."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import web

web.require("gradio", "playwright", "chromium")

from playwright.sync_api import expect  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

Visit = Callable[[str], web.Watched]


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def told(page: Page, text: str) -> None:
    expect(page.get_by_label("Out")).to_have_value(text)


def test_a_handler_answers(visit: Visit, small: web.Server) -> None:
    page = visit(small.address).page
    expect(page).to_have_title("A small page")
    press(page, "Double")
    told(page, "twice: 6")
    assert page.locator("footer").count() == 0


def test_errors_are_text(visit: Visit, small: web.Server) -> None:
    """Markup of any kind in a message is shown as it is; a fault tells its class and no more."""
    watched = visit(small.address)
    page = watched.page
    press(page, "Bad input")
    assert watched.toast() == "<img src=x onerror=alert(1)> **bold** [link](javascript:alert(1))"
    press(page, "Count")
    told(page, "one")
    assert watched.toast() == "the generator stops at two.png"
    assert "secret" not in small.log()
    press(page, "Fault")
    assert watched.toast() == "KeyError: this should not have happened; the traceback is in the log of the server."
    assert "/srv/secret/file.txt" in small.log()


def cached(small: web.Server) -> list[Path]:
    (cache,) = small.cwd.glob("pyglow-serve-*")
    return [path for path in cache.rglob("*") if path.is_file()]


def test_files_reach_the_handler_and_leave_the_disk(visit: Visit, small: web.Server, tmp_path: Path) -> None:
    page = visit(small.address).page
    picture = tmp_path / "a cat <b>.png"
    picture.write_bytes(PNG)
    image = page.locator("input[type=file]").first
    image.set_input_files(picture)
    told(page, f"a cat <b>.png: {len(PNG)} bytes")
    (tmp_path / "notes.txt").write_text("not a picture")
    page.locator("input[type=file]").last.set_input_files([picture, tmp_path / "notes.txt"])
    told(page, f"a cat <b>.png: {len(PNG)} bytes; notes.txt: 13 bytes")
    web.wait_for(lambda: cached(small), [])


def test_a_camera_and_the_clipboard_name_their_pictures(
    visit: Visit, small: web.Server, browser: BrowserContext
) -> None:
    page = visit(small.address).page
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.evaluate(  # not wait_for_function, which the policy forbids
        """async () => {
            while (!(document.querySelector("video")?.videoWidth > 0)) await new Promise(done => setTimeout(done, 20));
        }"""
    )
    page.get_by_label("capture photo").click()
    expect(page.get_by_label("Out")).to_have_value(re.compile(r"^image\.png: \d+ bytes$"))
    browser.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(
        """async () => {
            const canvas = Object.assign(document.createElement("canvas"), {width: 3, height: 2});
            const blob = await new Promise(done => canvas.toBlob(done));
            await navigator.clipboard.write([new ClipboardItem({"image/png": blob})]);
        }"""
    )
    page.get_by_label("Paste from clipboard").click()
    expect(page.get_by_label("Out")).to_have_value(re.compile(r"^clipboard\.png: \d+ bytes$"))


def test_a_file_that_is_too_large_is_refused_in_words(visit: Visit, small: web.Server, tmp_path: Path) -> None:
    watched = visit(small.address)
    large = tmp_path / "large.png"
    large.write_bytes(PNG + bytes(100 * 1024))
    watched.page.locator("input[type=file]").first.set_input_files(large)
    assert "maximum" in watched.toast()


def test_what_goes_elsewhere_is_blocked_and_noted(browser: BrowserContext, small: web.Server) -> None:
    """The policy stops it, and what watches the pages of these tests sees it and every error."""
    page = browser.new_page()
    watched = web.Watched(page)
    page.goto(small.address)
    with contextlib.closing(page):
        blocked = page.evaluate(
            """async () => {
                const found = [];
                document.addEventListener("securitypolicyviolation", event => found.push(event.effectiveDirective));
                await fetch("http://127.0.0.1:9/").catch(() => null);
                const image = document.createElement("img");
                await new Promise(done => { image.onerror = done; image.src = "http://127.0.0.1:9/a.png"; });
                const script = document.createElement("script");
                await new Promise(done => {
                    script.onerror = done; script.src = "http://127.0.0.1:9/a.js"; document.head.append(script); });
                return found;
            }"""
        )
        assert sorted(blocked) == ["connect-src", "img-src", "script-src-elem"]
        page.evaluate("() => { console.error('told'); setTimeout(() => { alert('hello'); throw new Error('lost'); }) }")
        page.wait_for_event("pageerror") if not any("lost" in error for error in watched.errors) else None
    assert {f"http://127.0.0.1:9/{name}" for name in ("a.png", "a.js")} <= set(watched.foreign(small.address))
    assert watched.dialogs == ["hello"]
    assert "console: told" in watched.errors
    assert any("lost" in error for error in watched.errors)
    with pytest.raises(AssertionError):
        watched.check(small.address)


def started_browsers() -> list[list[str]]:
    """The command lines of the browsers that this process, or one that it started, has started."""
    parents, lines = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            lines[int(folder.name)] = (folder / "cmdline").read_text().split("\0")
    found = []
    for process, line in lines.items():
        above = process
        while above not in (0, os.getpid()):
            above = parents.get(above, 0)
        starts = [word.partition("=")[0] for word in line]
        if above and "--user-data-dir" in starts and "--type" not in starts:  # not one of a browser's own processes
            found.append(line)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc, where processes are listed")
def test_browsers_ask_nobody_by_themselves_and_share_nothing(browser: BrowserContext, chromium: Browser) -> None:
    lines = started_browsers()
    assert len(lines) >= 2
    for line in lines:
        assert {"--headless", "--no-sandbox", "--disable-background-networking", "--disable-component-update"} <= {
            *line
        }
        assert {"--disable-sync", "--no-first-run"} <= {*line}
    profiles = [word for line in lines for word in line if word.startswith("--user-data-dir=")]
    assert len(set(profiles)) == len(lines)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[web.Server]:
    with web.small_server(tmp_path_factory.mktemp("guarded"), auth=["ada", "pass word"]) as server:
        yield server


def test_a_login_in_the_browser(visit: Visit, guarded: web.Server) -> None:
    page = visit(guarded.address).page
    page.get_by_label("username").fill("ada")
    page.get_by_label("password").fill("pass word")
    press(page, "Login")
    press(page, "Double")
    told(page, "twice: 6")


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c4944415408d763f8ffff3f0005fe02fea135810a0000000049454e44ae426082"
)
