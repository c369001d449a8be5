"""Makes the tab of edits: an image, a slider for each attribute and level, and the image that follows them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import gradio as gr

from pyglow_fast._errors import expect
from pyglow_fast.data import UnreadableImageError
from pyglow_fast.latents import SPACES
from pyglow_fast.studio.directions import REST, Add
from pyglow_fast.studio.edits import Edit, Subject, likelihood_text
from pyglow_fast.studio.opened import LostImagesError, OpenRun
from pyglow_fast.studio.words import HeldOut, shown_name
from pyglow_fast.web.desk import NO_CLASS, Desk, picked_number, picked_upload, progress_on, with_class
from pyglow_fast.web.errors import on_page, reason
from pyglow_fast.web.events import QUIET, anew, follow, moves
from pyglow_fast.web.html import BITS, LIVE_JS, figure, note, row, save_link
from pyglow_fast.web.shelf import Shelf
from pyglow_fast.web.uploads import Upload
from pyglow_fast.web.widgets import Slider, Thumbs, button, command_box, image_box

ATTRIBUTES, LEVELS = 12, 10  # sliders that there are at most
FIRST = 6  # attributes that have sliders at the beginning
STRONGEST = 3.0
DIFFERENCES = "To the right: more like the training images named first. To the left: more like the others."
KEPT = "How much of the image's own latents each level keeps. At 0 it is what the model finds likeliest there."
WAITING = '<div class="pgf-wait"></div>'  # room for the bar of what is measured


def pair_text(pair: tuple[str, str]) -> str:
    """Write a difference of two attributes in words."""
    return f"{pair[0]} minus {pair[1]}"


class EditTab:
    """The widgets and handlers of the tab of edits; to be made inside of gr.Blocks."""

    def __init__(self, shelf: Shelf, desk: gr.State) -> None:
        self._shelf, self._desk = shelf, desk
        self.redraw = gr.State(0)
        self.thumbs = Thumbs(shelf, desk, "edit")
        with gr.Row(elem_id="edit-work"):
            with gr.Column(min_width=300):
                self.pictures = gr.HTML(js_on_load=LIVE_JS, elem_id="edited")
                self.back = button("Back to the original", "edit-back")
            with gr.Column(min_width=300):
                self._slider_widgets()
            with gr.Column(min_width=300):
                gr.HTML(note(BITS))
                self.command = command_box("edit-command")
                with gr.Row():
                    self.number = gr.Number(
                        0, precision=0, label="number of the held-out image", elem_id="edit-number", min_width=150
                    )
                    self.label = gr.Dropdown(
                        [NO_CLASS],
                        value=NO_CLASS,
                        label="class of the image",
                        visible=False,
                        elem_id="edit-class",
                        min_width=150,
                    )
                with gr.Accordion("An image of yours", open=False, elem_id="edit-yours"):
                    self.upload = image_box("upload, webcam or clipboard", 200, "edit-upload")
        self.shown = [self.pictures, self.command]
        self.controls = [self.twin, *self.adds, *self.keeps]
        choices = [self.attributes, self.plus, self.minus, *self.adds, self.why]
        self.measured = [*choices, self.redraw]
        fixed = [*self.thumbs.outputs, self.number, self.label, self.space, self.upload, *self.keeps]
        self.outputs = [*fixed, *choices, *self.shown]
        self._wire()

    def _slider_widgets(self) -> None:
        self.why = gr.HTML(elem_id="edit-why")
        self.adds = [
            Slider(
                -STRONGEST, STRONGEST, value=0, step=0.05, visible=False, elem_id=f"add-{i}", elem_classes="pgf-signed"
            )
            for i in range(ATTRIBUTES)
        ]
        with gr.Accordion("Which attributes", open=False, elem_id="edit-which"):
            self.attributes = gr.Dropdown([], multiselect=True, label="sliders", elem_id="edit-attributes")
            with gr.Row():
                self.plus = gr.Dropdown([], label="another: plus", elem_id="edit-plus", min_width=90)
                self.minus = gr.Dropdown([], label="minus", elem_id="edit-minus", min_width=90)
                self.more = button("Add a slider", "edit-more")
        gr.HTML(note(KEPT))
        self.keeps = [Slider(0.0, 1.0, value=1, step=0.05, visible=False, elem_id=f"keep-{i}") for i in range(LEVELS)]
        self.twin = gr.Checkbox(False, label="beside it: shift the pixels by the same differences", elem_id="edit-twin")
        self.space = gr.Radio(
            list(SPACES),
            label="space of the edit",
            info="the latents, or the noise: latents without the means and scales of their priors",
            elem_id="edit-space",
        )

    def _wire(self) -> None:
        desk, redraw = self._desk, self.redraw
        moved = moves([*self.adds, *self.keeps])
        follow([*moved, self.twin.input, redraw.change], on_page()(self.edited), [desk, *self.controls], self.shown)
        self.back.click(on_page()(self.reset), desk, [*self.adds, *self.keeps, redraw], **QUIET)
        typed = [self.number.input, self.number.submit]
        gr.on(typed, on_page()(self.take_number), [desk, self.number], [self.label, redraw], **QUIET)
        self.thumbs.strip.click(on_page()(self.take_thumb), desk, [self.number, self.label, redraw], **QUIET)
        given = [self.upload, self.label, redraw]
        took = self.upload.upload(on_page()(self.take_upload), [desk, self.upload], given, **QUIET)
        took.failure(lambda: None, None, self.upload, **QUIET)
        self.label.input(on_page()(self.take_label), [desk, self.label], redraw, **QUIET)
        self.measure_after(self.space.input(on_page()(self.take_space), [desk, self.space], None, **QUIET))
        chosen = [desk, self.attributes, *self.adds]
        self.attributes.input(on_page()(self.take_pairs), chosen, [*self.adds, redraw], **QUIET)
        added = [desk, self.plus, self.minus, self.attributes, *self.adds]
        self.more.click(on_page()(self.add_pair), added, [self.attributes, *self.adds], **QUIET)

    def measure_after(self, event: Any) -> None:
        """Add the measurement of mean latents to what follows an event."""
        shown = QUIET | {"show_progress": "full", "show_progress_on": self.why}
        event.success(on_page()(self.measure), self._desk, self.measured, **shown)

    def show(self, desk: Desk) -> list[Any]:
        """Fill the tab for a run that was chosen, until its mean latents are there."""
        opened = desk.opened(self._shelf)
        missing = opened.images.missing
        desk.pairs = []
        return [
            *self.thumbs.show(desk, opened),
            gr.Number(0, visible=not missing),
            gr.Dropdown([NO_CLASS, *opened.classes], value=NO_CLASS, visible=bool(opened.classes)),
            gr.Radio(list(SPACES), value=desk.space_of(opened)),
            None,
            *self._keep_sliders(opened),
            *self._attribute_widgets(desk, ()),
            WAITING,
            *self._first(desk, opened),
        ]

    def _first(self, desk: Desk, opened: OpenRun) -> list[Any]:
        """The image that is under edit at first; where it cannot be shown, the reason: nothing of another run stays."""
        try:
            if not opened.images.missing:
                desk.put(opened.pick(HeldOut(0)), opened)
            elif desk.grid is not None:
                desk.put(desk.grid.picked(0), desk.grid.opened)
            return self._edited(desk, Edit(), twin=False)
        except ValueError as error:
            return [reason(error), ""]

    def measure(
        self,
        desk: Desk,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - Gradio looks for it
    ) -> list[Any]:
        """Measure the mean latents and likelihoods of training images, where they are not kept.

        Sliders that are on the page already stay as they are. Those of another run or space wait for no others.
        """
        opened = desk.opened(self._shelf)
        space, as_they_are = desk.space_of(opened), [gr.skip() for _ in self.measured[:-2]]

        try:
            directions = opened.directions(space, progress_on(progress, "measuring the attributes"))
            opened.scores(progress_on(progress, "measuring bits/dim of the run's images"))
        except (LostImagesError, UnreadableImageError) as error:
            return [*as_they_are, reason(error, "No attributes: "), anew()]
        except ValueError as error:  # of a model that gives no finite latents, of which no image can be shown either
            return [*as_they_are, reason(error, "No attributes: "), gr.skip()]
        if not desk.has(opened):  # another run was chosen meanwhile, and is measured once its sliders are at rest
            return [gr.skip() for _ in self.measured]
        if desk.opened(self._shelf) is not opened:  # there is a newer checkpoint, which has its own
            return self.measure(desk, progress)
        why = note(DIFFERENCES if directions.names else "The images of this run have no classes.")
        if desk.pairs:
            return [*as_they_are, why, anew()]
        # Two classes are each other's opposites, so one slider is enough.
        names = directions.names[:1] if len(directions.names) == 2 else directions.names[:FIRST]
        desk.pairs = [(name, REST) for name in names]
        return [*self._attribute_widgets(desk, directions.names), why, anew()]

    def _attribute_widgets(self, desk: Desk, names: tuple[str, ...]) -> list[Any]:
        """The attributes to choose from, and the sliders of those that are chosen, at rest."""
        texts = [pair_text((name, REST)) for name in names]
        return [
            gr.Dropdown(texts, value=[pair_text(pair) for pair in desk.pairs], visible=bool(names)),
            gr.Dropdown(list(names), value=names[0] if names else None),
            gr.Dropdown([REST, *names], value=REST if names else None),
            *self._add_sliders(desk, {}),
        ]

    def _keep_sliders(self, opened: OpenRun) -> list[gr.Slider]:
        """The sliders of the levels, at rest."""
        n = len(opened.model.latent_shapes)
        return [gr.Slider(value=1, visible=i < n, label=f"kept of level {i}{_which(i, n)}") for i in range(LEVELS)]

    def take_number(self, desk: Desk, number: float | None) -> tuple[str, int]:
        """Put a held-out image under edit by its number, with its own class."""
        if number is not None:  # a field that is being typed into
            opened = desk.opened(self._shelf)
            desk.put(picked_number(opened, number), opened)
        return NO_CLASS, anew()

    def take_thumb(self, desk: Desk, event: gr.EventData) -> tuple[int, str, int]:
        """Put a held-out image under edit by a click on it: its number, and its own class."""
        number = self.thumbs.number(desk, event)
        return number, *self.take_number(desk, number)

    def take_upload(self, desk: Desk, upload: Upload | None) -> tuple[None, str, int]:
        """Put the visitor's image under edit; the upload box is empty again, as the image is shown elsewhere."""
        if upload is not None:
            opened = desk.opened(self._shelf)
            desk.put(picked_upload(opened, upload), opened)
        return None, NO_CLASS, anew()

    def take_label(self, desk: Desk, name: str) -> int:
        """Set the class of the image under edit."""
        opened = desk.opened(self._shelf)
        picked = desk.picked(opened)
        if picked is not None:
            label = None if name == NO_CLASS else opened.label(name)
            desk.put(opened.relabelled(picked, label), opened)
        return anew()

    def take_space(self, desk: Desk, space: str) -> None:
        """Set the space that is edited."""
        expect(space in SPACES, "space", f"one of {', '.join(SPACES)}", repr(space))
        desk.space = space

    def take_pairs(self, desk: Desk, texts: list[str], *values: float) -> list[Any]:
        """Set the attributes that have sliders; one that stays keeps its value."""
        opened = desk.opened(self._shelf)
        names = opened.directions(desk.space_of(opened)).names
        known = {pair_text(pair): pair for pair in [*((name, REST) for name in names), *desk.pairs]}
        expect(len(texts) <= ATTRIBUTES, "attributes", f"at most {ATTRIBUTES} at once", len(texts))
        former = dict(zip(desk.pairs, values, strict=False))
        desk.pairs = [known[text] for text in texts if text in known]
        return [*self._add_sliders(desk, former), anew()]

    def add_pair(self, desk: Desk, plus: str, minus: str, texts: list[str], *values: float) -> list[Any]:
        """Add a slider, from the images of ``minus`` to those of ``plus``."""
        opened = desk.opened(self._shelf)
        directions = opened.directions(desk.space_of(opened))
        directions.shift([Add(plus, minus, 1.0)])  # refuses what is none
        former = dict(zip(desk.pairs, values, strict=False))
        if (plus, minus) not in desk.pairs:
            expect(len(desk.pairs) < ATTRIBUTES, "attributes", f"at most {ATTRIBUTES} at once", "one more")
            desk.pairs = [*desk.pairs, (plus, minus)]
        choices = list(dict.fromkeys([*((name, REST) for name in directions.names), *desk.pairs]))
        chosen = gr.Dropdown([pair_text(pair) for pair in choices], value=[pair_text(pair) for pair in desk.pairs])
        return [chosen, *self._add_sliders(desk, former)]

    def _add_sliders(self, desk: Desk, values: dict[tuple[str, str], float]) -> list[gr.Slider]:
        shown = [gr.Slider(value=values.get(pair, 0), visible=True, label=pair_text(pair)) for pair in desk.pairs]
        return [*shown, *(gr.Slider(value=0, visible=False) for _ in range(ATTRIBUTES - len(shown)))]

    def edited(self, desk: Desk, twin: bool, *values: float) -> list[Any]:
        """Compute the image as the sliders say, and the command that gives it."""
        return self._edited(desk, self.edit_of(desk, desk.opened(self._shelf), values), twin)

    def edit_of(self, desk: Desk, opened: OpenRun, values: Sequence[float]) -> Edit:
        """Describe the edit that the sliders say."""
        strengths, shares = values[:ATTRIBUTES], values[ATTRIBUTES:]
        adds = tuple(Add(*pair, float(s)) for pair, s in zip(desk.pairs, strengths, strict=False))
        return Edit(adds, tuple(map(float, shares[: len(opened.model.latent_shapes)])))

    def reset(self, desk: Desk) -> list[Any]:
        """Set all sliders to rest, which gives the original."""
        return [*self._add_sliders(desk, {}), *self._keep_sliders(desk.opened(self._shelf)), anew()]

    def _edited(self, desk: Desk, edit: Edit, twin: bool) -> list[Any]:
        if desk.picked(desk.opened(self._shelf)) is None:
            return [note("Choose an image: an upload, or a sample by a click on it."), ""]
        subject = desk.subject(self._shelf)
        opened, found = subject.opened, subject.edited(edit, twin)
        made, words = subject.made(found.pixels, edit), _words(subject, subject.bits_of(found.pixels))
        figures = [
            figure(subject.pixels, opened.n_bins, "original", _words(subject, subject.bits), "original"),
            figure(found.pixels, opened.n_bins, "edited", words, "edited", made),
        ]
        links = [save_link(made, "edit.png", "Save PNG")]
        commands = [made.whole_command("edit.png")]
        if found.shifted is not None:
            shifted = subject.made(found.shifted, edit, pixel_shift=True)
            words = _words(subject, subject.bits_of(found.shifted))
            figures.append(figure(found.shifted, opened.n_bins, "pixels shifted", words, "shifted", shifted))
            links.append(save_link(shifted, "shifted.png", "Save the shifted one"))
            commands.append(shifted.whole_command("shifted.png"))
        if subject.from_file:
            name = shown_name(subject.picked.image)
            seen = f"{os.path.splitext(name)[0]}.png"
            whole = subject.made(subject.pixels, Edit())
            # A picture of the webcam or the clipboard is in no other file: under its own name the commands find it.
            links.append(save_link(whole, seen, f"Save {name} as the model sees it"))
            commands.append(whole.whole_command(seen))
        if not desk.has(opened):  # another run was chosen meanwhile
            return [gr.skip(), gr.skip()]
        bad = "" if found.finite else "Parts are not finite, shown grey: the edit leads out of the model's range."
        return [row(figures) + f"<p>{''.join(links)}</p>" + note(bad), "\n".join(commands)]


def _words(subject: Subject, bits: float) -> str:
    return with_class(likelihood_text(subject.opened, bits, wait=False), subject.picked, subject.opened)


def _which(level: int, n_levels: int) -> str:
    if n_levels == 1:
        return ""
    return " (finest)" if level == 0 else " (deepest)" if level == n_levels - 1 else ""
