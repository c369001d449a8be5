"""Makes widgets that several tabs have."""

from __future__ import annotations

import gradio as gr

from pyglow_fast.web.uploads import UploadedImage


def command_box(elem_id: str) -> gr.Textbox:
    """Make a box for the command line that gives what a tab shows, to be copied."""
    return gr.Textbox(label="the same from the command line", buttons=["copy"], interactive=False, elem_id=elem_id)


def image_box(label: str, height: int, elem_id: str) -> UploadedImage:
    """Make a box for an image of the visitor's own: a file, the webcam's picture or the clipboard's."""
    return UploadedImage(
        label=label, sources=["upload", "webcam", "clipboard"], type="filepath", height=height, elem_id=elem_id
    )
