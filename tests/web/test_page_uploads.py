"""What visitors give the page: pictures of all kinds, and files that are none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from support import web

web.require("gradio", "playwright", "chromium")

from support.web import wait_for  # noqa: E402
from support.web_page import Site, Visitor, rgb_of, set_slider, written  # noqa: E402
from support.web_runs import COLOUR, SIDE, bomb, encoded, photo, turned_jpeg  # noqa: E402

from pyglow_fast.data.single import read_single  # noqa: E402
from pyglow_fast.train import RunFolder  # noqa: E402
from pyglow_fast.train.figures import image_picture  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.full  # what a user sees of the page is in tests/contract/test_page.py

SECRETS = (b"SECRET", b"GPS", b"Exif", b"eXIf")


@pytest.fixture
def editor(visitor: Visitor) -> Visitor:
    """The tab of edits of the run in colours, its upload unfolded."""
    visitor.choose_run(COLOUR)
    visitor.tab("Edit")
    visitor.page.get_by_text("An image of yours").click()
    return visitor


def seen(site: Site, data: bytes) -> Tensor:
    """What the model sees of a file."""
    config = RunFolder(site.path(COLOUR)).read_config()
    return image_picture(read_single(data, "test", config.data, (3, SIDE, SIDE), 256).long(), 256)


def transparent() -> bytes:
    image = photo(30, 40).convert("RGBA")
    image.putalpha(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(40, 30).astype(np.uint8)))
    return encoded(image, "PNG")


def moving() -> bytes:
    return encoded(photo(32, 32, 1), "GIF", save_all=True, append_images=[photo(32, 32, 2)], duration=100)


def test_pictures_are_shown_as_the_model_sees_them(
    editor: Visitor, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upright, without what else a file tells; the command gives the same bytes; nothing stays on the server."""
    files = {
        "turned.jpg": turned_jpeg(),
        "transparent.png": transparent(),
        "moving.gif": moving(),
    }
    for name, data in files.items():
        editor.give("edit-upload", (name, data))
        wait_for(lambda data=data: editor.edited("original"), seen(site, data))  # type: ignore[misc]
        assert f" {name} " in editor.command("edit-command")
        (site.folder / name).write_bytes(data)
        set_slider(editor.page, "keep-1", 0.25)
        wait_for(lambda: "--keep 1 0.25" in editor.command("edit-command"), True)
        editor.idle()
        saved, commands = b"", editor.command("edit-command").splitlines()
        for link, command in zip(("Save PNG", f"Save {name} as the model sees it"), commands, strict=True):
            data = editor.download(link, "edited")
            assert data == written(site.folder, monkeypatch, command)
            saved += data
        assert not any(secret in saved for secret in SECRETS)
        set_slider(editor.page, "keep-1", 1)
        editor.idle()
    upright = Image.open(site.folder / "turned.jpg").size
    assert upright == (64, 48)  # in the file it lies
    wait_for(lambda: len(site.uploaded()), 0)


HOSTILE = {  # more of them are in tests/data
    "empty.png": b"",
    "bomb.png": bomb(),
    "script.svg": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><script>alert(1)</script></svg>',
    "large.png": encoded(photo(20, 20), "PNG") + bytes(20 * 2**20),
}


def test_files_that_are_no_pictures_are_refused(editor: Visitor, site: Site) -> None:
    """Each in one sentence that names the file, and the page goes on."""
    before = editor.edited("original")
    for name, data in HOSTILE.items():
        mime_type = "image/svg+xml" if name.endswith("svg") else "image/png"
        editor.give("edit-upload", (name, data), mime_type=mime_type)
        said = editor.toast()
        assert name in said or "maximum" in said, (name, said)
        assert "/" not in said.replace("bits/dim", "")
        assert "Error" not in said
        wait_for(lambda: editor.page.locator("#edit-upload input[type=file]").count() > 0, True)
        assert (editor.edited("original") == before).all(), name
    data = encoded(photo(40, 30), "PNG")
    editor.give("edit-upload", ("good.png", data))
    wait_for(lambda: editor.edited("original"), seen(site, data))
    editor.tab("Score")
    editor.give("score-files", ("text.png", b"no"))
    assert "text.png" in editor.toast()
    wait_for(lambda: editor.page.locator("#score-files input[type=file]").count() > 0, True)
    editor.give("score-files", ("text.png", b"no"), ("good.png", data))
    editor.page.locator("#scores td", has_text="good.png").wait_for()
    assert editor.page.locator("#scores p", has_text="text.png: expected an image").count() == 1
    assert " good.png --" in editor.command("score-command")
    assert "text.png" not in editor.command("score-command")
    wait_for(lambda: len(site.uploaded()), 0)


NAMES = (
    "<img src=x onerror=alert(1)>.png",
    "../../etc/passwd.png",
    "größe \u202egnp.png",
)


def test_a_name_is_text(editor: Visitor, site: Site) -> None:
    """Wherever it stands; of a path the last part."""
    for i, name in enumerate(NAMES):
        data = encoded(photo(40, 30, i), "PNG")
        editor.give("edit-upload", (name, data))
        wait_for(lambda data=data: editor.edited("original"), seen(site, data))  # type: ignore[misc]
        shown = "".join(c for c in name.rpartition("/")[2] if c.isprintable())
        link = editor.page.locator("#edited a", has_text="as the model sees it")
        said = link.inner_text().removeprefix("Save ").removesuffix(" as the model sees it").removeprefix("./")
        assert said.replace("_", "") == shown.replace("_", "")
        assert editor.page.locator("[onerror]").count() == 0
    editor.idle()


def test_a_long_name_is_whole(editor: Visitor, site: Site) -> None:
    """The command finds the file; the page is no wider for it."""
    data, name = encoded(photo(40, 30), "PNG"), "n" * 251 + ".png"
    editor.give("edit-upload", (name, data))
    wait_for(lambda: editor.edited("original"), seen(site, data))
    assert f" {name} " in editor.command("edit-command")
    assert editor.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_picture_is_pasted(editor: Visitor, site: Site) -> None:
    """From the clipboard."""
    page = editor.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(
        """async () => {
            const canvas = Object.assign(document.createElement("canvas"), {width: 16, height: 16});
            const context = canvas.getContext("2d");
            context.fillStyle = "#306090";
            context.fillRect(0, 0, 16, 8);
            const blob = await new Promise(done => canvas.toBlob(done));
            await navigator.clipboard.write([new ClipboardItem({"image/png": blob})]);
        }"""
    )
    page.locator("#edit-upload").get_by_label("Paste from clipboard").click()
    wait_for(lambda: " clipboard.png " in editor.command("edit-command"), True)
    picture = rgb_of(page.locator("#edited [data-part=original] img"))
    assert picture[:, 0, 0].tolist() == [0x30, 0x60, 0x90]
    assert picture[:, 15, 0].tolist() == [255, 255, 255]  # transparent
