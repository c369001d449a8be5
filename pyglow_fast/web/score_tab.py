"""Makes the tab of scores: bits/dim of images that a visitor drops, on the histogram of held-out ones."""

from __future__ import annotations

import html
import math
from typing import Any

import gradio as gr

from pyglow_fast.studio.opened import LostImagesError, Picked
from pyglow_fast.studio.scored import made_csv, made_picture, score_files
from pyglow_fast.studio.words import shown_name
from pyglow_fast.web.desk import Desk, picked_upload, progress_on
from pyglow_fast.web.errors import on_page, reason
from pyglow_fast.web.events import QUIET
from pyglow_fast.web.html import BITS, LIVE_JS, THUMB, image, note, plot, save_link, table
from pyglow_fast.web.shelf import Shelf
from pyglow_fast.web.uploads import Upload, UploadedFiles
from pyglow_fast.web.widgets import command_box


class ScoreTab:
    """The widgets and handlers of the tab of scores; to be made inside of gr.Blocks."""

    EMPTY = (None, note(f"Each image is cropped and scaled as in training. {BITS}"), "")

    def __init__(self, shelf: Shelf, desk: gr.State) -> None:
        self._shelf = shelf
        self.files = UploadedFiles(
            label="images to score", file_count="multiple", file_types=["image"], height=160, elem_id="score-files"
        )
        self.results = gr.HTML(self.EMPTY[1], js_on_load=LIVE_JS, elem_id="scores")
        self.command = command_box("score-command")
        self.outputs = [self.files, self.results, self.command]
        scored = self.files.upload(
            on_page()(self.score), [desk, self.files], self.outputs, trigger_mode="once", api_visibility="private"
        )
        scored.failure(lambda: None, None, self.files, **QUIET)

    def score(
        self,
        desk: Desk,
        uploads: list[Upload],
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        """Make the table and the histogram of what was dropped."""
        opened = desk.opened(self._shelf)
        if not uploads:
            return list(self.EMPTY)
        files: list[Picked] = []
        refused: list[ValueError] = []
        for upload in uploads:
            try:
                files.append(picked_upload(opened, upload))
            except ValueError as error:  # the others are scored without it
                refused.append(error)
        if not files:
            raise refused[0]
        scores = score_files(opened, files, progress_on(progress, "measuring bits/dim of the run's images"))
        rows = []
        for score in scores:
            name = shown_name(score.picked.image)
            cells = [
                image(score.picked.pixels, opened.n_bins, f"{name} as the model sees it", THUMB),
                f'<span class="pgf-name">{html.escape(name)}</span>',
                f"{score.bits:.3f}" if math.isfinite(score.bits) else "no finite likelihood",
                "" if math.isnan(score.share_below) else f"{score.share_below:.1%}",
            ]
            if score.picked.label is not None:
                cells.append(html.escape(opened.classes[score.picked.label]))
            rows.append(cells)
        head = ["seen as", "image", "bits/dim", "training images with fewer"]
        if opened.classes:
            head.append("likeliest class")
        csv = made_csv(opened, scores)
        links, parts = [save_link(csv, "scores.csv", "Save CSV")], [table(head, rows, numbered=len(rows) > 1)]
        command = csv.whole_command("scores.csv")
        try:
            picture = made_picture(opened, scores)
        except LostImagesError as error:
            parts.append(reason(error, "No histogram: "))
        else:
            parts.insert(0, plot(picture.data, "the images on the histogram of held-out ones"))
            links.append(save_link(picture, "scores.png", "Save PNG"))
            command += f" {picture.out_words('scores.png')}"
        lost = [reason(error) for error in refused]
        found = f'<div class="pgf-results">{"".join(parts)}</div>'
        return [None, "".join([found, *lost, f"<p>{''.join(links)}</p>", note(BITS)]), command]
