"""Makes the tabs of edits and of paths: an image that follows sliders, and the way from one image to another."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import gradio as gr

from pyglow_fast._core.errors import expect
from pyglow_fast.app.studio import Add, Between, Edit, HeldOut, OpenRun, Picked, Subject, likelihood_text
from pyglow_fast.app.studio.directions import REST
from pyglow_fast.app.studio.words import shown_name
from pyglow_fast.app.web import fragments
from pyglow_fast.app.web.fragments import LARGE, MEDIUM, PICK_JS, SMALL, figure, image, note, row, save_link
from pyglow_fast.app.web.handlers import anew, check_count, clicked, follow, listen
from pyglow_fast.app.web.tabs import button, command_box
from pyglow_fast.app.web.uploads import ImageBox, Upload, read
from pyglow_fast.app.web.visitors import Visitor
from pyglow_fast.latents.paths import even

OFFERED = 12  # held-out images to choose from
ATTRIBUTES, LEVELS = 48, 10  # sliders that there are at most
STEP = 0.05  # of sliders
FRAMES, MOST = 9, 25  # of the strip
ENDS = ("from", "to")
CLICK = {"edit": "A click puts one under edit.", "path": "A click makes one an end of the path."}
ADDED = "The mark on a slider is the image as it is. An end is as far as training images go, or the model can follow."
KEPT = "How much of the image's own latents each level keeps. At 0 it is what the model finds likeliest there."
LINE = "through the latents, on straight lines or on great circles"


class Source:
    """The chooser of an image: held-out ones to click on, and one of the visitor's own; made within gr.Blocks.

    ``take`` is called as ``take(visitor, subject, *inputs)``.
    """

    def __init__(self, visitor: gr.State, name: str, take: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300):
                gr.HTML(note(f"Images that the model was not trained on. {CLICK[name]}"))
                self.strip = gr.HTML(js_on_load=PICK_JS, elem_id=f"{name}-thumbs")
                others = button("Other images to choose from", f"{name}-others")
            with gr.Column(scale=1, min_width=220):
                words, box = "an image of yours", f"{name}-upload"
                upload_box = ImageBox(label=words, sources=["upload", "webcam", "clipboard"], height=130, elem_id=box)

        def click(found: Visitor, event: gr.EventData, *values: Any) -> Any:
            opened = found.opened()
            number = found.offered[clicked(event, len(found.offered))]
            return take(found, Subject(opened, opened.pick(HeldOut(number))), *values)

        def upload(found: Visitor, given: list[Upload], *values: Any) -> list[Any]:
            opened = found.opened()
            return [None, take(found, Subject(opened, read(opened, given)[0][0]), *values)]

        listen(others.click, self.other, visitor, self.strip)
        listen(self.strip.click, click, [visitor, *inputs], outputs)
        took = listen(upload_box.upload, upload, [visitor, upload_box, *inputs], [upload_box, *outputs])
        listen(took.failure, lambda: None, None, upload_box)  # it is empty again, as the image is shown elsewhere

    def fill(self, visitor: Visitor, opened: OpenRun) -> str:
        """Offer held-out images, first the one that can be added to most; none where they are lost."""
        if not visitor.offered:
            try:
                count, first = len(opened.images()[2]), opened.plainest()
            except ValueError:
                return ""
            others = (i * count // OFFERED for i in range(OFFERED))  # from all over the set: neighbours are alike
            visitor.offered = list(dict.fromkeys([first, *others]))[:OFFERED]
        return self._strip(visitor, opened)

    def other(self, visitor: Visitor) -> str:
        """Offer other held-out images."""
        opened = visitor.opened()
        count = len(opened.images()[2])
        visitor.offered = sorted(random.sample(range(count), min(OFFERED, count)))
        return self._strip(visitor, opened)

    def _strip(self, visitor: Visitor, opened: OpenRun) -> str:
        found = [opened.pick(HeldOut(number)) for number in visitor.offered]
        return fragments.strip([each.pixels for each in found], opened.n_bins, [_name(each, opened) for each in found])


def _name(picked: Picked, opened: OpenRun, bits: float | None = None) -> str:
    return with_class(shown_name(picked.image), picked, opened, bits)


def with_class(text: str, picked: Picked, opened: OpenRun, bits: float | None) -> str:
    """Write the class of an image behind what is said of it, where it has one and its bits/dim are not far from all."""
    far = bits is not None and (beside := opened.scores_at_hand(wait=False)) and beside.bounded(bits) != bits
    return text if far or picked.label is None else f"{text}; class {opened.classes[picked.label]}"


class EditTab:
    """An image, a slider for each attribute and level, and the image that follows them."""

    def __init__(self, visitor: gr.State) -> None:
        self.redraw, self.taken = gr.State(0), gr.State(0)
        self.source = Source(visitor, "edit", self.take, [], [self.taken])
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300, elem_id="edit-shown"):
                pictures = gr.HTML(elem_id="edited")
                back = button("Back to the original", "edit-back")
            with gr.Column(scale=3, min_width=300):
                self.why = gr.HTML(elem_id="edit-why")
                with gr.Column(elem_id="adds"):
                    gr.HTML(note(ADDED))
                    # Before each slider stands the heading of the group that it begins, where there are several groups.
                    slots = [(gr.HTML(), _slider(-1.0, 1.0, 0, f"add-{i}")) for i in range(ATTRIBUTES)]
                gr.HTML(note(KEPT))
                with gr.Column(elem_id="keeps"):
                    keeps = [_slider(0.0, 1.0, 1, f"keep-{i}") for i in range(LEVELS)]
        command = command_box("edit-command")
        gr.HTML(note(fragments.BITS))
        self.headings, self.adds = map(list, zip(*slots, strict=True))
        self.sliders = [*self.adds, *keeps]
        self.outputs = [self.source.strip, self.why, *self.headings, *self.sliders, self.redraw]
        # One listener: no earlier picture comes after a later one.
        follow(self.sliders, [self.redraw.change], self.draw, [visitor, *self.sliders], [pictures, command])
        listen(back.click, self.rest, visitor, [*self.sliders, self.redraw])
        # Another image: no slider is left where the image cannot follow.
        self.measure_after(listen(self.taken.change, self.rest, visitor, [*self.sliders, self.redraw]), visitor)

    def measure_after(self, event: Any, visitor: gr.State) -> None:
        """Add the measurement of the attributes to what follows an event."""
        shown = {"show_progress": "full", "show_progress_on": self.why}
        listen(event.success, self.measure, visitor, [*self.adds, *self.headings, self.why, self.redraw], **shown)

    def fill(self, visitor: Visitor) -> list[Any]:
        """Fill the tab for a run that was chosen; the attributes come when they are measured."""
        opened = visitor.opened()
        strip = self.source.fill(visitor, opened)
        if visitor.edited is None and visitor.offered:
            visitor.edited = Subject(opened, opened.pick(HeldOut(visitor.offered[0])))
        elif visitor.edited is None and visitor.grid is not None:
            visitor.edited = Subject(opened, visitor.grid.picked(0))
        hidden = [gr.Slider(value=0, visible=False)] * ATTRIBUTES
        return [strip, "", *[""] * ATTRIBUTES, *hidden, *self.rest(visitor)[ATTRIBUTES:]]

    def rest(self, visitor: Visitor) -> list[Any]:
        """Set all sliders to rest, which gives the original."""
        n = len(visitor.opened().model.latent_shapes)
        ends = {0: " (finest)", n - 1: " (deepest)"} if n > 1 else {}
        keeps = [gr.Slider(value=1, visible=i < n, label=f"level {i}{ends.get(i, '')}") for i in range(LEVELS)]
        return [*[0] * ATTRIBUTES, *keeps, anew()]

    def measure(self, visitor: Visitor) -> list[Any]:
        """Measure the attributes and likelihoods of training images, where they are not kept; name their sliders.

        A slider ends where the image under edit would leave what training images span, or numbers: see Subject.ends.
        """
        opened = visitor.opened()
        try:
            found = opened.directions()
            opened.scores()
        except ValueError as error:
            return [*[gr.skip()] * 2 * ATTRIBUTES, note(f"No attributes: {error}"), anew()]
        if not visitor.has(opened):
            return [gr.skip()] * (2 * ATTRIBUTES + 2)
        listed = found.listed()[:ATTRIBUTES]
        reach = [(-1.0, 1.0)] * len(found.names) if visitor.edited is None else visitor.edited.ends.T.tolist()
        ends = [reach[found.names.index(name)] for _, name, _ in listed]
        why = "" if listed else "The images of this run have no classes and no attributes."
        if len(found.names) > ATTRIBUTES:
            why = f"{ATTRIBUTES} of {len(found.names)} attributes; the command line has all of them."
        spans = [(STEP * math.ceil(low / STEP), STEP * max(math.floor(high / STEP), 1)) for low, high in ends]
        shown = [
            gr.Slider(visible=True, label=label, minimum=round(low, 2), maximum=round(high, 2))
            for (_, _, label), (low, high) in zip(listed, spans, strict=True)
        ]
        headings = ["" if head == listed[i - 1][0] else f"<h3>{head}</h3>" for i, (head, *_) in enumerate(listed)]
        zeros = "".join(f"#add-{i} {{ --pgf-zero: {low / (low - high):.3f} }}" for i, (low, high) in enumerate(spans))
        headings += [""] * (ATTRIBUTES - len(listed))
        shown += [gr.Slider(value=0, visible=False)] * (ATTRIBUTES - len(listed))
        return [*shown, *headings, note(why) + f"<style>{zeros}</style>", anew()]

    def take(self, visitor: Visitor, subject: Subject) -> int:
        """Put another image under edit."""
        visitor.edited = subject
        return anew()

    def edit_of(self, subject: Subject, values: Sequence[float]) -> Edit:
        """Describe the edit that the sliders say."""
        strengths, shares = values[:ATTRIBUTES], values[ATTRIBUTES:]
        names = [name for _, name, _ in subject.opened.directions().listed()] if any(strengths) else []
        adds = tuple(Add(name, REST, float(strength)) for name, strength in zip(names, strengths, strict=False))
        return Edit(adds, tuple(map(float, shares[: len(subject.latents)])))

    def draw(self, visitor: Visitor, *values: float) -> list[Any]:
        """Compute the image as the sliders say, and the command that gives it."""
        subject = visitor.edited
        if subject is None:
            return [note("Choose an image: an upload, or a sample by a click on it."), ""]
        opened, edit = subject.opened, self.edit_of(subject, values)
        found = subject.edited(edit)
        bits, made, figures = subject.bits_of(found.pixels), subject.made(found.pixels, edit), []
        for title, pixels, measured, width, file in (
            ("edited", found.pixels, bits, LARGE, made),
            ("original", subject.pixels, subject.bits, SMALL, None),
        ):
            name = f"{shown_name(subject.picked.image)}: " if title == "original" else ""
            words = with_class(name + likelihood_text(opened, measured, wait=False), subject.picked, opened, measured)
            figures.append(figure(image(pixels, opened.n_bins, title, width, file), title, words, width))
        if not visitor.has(opened):
            return [gr.skip()] * 2
        below = f"{note(subject.outside(found, bits))}<p>{save_link(made, 'edit.png', 'Save PNG')}</p>"
        return [row(figures) + below, made.whole_command("edit.png")]


def _slider(low: float, high: float, value: float, elem_id: str) -> gr.Slider:
    """A slider that is not there before it has a name."""
    style = "pgf-signed" if low < 0 else ""
    return gr.Slider(low, high, value, step=STEP, visible=False, elem_id=elem_id, elem_classes=style)


class BetweenTab:
    """The way from one image to another through the latents, as frame, strip and animation."""

    def __init__(self, visitor: gr.State) -> None:
        redraw, restrip, end = gr.State(0), gr.State(0), gr.Radio(list(ENDS), value=ENDS[0], render=False)
        self.source = Source(visitor, "path", self.take, [end], [restrip])
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                frame = gr.HTML(elem_id="path-frame")
                at = gr.Slider(0.0, 1.0, 0.5, step=0.01, label="the way along the path", elem_id="path-at")
            with gr.Column(scale=2, min_width=300):
                movie = gr.HTML(elem_id="path-movie")
                end.label, end.elem_id = "a click on an image at the top sets", "path-end"
                end.render()
                line = gr.Radio(["linear", "spherical"], value="linear", label="path", info=LINE, elem_id="path-line")
                count = gr.Slider(2, MOST, FRAMES, step=1, label="images of the strip", elem_id="path-count")
        strip = gr.HTML(js_on_load=PICK_JS, elem_id="path-strip")
        command = command_box("path-command")
        self.outputs = [self.source.strip, restrip]
        follow([at], [redraw.change], self.draw, [visitor, line, at], [frame, command])
        events = [line.input, count.release, restrip.change]
        listen(events, self.draw_strip, [visitor, line, count], [movie, strip, redraw])
        listen(strip.click, self.point, count, [at, redraw])

    def fill(self, visitor: Visitor) -> list[Any]:
        """Fill the tab; a run that was chosen begins with the path between two images of one class."""
        opened = visitor.opened()
        found = self.source.fill(visitor, opened)
        if visitor.ends == [None, None]:
            picked = [opened.pick(HeldOut(number)) for number in visitor.offered]
            picked[1:] = sorted(picked[1:], key=lambda each: each.label != picked[0].label)
            visitor.ends = [*(Subject(opened, each) for each in picked[:2]), None, None][:2]
        return [found, anew()]

    def take(self, visitor: Visitor, subject: Subject, end: str) -> int:
        """Make an image one end of the path."""
        expect(end in ENDS, "end", f"one of {', '.join(ENDS)}", repr(end))
        visitor.ends[ENDS.index(end)] = subject
        return anew()

    def point(self, count: float, event: gr.EventData) -> tuple[float, int]:
        """Find where on the path the image of the strip is that was clicked."""
        last = check_count("images", count, MOST) - 1
        return clicked(event, last + 1) / last, anew()

    def draw(self, visitor: Visitor, line: str, at: float) -> list[Any]:
        """Make the image at one point of the path, and the commands that give it and the strip."""
        opened = visitor.opened()
        ends = [end for end in visitor.ends if end is not None]
        if len(ends) < 2:
            return [note("Choose two images."), ""]
        between = Between(ends[0], ends[1], line == "spherical")
        pixels, bad = between.frames([float(at)])
        made, n_bins = between.made(pixels, float(at)), opened.n_bins
        first, last = [
            figure(image(end.pixels, n_bins, name, SMALL), name, _name(end.picked, opened, end.bits), SMALL)
            for name, end in zip(ENDS, ends, strict=True)
        ]
        frame = figure(image(pixels[0], n_bins, "frame", MEDIUM, made), f"{at:.0%} of the way", "", MEDIUM)
        if not visitor.has(opened):
            return [gr.skip()] * 2
        link = f"<p>{save_link(made, 'between.png', 'Save the frame')}</p>"
        return [
            row([first, frame, last]) + link + fragments.not_finite(bad),
            f"{made.whole_command('between.png')}\n{visitor.strip}",
        ]

    def draw_strip(self, visitor: Visitor, line: str, count: float) -> list[Any]:
        """Draw the strip of the whole path, and its animation."""
        opened, number = visitor.opened(), check_count("images", count, MOST)
        ends = [end for end in visitor.ends if end is not None]
        if len(ends) < 2:
            return ["", "", anew()]
        between = Between(ends[0], ends[1], line == "spherical")
        pixels, bad = between.frames(even(number))
        files = {".png": "Save the strip", ".gif": "Save as GIF", ".webp": "Save as WebP"}
        made = {suffix: between.made(pixels, suffix=suffix) for suffix in files}
        if not visitor.has(opened):
            return [gr.skip()] * 3
        visitor.strip = "\n".join(each.whole_command(f"path{suffix}") for suffix, each in made.items())
        links = "".join(save_link(made[suffix], f"path{suffix}", words) for suffix, words in files.items())
        shown = fragments.strip(list(pixels), opened.n_bins, [f"at {i / (number - 1):.2f}" for i in range(number)])
        movie = image(pixels[0], opened.n_bins, "the path, there and back", SMALL, made[".webp"])
        shown += note("The whole path. A click on an image goes to its point.")
        return [figure(movie, "there and back", "", SMALL), f"{shown}<p>{links}</p>{fragments.not_finite(bad)}", anew()]
