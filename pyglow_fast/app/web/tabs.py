"""Makes the tabs of samples, of scores and of the run's report."""

from __future__ import annotations

import functools
import math
import random
import shlex
from typing import Any

import gradio as gr
import torch

from pyglow_fast.app.studio import Draw, File, Grid, HeldOut, OpenRun, Picked, Subject, score_files
from pyglow_fast.app.studio.pictures import made_csv, made_picture
from pyglow_fast.app.studio.words import shown_name
from pyglow_fast.app.web import fragments
from pyglow_fast.app.web.handlers import check_count, clicked, follow, listen
from pyglow_fast.app.web.uploads import FilesBox, Upload, read
from pyglow_fast.app.web.visitors import Visitor
from pyglow_fast.train import RunFolder, class_columns, page_of

ALL = "all classes in turn"
ROWS, SHOWN, MOST = 4, 24, 100  # samples: of each class, without classes, at most
MOST_SEED = 2**53  # the browser's numbers are exact as far
TEMPERATURE, HOTTEST = 0.7, 1.2
REPORTS = 4  # reports that are kept, of about a megabyte each
EXAMPLE = "An example: two images that the model was not trained on, and noise. Drop images of yours above."


def command_box(elem_id: str) -> gr.Textbox:
    """Make a box for the command line that gives what a tab shows, to be copied."""
    words, style = "the same from the command line", "pgf-command"
    return gr.Textbox(label=words, buttons=["copy"], interactive=False, elem_id=elem_id, elem_classes=style)


def button(text: str, elem_id: str) -> gr.Button:
    """Make a button as wide as its text."""
    return gr.Button(text, size="md", scale=0, min_width=0, elem_id=elem_id, elem_classes="pgf-button")


class SampleTab:
    """Samples: temperature, class, seed and number; a click on an image puts it under edit."""

    def __init__(self, visitor: gr.State) -> None:
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                self.pictures = gr.HTML(js_on_load=fragments.PICK_JS, elem_id="samples")
                self.command = command_box("sample-command")
            with gr.Column(scale=1, min_width=260):
                words, about = "temperature", "lower: likelier images, and less varied"
                temperature = gr.Slider(0, HOTTEST, TEMPERATURE, step=0.05, label=words, info=about, elem_id=words)
                self.label = gr.Dropdown([ALL], value=ALL, label="class", visible=False, elem_id="sample-class")
                self.n = gr.Slider(1, MOST, SHOWN, step=1, label="images", elem_id="sample-n")
                seed = gr.Number(0, precision=0, label="seed", elem_id="sample-seed")
                again = button("Another seed", "sample-again")
        self.inputs, self.outputs = [visitor, temperature, self.label, self.n, seed], [self.pictures, self.command]
        self.widgets = [self.label, self.n, *self.outputs]
        # One listener: no earlier picture comes after a later one.
        follow([temperature, self.n], [seed.change, self.label.input], self.draw, self.inputs, self.outputs)
        listen(again.click, lambda: random.randrange(10**6), None, seed)

    def fill(self, visitor: Visitor) -> list[Any]:
        """Offer the classes of a run that was chosen, and as many images as show a few of each."""
        classes = visitor.opened().classes
        n = ROWS * (class_columns(MOST, len(classes) or None) or SHOWN // ROWS)
        return [gr.Dropdown([ALL, *classes], value=ALL, visible=bool(classes)), n, "", ""]

    def draw(self, visitor: Visitor, temperature: float, label: str | None, n: float, seed: float | None) -> list[Any]:
        """Draw samples, and write the command that draws them."""
        opened = visitor.opened()
        labels = () if label in (None, ALL) else (opened.label(str(label)),)
        count, number = check_count("n", n, MOST), check_count("seed", seed or 0, MOST_SEED)
        found = Grid(opened, Draw(count, float(temperature), number, labels))
        drawn, made = found.drawn, found.made()
        if not visitor.has(opened):
            return [gr.skip()] * 2
        visitor.grid = found
        names = [""] * count if drawn.labels is None else [f", {opened.classes[int(y)]}" for y in drawn.labels]
        words = [f"sample {i}{name}: edit it" for i, name in enumerate(names)]
        shown = fragments.grid(list(drawn.pixels), opened.n_bins, words, found.heads)
        below = f"{fragments.save_link(made, 'samples.png', 'Save PNG')} A click on an image takes it to Edit."
        return [
            f"{shown}<p>{below}</p>{fragments.not_finite(len(drawn.not_finite))}",
            made.whole_command("samples.png"),
        ]

    def take(self, visitor: Visitor, event: gr.EventData) -> None:
        """Put the sample that was clicked under edit."""
        if visitor.grid is not None:
            visitor.edited = Subject(visitor.grid.opened, visitor.grid.picked(clicked(event, visitor.grid.draw.n)))


class ScoreTab:
    """Scores: bits/dim of images that a visitor drops, on the histogram of held-out ones; at first of an example."""

    def __init__(self, visitor: gr.State) -> None:
        words, kinds = "images to score", ["image"]
        files = FilesBox(label=words, file_count="multiple", file_types=kinds, height=140, elem_id="score-files")
        self.outputs = [gr.HTML(elem_id="scores"), command_box("score-command")]
        scored = listen(files.upload, self.score, [visitor, files], [files, *self.outputs], show_progress="full")
        listen(scored.failure, lambda: None, None, files)

    def fill(self, visitor: Visitor) -> list[Any]:
        """Score what is no visitor's, so that there is something to see."""
        opened = visitor.opened()
        try:
            middle = len(opened.images()[2]) // 2  # neighbours are alike
            held_out = [opened.pick(HeldOut(number)) for number in (0, middle)]
        except ValueError as error:
            return [fragments.note(f"No example: {error}"), gr.Textbox("", visible=False)]
        pixels = held_out[0].pixels
        noise = torch.randint(opened.n_bins, pixels.shape, generator=torch.Generator().manual_seed(0)).to(pixels)
        shown, _, _ = _results(opened, [*held_out, opened.picked(noise, File("noise"))])
        if visitor.scored:  # meanwhile
            return [gr.skip()] * 2
        return [fragments.note(EXAMPLE) + shown, gr.Textbox("", visible=False)]

    def score(self, visitor: Visitor, uploads: list[Upload]) -> list[Any]:
        """Make the table and the histogram of what was dropped, and the command that does."""
        opened = visitor.opened()
        files, refused = read(opened, uploads)
        visitor.scored = True
        shown, links, command = _results(opened, files)
        return [None, shown + "".join(map(fragments.note, refused)) + links, gr.Textbox(command, visible=True)]


def _results(opened: OpenRun, files: list[Picked]) -> tuple[str, str, str]:
    scores, rows = score_files(opened, files), []
    for i, score in enumerate(scores, 1):
        name, label = f"{i} {shown_name(score.picked.image)}", score.picked.label
        told = "none: too far off" if score.far else "" if label is None else opened.classes[label]
        bits = f"{score.bits:.3f}" if math.isfinite(score.bits) else "no finite likelihood"
        share = "" if math.isnan(score.share_below) else f"{score.share_below:.1%}"
        seen = fragments.image(score.picked.pixels, opened.n_bins, f"{name} as the model sees it", fragments.THUMB)
        rows.append([seen, name, bits, share, *([told] if opened.classes else [])])
    head = ["seen as", "image", "bits/dim", "held-out images with fewer", *(["class"] if opened.classes else [])]
    csv, shown = made_csv(opened, scores), [fragments.table(head, rows)]
    links, command = fragments.save_link(csv, "scores.csv", "Save CSV"), csv.whole_command("scores.csv")
    try:
        picture = made_picture(opened, scores)
        shown.insert(
            0, fragments.plot(picture, "Bars: held-out images. Lines: those scored; arrows lead beyond the axis.")
        )
        links += fragments.save_link(picture, "scores.png", "Save PNG")
        command += f" {picture.out_words('scores.png')}"
    except ValueError as error:
        shown.append(fragments.note(f"No histogram: {error}"))
    return fragments.row(shown, "results") + fragments.note(fragments.BITS), f"<p>{links}</p>", command


class RunTab:
    """The report of a run: its settings, curves and figures."""

    def __init__(self) -> None:
        self.outputs = [gr.HTML(js_on_load=fragments.FIT_JS, elem_id="run-page"), command_box("run-command")]

    def fill(self, visitor: Visitor) -> list[Any]:
        """Show the page of the run as it was at the newest checkpoint, and the command that writes it."""
        opened = visitor.opened()
        page = _report(opened.folder, opened.name, opened.checkpoint.digest)
        return [page, shlex.join(["pyglow-fast", "report", opened.name, "--out", "report.html"])]


@functools.lru_cache(REPORTS)
def _report(folder: RunFolder, name: str, digest: str) -> str:
    """The page of a run at a checkpoint, drawn once for all visitors."""
    return fragments.framed(page_of(folder), f"report of {name}")
