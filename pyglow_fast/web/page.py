"""Makes the page: a run to choose, and a tab for each thing to do with it."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr

from pyglow_fast.studio.opened import OpenRun
from pyglow_fast.web.between_tab import BetweenTab
from pyglow_fast.web.desk import Desk
from pyglow_fast.web.edit_tab import EditTab
from pyglow_fast.web.errors import on_page
from pyglow_fast.web.events import QUIET, anew
from pyglow_fast.web.run_tab import RunTab
from pyglow_fast.web.sample_tab import SampleTab
from pyglow_fast.web.score_tab import ScoreTab
from pyglow_fast.web.shelf import Shelf

AT_ONCE = 4  # events that are computed at once
EVERY = 3.0  # seconds from one look for a newer checkpoint to the next


def page(shelf: Shelf) -> gr.Blocks:
    """Make the Blocks that :func:`~pyglow_fast.web.server.serve` serves."""
    with gr.Blocks(title="pyglow_fast", analytics_enabled=False, fill_width=True) as blocks:
        desk = gr.State(Desk())
        with gr.Row():
            names = shelf.names()
            run = gr.Dropdown(names, value=names[0], label="run", elem_id="run", scale=1)
            about = gr.HTML(elem_id="about")
        version, newer, came, clock = gr.State(), gr.State(0), gr.State(0), gr.Timer(EVERY)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Sample", id="sample"):
                sample = SampleTab(shelf, desk)
            with gr.Tab("Edit", id="edit"):
                edit = EditTab(shelf, desk)
            with gr.Tab("Interpolate", id="interpolate"):
                between = BetweenTab(shelf, desk)
            with gr.Tab("Score", id="score"):
                score = ScoreTab(shelf, desk)
            with gr.Tab("Run", id="run") as run_tab:
                looked = RunTab(shelf, desk)

        @on_page()
        def opened(found: Desk, name: str) -> tuple[str, str, Desk]:
            chosen = found.choose(shelf, name)
            return _about(chosen), chosen.checkpoint.digest, found

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
            return [gr.skip()] * 4 if digest == seen else [_about(newest), digest, anew(), gr.skip()]

        def kept(found: Desk) -> str:
            return f"<p>{html.escape(f'still about {found.run}')}</p>" if found.run else ""

        @on_page()
        def listed() -> Any:
            names = shelf.names()
            return gr.Dropdown(names, value=names[0] if names else None)

        clock.tick(ticked, [desk, version], [about, version, newer, came], **QUIET)
        settings = [desk, sample.temperature, sample.label, sample.n, sample.seed]
        # The listener is not one of version, which also changes when a run is chosen: the tabs are filled then, and in
        # their order.
        edit.measure_after(newer.change(on_page()(sample.renew), settings, sample.drawn, **QUIET))

        def fill(event: Any) -> None:
            """Fills the tabs: what must be measured first, on the side."""
            inputs = [desk, sample.temperature, sample.n, sample.seed]
            drawn = event.success(on_page()(sample.show), inputs, sample.outputs, **QUIET)
            edit.measure_after(drawn.success(on_page()(edit.show), desk, edit.outputs, **QUIET))
            inputs = [desk, between.path, between.steps]
            rest = drawn.success(on_page()(between.show), inputs, between.outputs, **QUIET)
            rest = rest.success(on_page()(score.show), desk, score.outputs, **QUIET)
            rest.success(on_page()(looked.show), desk, looked.outputs, **QUIET)

        # Gradio forgets a desk that an event returned, an hour after its visitor left; a desk that none returned it
        # keeps for ever.
        chosen = gr.on([run.change, came.change], opened, [desk, run], [about, version, desk], **QUIET)
        chosen.failure(kept, desk, about, **QUIET)
        fill(chosen)
        run_tab.select(on_page()(looked.show), desk, looked.outputs, **QUIET)
        first = blocks.load(listed, None, run, **QUIET)
        fill(first.success(opened, [desk, run], [about, version, desk], **QUIET))
        taken = sample.pictures.click(on_page()(sample.take), desk, [edit.label, edit.redraw], **QUIET)
        taken.success(lambda: gr.Tabs(selected="edit"), None, tabs, **QUIET)
    blocks.queue(default_concurrency_limit=AT_ONCE)
    return blocks


def _about(opened: OpenRun) -> str:
    """What is open, in a line."""
    shape = "x".join(map(str, opened.model.config.image_shape))
    return f"<p>{html.escape(f'step {opened.step:,}, images {shape}, {opened.n_bins} grey levels')}</p>"
