"""The page: a run to choose, and a tab for each thing to do with it."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr

from pyglow_fast.web.between_tab import BetweenTab
from pyglow_fast.web.desk import Desk
from pyglow_fast.web.edit_tab import EditTab
from pyglow_fast.web.errors import on_page
from pyglow_fast.web.events import QUIET
from pyglow_fast.web.run_tab import RunTab
from pyglow_fast.web.sample_tab import SampleTab
from pyglow_fast.web.score_tab import ScoreTab
from pyglow_fast.web.shelf import Shelf

AT_ONCE = 4  # events that are computed at once


def page(shelf: Shelf) -> gr.Blocks:
    """The Blocks that :func:`~pyglow_fast.web.server.serve` serves."""
    with gr.Blocks(title="pyglow_fast", analytics_enabled=False, fill_width=True) as blocks:
        desk = gr.State(Desk())
        with gr.Row():
            names = shelf.names()
            run = gr.Dropdown(names, value=names[0], label="run", elem_id="run", scale=1)
            about = gr.HTML(elem_id="about")
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
        def opened(found: Desk, name: str) -> tuple[str, Desk]:
            run_ = found.choose(shelf, name)
            shape = "x".join(map(str, run_.model.config.image_shape))
            text = f"step {run_.step:,}, images {shape}, {run_.n_bins} levels"
            return f"<p>{html.escape(text)}</p>", found

        def kept(found: Desk) -> str:
            return f"<p>{html.escape(f'still about {found.run}')}</p>" if found.run else ""

        @on_page()
        def listed() -> Any:
            names = shelf.names()
            return gr.Dropdown(names, value=names[0] if names else None)

        def shown(event: Any) -> None:
            """Fills the tabs: what must be measured first, on the side."""
            inputs = [desk, sample.temperature, sample.n, sample.seed]
            drawn = event.success(on_page()(sample.show), inputs, sample.outputs, **QUIET)
            edit.measure_after(drawn.success(on_page()(edit.show), desk, edit.outputs, **QUIET))
            inputs = [desk, between.kind, between.steps]
            rest = drawn.success(on_page()(between.show), inputs, between.outputs, **QUIET)
            rest = rest.success(on_page()(score.show), desk, score.outputs, **QUIET)
            rest.success(on_page()(looked.show), desk, looked.outputs, **QUIET)

        # Gradio forgets a desk that an event gave back, an hour after its visitor left; others it keeps for ever.
        chosen = run.change(opened, [desk, run], [about, desk], **QUIET)
        chosen.failure(kept, desk, about, **QUIET)
        shown(chosen)
        run_tab.select(on_page()(looked.show), desk, looked.outputs, **QUIET)
        first = blocks.load(listed, None, run, **QUIET)
        shown(first.success(opened, [desk, run], [about, desk], **QUIET))
        taken = sample.pictures.click(on_page()(sample.take), desk, [edit.label, edit.redraw], **QUIET)
        taken.success(lambda: gr.Tabs(selected="edit"), None, tabs, **QUIET)
    blocks.queue(default_concurrency_limit=AT_ONCE)
    return blocks
