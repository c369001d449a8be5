"""Makes the tab of samples: temperature, class, seed and number; a click on an image leads to the tab of edits."""

from __future__ import annotations

import html
import random
from typing import Any

import gradio as gr

from pyglow_fast.studio.opened import OpenRun
from pyglow_fast.studio.pictures import Grid
from pyglow_fast.studio.words import TEMPERATURE, Draw
from pyglow_fast.web.desk import NO_CLASS, Desk, check_number, clicked
from pyglow_fast.web.errors import on_page, reason
from pyglow_fast.web.events import QUIET, anew, follow, moves
from pyglow_fast.web.html import PICK_JS, buttons, not_finite, save_link
from pyglow_fast.web.shelf import Shelf
from pyglow_fast.web.widgets import Slider, button, command_box

ALL = "all classes in turn"
SHOWN, MOST = 24, 100
HEIGHT = 96  # pixels of an image on the page


class SampleTab:
    """The widgets and handlers of the tab of samples; to be made inside of gr.Blocks."""

    def __init__(self, shelf: Shelf, desk: gr.State) -> None:
        self._shelf = shelf
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                self.temperature = Slider(
                    0.0,
                    1.2,
                    value=TEMPERATURE,
                    step=0.05,
                    label="temperature",
                    info="lower: likelier images, and less varied",
                    elem_id="temperature",
                )
                self.label = gr.Dropdown([ALL], value=ALL, label="class", visible=False, elem_id="sample-class")
                self.n = Slider(1, MOST, value=SHOWN, step=1, label="images", elem_id="sample-n")
                self.seed = gr.Number(0, precision=0, label="seed", elem_id="sample-seed")
                self.again = button("Another seed", "sample-again")
            with gr.Column(scale=3, min_width=300):
                self.pictures = gr.HTML(js_on_load=PICK_JS, elem_id="samples")
                self.command = command_box("sample-command")
        self.outputs = [self.label, self.pictures, self.command]
        inputs = [desk, self.temperature, self.label, self.n, self.seed]
        self.drawn = [self.pictures, self.command]
        events = [*moves([self.temperature, self.n]), self.seed.change, self.label.input]
        follow(events, on_page()(self.draw), inputs, self.drawn)  # one listener: no earlier picture after a later one
        self.again.click(lambda: random.randrange(10**6), None, self.seed, **QUIET)

    def show(self, desk: Desk, temperature: float, n: float, seed: float | None) -> list[Any]:
        """Fill the tab for a run that was chosen; what is wrong is said in the place of the samples."""
        opened = desk.opened(self._shelf)
        label = gr.Dropdown([ALL, *opened.classes], value=ALL, visible=bool(opened.classes))
        try:
            return [label, *self.draw(desk, temperature, ALL, n, seed)]
        except ValueError as error:
            return [label, reason(error), ""]

    def draw(self, desk: Desk, temperature: float, label: str | None, n: float, seed: float | None) -> list[Any]:
        """Draw samples, and write the command that draws them."""
        opened = desk.opened(self._shelf)
        check_number("n", n, MOST)
        check_number("temperature", temperature)
        check_number("seed", seed or 0)
        labels = () if label in (None, ALL) else (opened.label(str(label)),)
        grid = Grid(opened, Draw(int(n), float(temperature), int(seed or 0), labels))
        drawn, made = grid.drawn, grid.made()
        if not desk.has(opened):  # another run was chosen meanwhile
            return [gr.skip(), gr.skip()]
        desk.grid = grid
        words = [f"sample {i}{_class(opened, drawn.labels, i)}: edit it" for i in range(len(drawn.pixels))]
        shown = buttons(list(drawn.pixels), opened.n_bins, words, height=HEIGHT)
        save, grey = save_link(made, "samples.png", "Save PNG"), not_finite(drawn.not_finite)
        return [
            f"{shown}<p>{save} {html.escape('A click on an image takes it to Edit.')}</p>{grey}",
            made.whole_command("samples.png"),
        ]

    def renew(self, desk: Desk, temperature: float, label: str | None, n: float, seed: float | None) -> list[Any]:
        """Draw the same samples by a newer checkpoint, where there is one."""
        if desk.grid is None or desk.grid.opened is desk.opened(self._shelf):
            return [gr.skip(), gr.skip()]
        return self.draw(desk, temperature, label, n, seed)

    def take(self, desk: Desk, event: gr.EventData) -> tuple[str, int]:
        """Put the sample that was clicked under edit, with its own class."""
        if desk.grid is not None:
            number = clicked(event, desk.grid.draw.n)
            desk.put(desk.grid.picked(number), desk.grid.opened)
        return NO_CLASS, anew()


def _class(opened: OpenRun, labels: Any, i: int) -> str:
    return "" if labels is None else f", {opened.classes[int(labels[i])]}"
