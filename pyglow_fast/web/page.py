"""Makes the page: a run to choose, and a tab for each thing to do with it."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import gradio as gr

from pyglow_fast.studio.opened import OpenRun
from pyglow_fast.train.page import title_of
from pyglow_fast.web.between_tab import BetweenTab
from pyglow_fast.web.desk import Desk
from pyglow_fast.web.edit_tab import EditTab
from pyglow_fast.web.errors import on_page
from pyglow_fast.web.events import QUIET, anew
from pyglow_fast.web.html import LIVE_JS
from pyglow_fast.web.run_tab import RunTab
from pyglow_fast.web.sample_tab import SampleTab
from pyglow_fast.web.score_tab import ScoreTab
from pyglow_fast.web.shelf import Shelf

AT_ONCE = 4  # events that are computed at once
MOST_WAITING = 1000  # and that wait for it; a hundred visitors have some each
EVERY = 3.0  # seconds from one look for a newer checkpoint to the next


def page(shelf: Shelf) -> gr.Blocks:
    """Make the Blocks that :func:`~pyglow_fast.web.server.serve` serves."""
    with gr.Blocks(title="pyglow_fast", analytics_enabled=False, fill_width=True) as blocks:
        desk = gr.State(Desk())
        with gr.Row(equal_height=False):
            names = shelf.names()
            run = gr.Dropdown(names, value=names[0], label="run", elem_id="run", scale=1, min_width=300)
            with gr.Column(scale=2, min_width=300):
                about = gr.HTML(js_on_load=LIVE_JS, elem_id="about")
        version, newer, other, clock = gr.State(), gr.State(0), gr.State(0), gr.Timer(EVERY)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Sample", id="sample") as sample_tab:
                sample = SampleTab(shelf, desk)
            with gr.Tab("Edit", id="edit") as edit_tab:
                edit = EditTab(shelf, desk)
            with gr.Tab("Interpolate", id="interpolate") as between_tab:
                between = BetweenTab(shelf, desk, edit)
            with gr.Tab("Score", id="score") as score_tab:
                score = ScoreTab(shelf, desk)
            with gr.Tab("Run", id="run") as run_tab:
                looked = RunTab(shelf, desk)

        renewed = [about, version, desk, *between.contents, *score.outputs, *looked.outputs]

        @on_page()
        def opened(found: Desk, name: str) -> list[Any]:
            """Opens a run. Of the last one nothing stays in the tabs that are filled when they are looked at."""
            newest = found.choose(shelf, name)
            return [_about(newest), newest.checkpoint.digest, found, *between.EMPTY, *score.EMPTY, *looked.EMPTY]

        def noted(tab: gr.Tab, fill: Callable[..., list[Any]] | None = None) -> Callable[..., list[Any] | None]:
            """A handler that notes which tab is open, and fills it where it has waited for that."""

            @on_page()
            def come(found: Desk, *settings: Any) -> list[Any] | None:
                found.looks_at = tab.id
                return None if fill is None else fill(found, *settings)

            return come

        @on_page()
        def again(found: Desk, path: str, count: float) -> list[Any]:
            """Fills the tab that is open when a run was opened, where it is one of those that wait."""
            ways = between.look(found, path, count) if found.looks_at == between_tab.id else between.as_they_are
            return [*ways, *(looked.look(found) if found.looks_at == run_tab.id else looked.as_they_are)]

        chosen_path = [desk, between.path, between.count]
        for tab in (sample_tab, edit_tab, score_tab):
            tab.select(noted(tab), desk, None, **QUIET)
        between_tab.select(noted(between_tab, between.look), chosen_path, between.outputs, **QUIET)
        run_tab.select(noted(run_tab, looked.look), desk, looked.outputs, **QUIET)

        @on_page()
        def ticked(found: Desk, seen: str | None) -> list[Any]:
            """Notices a newer checkpoint; what is wrong with it is said by the next thing that is done."""
            if found.has_come(shelf):
                return [*[gr.skip()] * 3, anew()]
            try:
                newest = found.opened(shelf)
            except ValueError:
                return [gr.skip()] * 4
            digest = newest.checkpoint.digest
            if digest == seen:
                return [gr.skip()] * 4
            if found.is_another(newest):
                return [gr.skip(), digest, gr.skip(), anew()]
            return [_about(newest), digest, anew(), gr.skip()]

        @on_page()
        def opened_anew(found: Desk) -> list[Any]:
            """Opens the run that was waited for, or that took the place of the chosen one in its folder."""
            return opened(found, found.waits_for or str(found.run))

        def still(found: Desk) -> str:
            return f"<p>{html.escape(f'still about {found.run}')}</p>" if found.run else ""

        @on_page()
        def listed() -> Any:
            names = shelf.names()
            return gr.Dropdown(names, value=names[0] if names else None)

        clock.tick(ticked, [desk, version], [about, version, newer, other], **QUIET)
        settings = [desk, sample.temperature, sample.label, sample.n, sample.seed]
        # The listener is not one of version, which also changes when a run is chosen: the tabs are filled then, and in
        # their order.
        renewed_samples = newer.change(on_page()(sample.renew), settings, sample.drawn, **QUIET)
        edit.measure_after(renewed_samples)
        renewed_samples.success(again, chosen_path, [*between.outputs, *looked.outputs], **QUIET)

        def fill(event: Any) -> None:
            """Fills the tabs: what must be measured first, on the side; paths and report where they are looked at."""
            inputs = [desk, sample.temperature, sample.n, sample.seed]
            drawn = event.success(on_page()(sample.show), inputs, sample.outputs, **QUIET)
            edit.measure_after(drawn.success(on_page()(edit.show), desk, edit.outputs, **QUIET))
            drawn.success(again, chosen_path, [*between.outputs, *looked.outputs], **QUIET)

        # Gradio forgets a desk that an event returned, an hour after its visitor left; a desk that none returned it
        # keeps for ever.
        chosen = run.change(opened, [desk, run], renewed, **QUIET)
        chosen.failure(still, desk, about, **QUIET)
        fill(chosen)
        fill(other.change(opened_anew, desk, renewed, **QUIET))
        first = blocks.load(listed, None, run, **QUIET)
        fill(first.success(opened, [desk, run], renewed, **QUIET))
        taken = sample.pictures.click(on_page()(sample.take), desk, [edit.label, edit.redraw], **QUIET)
        taken.success(lambda: gr.Tabs(selected="edit"), None, tabs, **QUIET)
    blocks.queue(default_concurrency_limit=AT_ONCE, max_size=MOST_WAITING)
    return blocks


def _about(opened: OpenRun) -> str:
    """What is open: its name, what it learned, and for how long."""
    channels, height, width = opened.model.config.image_shape
    n_bins = opened.n_bins
    depths = {1: f"{n_bins} grey levels", 3: f"{n_bins} levels of red, green and blue"}
    depth = depths.get(channels, f"{channels} channels of {n_bins} levels")
    source, colon, place = opened.checkpoint.config.data.name.partition(":")
    data = f"{source}{colon}{PurePath(place).name}"  # a visitor need not know the folders of the server
    title = title_of(opened.folder, data)
    said = f"step {opened.step:,}; images of {width} x {height} pixels, {depth}"
    return f"<h1>{html.escape(title)}</h1><p>{html.escape(said)}</p>"
