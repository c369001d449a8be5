"""Makes the page: a run to choose, and a tab for each thing to do with it."""

from __future__ import annotations

import html
from pathlib import PurePath
from typing import Any

import gradio as gr

from pyglow_fast.app.studio import OpenRun
from pyglow_fast.app.web.edit import BetweenTab, EditTab
from pyglow_fast.app.web.handlers import anew, listen
from pyglow_fast.app.web.tabs import RunTab, SampleTab, ScoreTab
from pyglow_fast.app.web.visitors import Shelf, Visitor
from pyglow_fast.train.page import title_of

AT_ONCE = 4  # events that are computed at once
MOST_WAITING = 200  # and that wait for it; a visitor has a few


def page(shelf: Shelf) -> gr.Blocks:
    """Make the Blocks that :func:`~pyglow_fast.app.web.server.serve` serves."""
    with gr.Blocks(title="pyglow_fast", analytics_enabled=False, fill_width=True) as blocks:
        visitor, names = gr.State(Visitor(shelf)), shelf.names()
        with gr.Row(equal_height=False):
            about = gr.HTML(elem_id="about")
            run = gr.Dropdown(names, value=names[0], label="run", elem_id="run", visible=len(names) > 1)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Sample", id="sample"):
                sample = SampleTab(visitor)
            with gr.Tab("Edit", id="edit") as edit_tab:
                edit = EditTab(visitor)
            with gr.Tab("Interpolate", id="interpolate") as between_tab:
                between = BetweenTab(visitor)
            with gr.Tab("Score", id="score") as score_tab:
                score = ScoreTab(visitor)
            with gr.Tab("Run", id="run") as run_tab:
                report = RunTab()

        def choose(found: Visitor, name: str) -> list[Any]:
            """Opens a run, of which samples are shown; the other tabs are filled when they are looked at."""
            return [_about(found.choose(name)), found, gr.Tabs(selected="sample"), gr.Dropdown(shelf.names())]

        def once(tab: Any) -> Any:
            """A handler that fills a tab for a run when it is first looked at."""

            def look(found: Visitor) -> list[Any]:
                if tab in found.filled:
                    return [gr.skip()] * len(tab.outputs)
                found.filled.add(tab)
                return list(tab.fill(found))

            return look

        opened = listen([blocks.load, run.input], choose, [visitor, run], [about, visitor, tabs, run])
        filled = listen(opened.success, sample.fill, visitor, sample.widgets)
        listen(filled.success, sample.draw, sample.inputs, sample.outputs)
        edit.measure_after(listen(edit_tab.select, once(edit), visitor, edit.outputs), visitor)
        for tab, inside in ((between_tab, between), (score_tab, score), (run_tab, report)):
            listen(tab.select, once(inside), visitor, inside.outputs, show_progress="full")
        taken = listen(sample.pictures.click, sample.take, visitor, None)
        listen(taken.success, lambda: (gr.Tabs(selected="edit"), anew()), None, [tabs, edit.taken])
    blocks.queue(default_concurrency_limit=AT_ONCE, max_size=MOST_WAITING, api_open=False)
    return blocks


def _about(opened: OpenRun) -> str:
    channels, height, width = opened.model.config.image_shape
    depths = {1: f"{opened.n_bins} grey levels", 3: f"{opened.n_bins} levels of red, green and blue"}
    depth = depths.get(channels, f"{channels} channels of {opened.n_bins} levels")
    source, colon, place = opened.checkpoint.config.data.name.partition(":")
    title = title_of(opened.folder, f"{source}{colon}{PurePath(place).name}")
    said = f"step {opened.step:,}; images of {width} x {height} pixels, {depth}"
    return f"<h1>{html.escape(title)}</h1><p>{html.escape(said)}</p>"
