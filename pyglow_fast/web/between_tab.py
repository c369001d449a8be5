"""Makes the tab of paths: the way from one image to another through the latents, as frame, strip and animation."""

from __future__ import annotations

from typing import Any

import gradio as gr

from pyglow_fast._errors import expect
from pyglow_fast.studio.opened import OpenRun, Picked
from pyglow_fast.studio.words import HeldOut, shown_name
from pyglow_fast.web.desk import Desk, check_number, clicked, picked_number, picked_upload, with_class
from pyglow_fast.web.edit_tab import EditTab
from pyglow_fast.web.errors import on_page, reason
from pyglow_fast.web.events import QUIET, anew, follow, moves
from pyglow_fast.web.html import PICK_JS, buttons, figure, not_finite, note, row, save_link
from pyglow_fast.web.shelf import Shelf
from pyglow_fast.web.uploads import Upload
from pyglow_fast.web.widgets import Slider, Thumbs, button, command_box, image_box

FRAMES, MOST = 9, 25  # of the strip
NAMES = ("from", "to")


class BetweenTab:
    """The widgets and handlers of the tab of paths; to be made inside of gr.Blocks."""

    EMPTY = (None, None, "", "", "", "")  # until it is looked at

    def __init__(self, shelf: Shelf, desk: gr.State, edit: EditTab) -> None:
        self._shelf, self._edit = shelf, edit
        self.numbers, self.uploads, self.takes = [], [], []
        self.thumbs = Thumbs(shelf, desk, "path")
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                self.frame = gr.HTML(elem_id="path-frame")
                self.at = Slider(0.0, 1.0, value=0.5, step=0.01, label="the way along the path", elem_id="path-at")
                self.strip = gr.HTML(js_on_load=PICK_JS, elem_id="path-strip")
                self.command = command_box("path-command")
            with gr.Column(scale=2, min_width=300):
                self.end = gr.Radio(
                    list(NAMES), value=NAMES[0], label="a click on an image at the top sets", elem_id="path-end"
                )
                with gr.Row():
                    for i, name in enumerate(NAMES):
                        with gr.Column(min_width=140):
                            self.numbers.append(
                                gr.Number(i, precision=0, label=f"{name}: held-out image", elem_id=f"{name}-number")
                            )
                            self.takes.append(button(f"{name}: the image under Edit", f"{name}-take"))
                for name in NAMES:
                    with gr.Accordion(f"{name}: an image of yours", open=False, elem_id=f"{name}-yours"):
                        self.uploads.append(image_box("upload, webcam or clipboard", 200, f"{name}-upload"))
                self.path = gr.Radio(
                    ["linear", "spherical"],
                    value="linear",
                    label="path",
                    info="through the latents, on straight lines or on great circles",
                    elem_id="path-line",
                )
                self.count = Slider(2, MOST, value=FRAMES, step=1, label="images of the strip", elem_id="path-count")
        redraw = gr.State(0)  # the frame and the commands
        self.contents = [*self.uploads, self.thumbs.strip, self.strip, self.frame, self.command]
        self.outputs = [*self.thumbs.outputs, self.end, *self.numbers, *self.uploads, self.strip, redraw]
        self.as_they_are = [gr.skip() for _ in self.outputs]
        place = [desk, self.path, self.at]
        follow([*moves([self.at]), redraw.change], on_page()(self.moved), place, [self.frame, self.command])
        drawn = (on_page()(self.drawn), [desk, self.path, self.count], [self.strip, redraw])
        gr.on([self.path.input, *moves([self.count])], *drawn, **QUIET)
        self.strip.click(on_page()(self.point), self.count, [self.at, redraw], **QUIET)
        taken = self.thumbs.strip.click(on_page()(self.take_thumb), [desk, self.end], self.numbers, **QUIET)
        taken.success(*drawn, **QUIET)
        for i in range(2):
            number, upload = self.numbers[i], self.uploads[i]
            taken = gr.on([number.input, number.submit], on_page()(self._take_number(i)), [desk, number], None, **QUIET)
            taken.success(*drawn, **QUIET)
            taken = upload.upload(on_page()(self._take_upload(i)), [desk, upload], upload, **QUIET)
            taken.success(*drawn, **QUIET)
            taken.failure(lambda: None, None, upload, **QUIET)
            taken = self.takes[i].click(on_page()(self._take_edit(i)), [desk, *edit.controls], None, **QUIET)
            taken.success(*drawn, **QUIET)

    def look(self, desk: Desk, path: str, count: float) -> list[Any]:
        """Fill the tab, or draw the path anew where there is another space or checkpoint than it was drawn for."""
        if desk.run is None or desk.drawn_for == self._drawn_for(desk):
            return self.as_they_are
        if not desk.has_path:
            return self.show(desk, path, count)
        return [*self.as_they_are[:-2], *self.drawn(desk, path, count)]

    def _drawn_for(self, desk: Desk) -> tuple[OpenRun, str]:
        opened = desk.opened(self._shelf)
        return opened, desk.space_of(opened)

    def show(self, desk: Desk, path: str, count: float) -> list[Any]:
        """Fill the tab for a run that was chosen."""
        opened = desk.opened(self._shelf)
        missing = opened.images.missing
        first = [0, 0 if missing else min(1, len(opened.images.find()[2]) - 1)]
        numbers = [gr.Number(number, visible=not missing) for number in first]
        thumbs = [*self.thumbs.show(desk, opened), gr.Radio(visible=not missing)]
        try:
            for i, number in enumerate([] if missing else first):
                desk.put_end(i, opened.pick(HeldOut(number)), opened)
            strip = self.drawn(desk, path, count)
        except ValueError as error:  # said in the place of the path
            strip = [reason(error), gr.skip()]
        if not desk.has(opened):  # another run was chosen meanwhile
            return self.as_they_are
        desk.has_path = True
        return [*thumbs, *numbers, None, None, *strip]

    def take_thumb(self, desk: Desk, end: str, event: gr.EventData) -> list[Any]:
        """Make the held-out image that was clicked one end of the path, and show its number."""
        expect(end in NAMES, "end", f"one of {', '.join(NAMES)}", repr(end))
        number, i = self.thumbs.number(desk, event), NAMES.index(end)
        self._take_number(i)(desk, number)
        return [number if j == i else gr.skip() for j in range(len(NAMES))]

    def _take_number(self, i: int) -> Any:
        def take(desk: Desk, number: float | None) -> None:
            if number is not None:  # a field that is being typed into
                opened = desk.opened(self._shelf)
                desk.put_end(i, picked_number(opened, number), opened)

        return take

    def _take_upload(self, i: int) -> Any:
        def take(desk: Desk, upload: Upload | None) -> None:
            if upload is not None:
                opened = desk.opened(self._shelf)
                desk.put_end(i, picked_upload(opened, upload), opened)

        return take

    def _take_edit(self, i: int) -> Any:
        def take(desk: Desk, twin: bool, *values: float) -> None:
            opened = desk.opened(self._shelf)
            desk.put_edited_end(i, self._edit.edit_of(desk, opened, values), f"edit-{NAMES[i]}.png", opened)

        return take

    def point(self, count: float, event: gr.EventData) -> tuple[float, int]:
        """Find where on the path the image of the strip is that was clicked."""
        check_number("images", count, MOST)
        return clicked(event, int(count)) / (int(count) - 1), anew()

    def moved(self, desk: Desk, path: str, at: float) -> list[Any]:
        """Make the image at one point of the path, and the commands that give it and the strip."""
        between = desk.between(self._shelf, path == "spherical")
        if between is None:
            return [note("Choose two images.") if desk.has_path else "", ""]
        opened, (pixels, bad) = between.opened, between.frames(times=(float(at),))
        made = between.made_frame(pixels[0], float(at))
        if not desk.has(opened):  # another run was chosen meanwhile
            return [gr.skip(), gr.skip()]
        shown = row(
            [
                _end(between.first.picked, "from", opened),
                figure(pixels[0], opened.n_bins, f"{at:.0%} of the way", part="frame", made=made),
                _end(between.last.picked, "to", opened),
            ]
        )
        grey = note("Parts are not finite, shown grey." if bad else "")
        link = save_link(made, "between.png", "Save the frame")
        commands = [*desk.end_commands, made.whole_command("between.png"), desk.strip]
        return [f"{shown}<p>{link}</p>{grey}", "\n".join(commands)]

    def drawn(self, desk: Desk, path: str, count: float) -> list[Any]:
        """Draw the strip of the whole path."""
        check_number("images", count, MOST)
        between = desk.between(self._shelf, path == "spherical")
        if between is None:
            return ["", anew()]
        opened, (pixels, bad) = between.opened, between.frames(int(count))
        words = [f"at {i / (len(pixels) - 1):.2f}" for i in range(len(pixels))]
        files = {".png": "Save the strip", ".gif": "Save as GIF", ".webp": "Save as WebP"}
        made = {suffix: between.made(pixels, suffix) for suffix in files}
        links = [save_link(made[suffix], f"path{suffix}", text) for suffix, text in files.items()]
        if not desk.has(opened):
            return [gr.skip(), gr.skip()]
        desk.drawn_for = opened, between.space
        desk.strip = "\n".join(each.whole_command(f"path{suffix}") for suffix, each in made.items())
        strip = buttons(list(pixels), opened.n_bins, words, strip=True)
        return [f"{strip}<p>{''.join(links)}</p>{not_finite(bad)}", anew()]


def _end(picked: Picked, name: str, opened: OpenRun) -> str:
    """One end of the path, with its name and class below it."""
    return figure(picked.pixels, opened.n_bins, name, with_class(shown_name(picked.image), picked, opened), name)
