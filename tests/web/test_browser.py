"""The small page in a Chromium: it works under its policy, shows errors as text, and takes pictures from everywhere."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import web

web.require("gradio", "playwright", "chromium")

from playwright.sync_api import expect  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

Visit = Callable[[str], "Page"]


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def told(page: Page, text: str) -> None:
    expect(page.get_by_label("Out")).to_have_value(text)


def toast(page: Page, text: str) -> None:
    """There is one toast, it says this, and it has no elements in its text."""
    message = page.get_by_test_id("toast-text")
    expect(message).to_have_text(text)
    assert message.locator("*").count() == 0
    page.get_by_test_id("toast-close").click()
    expect(message).to_have_count(0)


def test_a_handler_answers(visit: Visit, small: web.Server) -> None:
    page = visit(small.address)
    expect(page).to_have_title("A small page")
    press(page, "Double")
    told(page, "twice: 6")
    assert page.locator("footer").count() == 0


def test_errors_are_text(visit: Visit, small: web.Server) -> None:
    """Markup of any kind in a message is shown as it is; a fault tells its class and no more."""
    page = visit(small.address)
    press(page, "Bad input")
    toast(page, "<img src=x onerror=alert(1)> **bold** [link](javascript:alert(1))")
    press(page, "Count")
    told(page, "one")
    toast(page, "the generator stops at two.png")
    assert "secret" not in small.log()
    press(page, "Fault")
    toast(page, "KeyError: this should not have happened; the traceback is in the log of the server.")
    assert "/srv/secret/file.txt" in small.log()


def cached(small: web.Server) -> list[Path]:
    (cache,) = small.cwd.glob("pyglow-serve-*")
    return [path for path in cache.rglob("*") if path.is_file()]


def test_files_reach_the_handler_and_leave_the_disk(visit: Visit, small: web.Server, tmp_path: Path) -> None:
    page = visit(small.address)
    picture = tmp_path / "a cat <b>.png"
    picture.write_bytes(PNG)
    image = page.locator("input[type=file]").first
    image.set_input_files(picture)
    told(page, f"a cat <b>.png: {len(PNG)} bytes")
    (tmp_path / "notes.txt").write_text("not a picture")
    page.locator("input[type=file]").last.set_input_files([picture, tmp_path / "notes.txt"])
    told(page, f"a cat <b>.png: {len(PNG)} bytes; notes.txt: 13 bytes")
    end = time.monotonic() + 15
    while cached(small) and time.monotonic() < end:
        time.sleep(0.1)
    assert cached(small) == []


def test_a_camera_and_the_clipboard_name_their_pictures(
    visit: Visit, small: web.Server, browser: BrowserContext
) -> None:
    page = visit(small.address)
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
    page = visit(small.address)
    large = tmp_path / "large.png"
    large.write_bytes(PNG + bytes(100 * 1024))
    page.locator("input[type=file]").first.set_input_files(large)
    expect(page.get_by_test_id("toast-text")).to_have_text(re.compile("maximum"))


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


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[web.Server]:
    with web.small_server(tmp_path_factory.mktemp("guarded"), auth=["ada", "pass word"]) as server:
        yield server


def test_a_login_in_the_browser(visit: Visit, guarded: web.Server) -> None:
    page = visit(guarded.address)
    page.get_by_label("username").fill("ada")
    page.get_by_label("password").fill("pass word")
    press(page, "Login")
    press(page, "Double")
    told(page, "twice: 6")


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c4944415408d763f8ffff3f0005fe02fea135810a0000000049454e44ae426082"
)
