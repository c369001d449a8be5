"""Makes widgets that several tabs have."""

from __future__ import annotations

import random
from typing import Any

import gradio as gr

from pyglow_fast.data import UnreadableImageError
from pyglow_fast.studio.opened import OpenRun
from pyglow_fast.studio.reading import name_of
from pyglow_fast.web.desk import Desk, clicked
from pyglow_fast.web.errors import on_page
from pyglow_fast.web.events import QUIET
from pyglow_fast.web.html import PICK_JS, buttons
from pyglow_fast.web.shelf import Shelf
from pyglow_fast.web.uploads import UploadedImage, WithoutStub

OFFERED = 12  # held-out images to choose from


class Slider(gr.Slider, metaclass=WithoutStub):
    """A ``gr.Slider`` that takes what is typed beside it for what the field becomes when it is left.

    That is the nearer end for a number beyond it, and the lower end where nothing stands; Gradio's own refuses both.
    """

    is_template = True  # the browser shows it as a slider

    def preprocess(self, payload: float | None) -> float:
        low, high = float(self.minimum), float(self.maximum)
        number = low if payload is None else payload
        return super().preprocess(low if number < low else high if number > high else number)


def button(text: str, elem_id: str) -> gr.Button:
    """Make a button as wide as its text."""
    return gr.Button(text, size="md", scale=0, min_width=0, elem_id=elem_id, elem_classes="pgf-button")


def command_box(elem_id: str) -> gr.Textbox:
    """Make a box for the command line that gives what a tab shows, to be copied."""
    return gr.Textbox(
        label="the same from the command line",
        buttons=["copy"],
        interactive=False,
        elem_id=elem_id,
        elem_classes="pgf-command",
    )


def image_box(label: str, height: int, elem_id: str) -> UploadedImage:
    """Make a box for an image of the visitor's own: a file, the webcam's picture or the clipboard's."""
    return UploadedImage(
        label=label, sources=["upload", "webcam", "clipboard"], type="filepath", height=height, elem_id=elem_id
    )


class Thumbs:
    """A strip of held-out images, each a button, and a button for others; to be made inside of gr.Blocks.

    Args:
        shelf: the runs.
        desk: the visitor's.
        name: of the tab; the desk keeps by it which images are offered.
    """

    def __init__(self, shelf: Shelf, desk: gr.State, name: str) -> None:
        self._shelf, self._name = shelf, name
        with gr.Row(equal_height=False):
            with gr.Column(min_width=300):
                self.strip = gr.HTML(js_on_load=PICK_JS, elem_id=f"{name}-thumbs")
            self.others = button("Other images to choose from", f"{name}-others")
        self.outputs = [self.strip, self.others]
        self.others.click(on_page()(self.other), desk, self.strip, **QUIET)

    def show(self, desk: Desk, opened: OpenRun) -> list[Any]:
        """Offer the first held-out images of a run that was chosen; none where they are lost."""
        missing = bool(opened.images.missing)
        desk.thumbs[self._name] = [] if missing else list(range(min(OFFERED, len(opened.images.find()[2]))))
        try:
            strip = self._strip(desk, opened)
        except UnreadableImageError:  # others may be readable
            desk.thumbs[self._name], strip = [], ""
        return [strip, gr.Button(visible=not missing)]

    def other(self, desk: Desk) -> str:
        """Offer other held-out images."""
        opened = desk.opened(self._shelf)
        count = len(opened.images.find()[2])
        desk.thumbs[self._name] = sorted(random.sample(range(count), min(OFFERED, count)))
        return self._strip(desk, opened)

    def number(self, desk: Desk, event: gr.EventData) -> int:
        """Find the number of the held-out image that was clicked."""
        offered = desk.thumbs.get(self._name, [])
        return offered[clicked(event, len(offered))]

    def _strip(self, desk: Desk, opened: OpenRun) -> str:
        offered = desk.thumbs[self._name]
        if not offered:
            return ""
        data, _, held_out = opened.images.find()
        pixels, _ = data.batch(held_out[offered])
        words = [f"held-out image {name_of(data, int(held_out[i]), i)}" for i in offered]
        return buttons(list(pixels), opened.n_bins, words, strip=True)
