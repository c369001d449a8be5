"""How tests use the page as its visitors do, and read back what it shows."""

from __future__ import annotations

import base64
import io
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from pyglow_fast.cli import main
from support import web
from support.web import wait_for

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page, Request

PLACES = {"Sample": "samples", "Edit": "edited", "Interpolate": "path-strip", "Score": "scores", "Run": "run-page"}
COMMANDS = {
    "Sample": "sample-command",
    "Edit": "edit-command",
    "Interpolate": "path-command",
    "Score": "score-command",
    "Run": "run-command",
}


@dataclass
class Site:
    """The page as the command ``serve`` gives it, and the folder that it was started in, which holds ``runs``."""

    server: web.Server
    folder: Path

    def run(self, name: str) -> str:
        """The name by which the page knows a run."""
        return f"runs/{name}"

    def path(self, name: str) -> Path:
        """The path of the run's folder."""
        return self.folder / "runs" / name

    def uploaded(self) -> list[Path]:
        """What was uploaded and is still on the disk; folders may vanish while they are listed, which os.walk bears."""
        (cache,) = self.folder.glob("pyglow-serve-*")
        return [Path(place, name) for place, _, names in os.walk(cache) for name in names]


class Visitor:
    """A page of the site in the browser."""

    def __init__(self, site: Site, page: Page) -> None:
        self.site, self.page, self.watched = site, page, web.Watched(page)
        self.refused = False  # whether an error was shown that the test asked for
        self._unanswered: set[Request] = set()
        page.on("request", self._asked)
        page.on("requestfinished", self._answered)
        page.on("requestfailed", self._answered)

    def _asked(self, request: Request) -> None:
        if request.method == "POST":
            self._unanswered.add(request)

    def _answered(self, request: Request) -> None:
        self._unanswered.discard(request)

    def idle(self) -> None:
        """Waits until all that was asked of the server is answered; what is queued may not be done then."""
        self.page.evaluate("() => new Promise(requestAnimationFrame)")
        wait_for(lambda: (self.page.evaluate("1"), len(self._unanswered))[1], 0)

    def give(self, elem_id: str, *files: tuple[str, bytes], mime_type: str = "image/png") -> None:
        """Uploads files, as (name, contents)."""
        payloads: Any = [{"name": name, "mimeType": mime_type, "buffer": data} for name, data in files]
        self.page.locator(f"#{elem_id} input[type=file]").set_input_files(payloads)

    def open(self) -> None:
        """Goes to the page and waits for its first tab."""
        self.page.goto(self.site.server.address)
        self.page.locator("#samples img").first.wait_for()

    def choose_run(self, name: str) -> None:
        """Another run, and waits until the open tab is about it."""
        choose(self.page, "run", self.site.run(name))
        selected = self.page.get_by_role("tab", selected=True).inner_text()
        self.filled(selected, shlex.quote(self.site.run(name)))

    def tab(self, name: str) -> None:
        """Goes to a tab, which is made when it is first looked at, and waits until it is filled."""
        self.page.get_by_role("tab", name=name, exact=True).click()
        self.filled(name)

    def filled(self, name: str, run: str = "") -> None:
        """Waits until a tab shows all it has, of a run whose name stands so in commands."""
        command = COMMANDS[name]
        if name != "Score":
            wait_for(lambda: f" {run}" in self.command(command), True)
        self.page.locator(f"#{PLACES[name]}").locator("img, p, iframe").first.wait_for()
        if name == "Edit":  # measured on the side
            wait_for(self.page.locator("#edit-why .pgf-wait").count, 0)
            wait_for(lambda: "training images" in self.caption(), True)

    def command(self, elem_id: str) -> str:
        """What a box shows as the command line."""
        return self.page.locator(f"#{elem_id} textarea").input_value()

    def says(self, elem_id: str, command: str) -> None:
        """Waits until a box shows this command line."""
        wait_for(lambda: self.command(elem_id), command)

    def edited(self, part: str = "edited") -> Tensor:
        """The picture under edit, or the original, or the shifted one."""
        return rgb_of(self.page.locator(f"#edited [data-part={part}] img"))

    def caption(self, part: str = "edited") -> str:
        """The words below it."""
        return self.page.locator(f"#edited [data-part={part}] figcaption").inner_text()

    def download(self, link: str, within: str) -> bytes:
        """The file that a link saves."""
        with self.page.expect_download() as found:
            self.page.locator(f"#{within}").get_by_role("link", name=link, exact=True).click()
        return Path(found.value.path()).read_bytes()

    def forgive(self) -> None:
        """Forgets what Gradio's client says when a page is left, and when it asks how far an upload is that is done.

        After a refusal, whose sentence the test reads, also the status that it came with.
        """
        own = ["AbortError", "Unexpected error Connection errored out", "console: Response", "status of 404"]
        own += ["status of 500"] if self.refused else []
        self.watched.errors[:] = [error for error in self.watched.errors if not any(text in error for text in own)]

    def toast(self) -> str:
        """The one sentence that errors show; they are closed, and have no elements in them."""
        self.refused = True
        self.watched.wait_for_toasts()
        self.idle()  # one drag may ask several times, and each refusal is a message of its own
        return self.watched.toast()


def decoded(data: bytes) -> Tensor:
    """A picture as uint8 (3, H, W)."""
    return pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB"))


def data_of(address: str) -> bytes:
    """What a data: address holds."""
    head, _, body = address.partition(";base64,")
    assert head.startswith("data:"), address[:60]
    return base64.b64decode(body)


def rgb_of(image: Locator) -> Tensor:
    """The pixels of the file that an <img> of the page holds, uint8 (3, H, W)."""
    return decoded(data_of(image.get_attribute("src") or ""))


def all_pixels(images: Locator) -> Tensor:
    """Read the pixels of several pictures at one moment; empty where there are none."""
    found = images.evaluate_all("found => found.map(image => image.src)")
    return torch.stack([decoded(data_of(address)) for address in found]) if found else torch.zeros(0)


def choose(page: Page, elem_id: str, option: str) -> None:
    """Chooses from a list, by the mouse."""
    page.locator(f"#{elem_id} input").click()
    page.locator(f"#{elem_id}").get_by_role("option", name=option, exact=True).click()


def slider(page: Page, elem_id: str) -> Locator:
    """The handle of a slider."""
    return page.locator(f"#{elem_id} input[type=range]")


def drag(page: Page, elem_id: str, *shares: float) -> None:
    """Moves a slider with the mouse to shares of its way, one after another, and lets go."""
    handle = slider(page, elem_id)
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    assert box is not None
    low, high = (float(handle.get_attribute(name) or 0) for name in ("min", "max"))
    radius = 8.0  # about half of the handle, whose middle is where the value is
    at = (float(handle.input_value()) - low) / (high - low)

    def place(share: float) -> float:
        return box["x"] + radius + share * (box["width"] - 2 * radius)

    middle = box["y"] + box["height"] / 2
    page.mouse.move(place(at), middle)
    page.mouse.down()
    for share in shares:
        page.mouse.move(place(share), middle)
    page.mouse.up()


def set_slider(page: Page, elem_id: str, value: float) -> None:
    """Types a value into the field beside a slider."""
    field = page.locator(f"#{elem_id} input[type=number]")
    field.fill(f"{value:g}")
    field.press("Tab")


def written(folder: Path, patch: pytest.MonkeyPatch, command: str) -> bytes:
    """What a shown command line writes when it is run in ``folder``."""
    program, *words = shlex.split(command)
    assert program == "pyglow-fast"
    place = folder / words[words.index("--out") + 1]
    assert not place.exists()
    patch.chdir(folder)
    try:
        assert main(words) == 0
        return place.read_bytes()
    finally:
        place.unlink(missing_ok=True)
