"""Makes the tab of a run: its settings, curves and figures."""

from __future__ import annotations

import functools
import shlex
from typing import Any

import gradio as gr

from pyglow_fast.train import RunFolder
from pyglow_fast.train.page import page_of
from pyglow_fast.web.desk import Desk
from pyglow_fast.web.errors import on_page
from pyglow_fast.web.html import framed
from pyglow_fast.web.shelf import Shelf, Stamp
from pyglow_fast.web.widgets import button, command_box

REPORTS = 4  # reports that are kept, of about a megabyte each


def stamps_of(folder: RunFolder) -> tuple[Stamp, ...]:
    """Look up name, time of change (ns) and size of all files that a report may be about; none of them is read."""
    found = []
    for place in (folder.path, folder.checkpoints, folder.sample_history):
        for path in sorted(place.iterdir()) if place.is_dir() else []:
            try:
                state = path.stat()
            except OSError:  # it is gone, or leads nowhere
                continue
            if path.is_file():
                found.append((str(path), state.st_mtime_ns, state.st_size))
    return tuple(found)


@functools.lru_cache(REPORTS)
def _report(name: str, stamps: tuple[Stamp, ...]) -> str:
    """The page of a run as its files were at ``stamps`` or later, drawn once for all visitors."""
    return framed(page_of(RunFolder(name)), f"report of {name}")


class RunTab:
    """The widgets and handlers of the tab of a run; to be made inside of gr.Blocks."""

    EMPTY = ("", "")  # until it is looked at

    def __init__(self, shelf: Shelf, desk: gr.State) -> None:
        self._shelf = shelf
        self.again = button("Read again", "run-again")
        self.page = gr.HTML(elem_id="run-page")
        self.command = command_box("run-command")
        self.outputs = [self.page, self.command]
        self.as_they_are = [gr.skip() for _ in self.outputs]
        self.again.click(on_page()(self.show), desk, self.outputs, api_visibility="private")

    def look(self, desk: Desk) -> list[Any]:
        """Show the page of the run, unless what is shown is about the same files."""
        known = desk.run is None or desk.report == stamps_of(desk.opened(self._shelf).folder)
        return self.as_they_are if known else self.show(desk)

    def show(self, desk: Desk) -> list[Any]:
        """Show the page of the run as its files are now, and the command that writes it."""
        opened = desk.opened(self._shelf)
        stamps = stamps_of(opened.folder)
        page = _report(opened.name, stamps)
        command = shlex.join(["pyglow-fast", "report", opened.name, "--out", "report.html"])
        if not desk.has(opened):  # another run was chosen meanwhile
            return self.as_they_are
        desk.report = stamps
        return [page, command]
