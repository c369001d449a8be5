"""Makes the tab of a run: its settings, curves and figures."""

from __future__ import annotations

import shlex

import gradio as gr

from pyglow_fast.studio.commands import run_word
from pyglow_fast.train.page import page_of
from pyglow_fast.web.desk import Desk
from pyglow_fast.web.errors import on_page
from pyglow_fast.web.html import framed
from pyglow_fast.web.shelf import Shelf
from pyglow_fast.web.widgets import button, command_box


class RunTab:
    """The widgets and handlers of the tab of a run; to be made inside of gr.Blocks."""

    def __init__(self, shelf: Shelf, desk: gr.State) -> None:
        self._shelf = shelf
        self.again = button("Read again", "run-again")
        self.page = gr.HTML(elem_id="run-page")
        self.command = command_box("run-command")
        self.outputs = [self.page, self.command]
        self.again.click(on_page()(self.show), desk, self.outputs, api_visibility="private")

    def show(self, desk: Desk) -> list[str]:
        """Show the page of the run as its files are now, and the command that writes it."""
        opened = desk.opened(self._shelf)
        words = shlex.join(["pyglow-fast", "report", run_word(opened.name), "--out", "report.html"])
        return [framed(page_of(opened.folder), f"report of {opened.name}"), words]
