"""A page that needs no model, as a program: what tests of the server talk to.

Its arguments are those of ``Place``, as JSON, ``uploads_last``, seconds, and ``max_uploads``, bytes.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import gradio as gr

from pyglow_fast.app.web import server
from pyglow_fast.app.web.handlers import listen
from pyglow_fast.app.web.uploads import ImageBox, Upload

SLOW = 600.0  # seconds: longer than any test waits


def fail(cause: str) -> str:
    if cause == "input":
        raise ValueError("<img src=x onerror=alert(1)> is no number")
    raise KeyError("/srv/secret/file.txt")


def slow() -> str:
    Path("computing").touch()
    time.sleep(SLOW)
    return "done"


def received(uploads: list[Upload]) -> str:
    return "; ".join(f"{upload.name}: {len(upload.path.read_bytes())} bytes" for upload in uploads)


def page() -> gr.Blocks:
    with gr.Blocks(title="A small page", analytics_enabled=False) as blocks:
        out = gr.Textbox(label="Secret label")
        listen(gr.Button("Double").click, lambda number: f"twice: {2 * number:g}", gr.Slider(0, 10), out)
        cause = gr.Textbox()
        listen(gr.Button("Fail").click, fail, cause, out)
        listen(gr.Button("Slow").click, slow, None, out)
        listen(gr.Button("Received").click, received, ImageBox(), out)
    blocks.queue(default_concurrency_limit=2, max_size=2, api_open=False)
    return blocks


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    server.UPLOADS_LAST = options.pop("uploads_last", server.UPLOADS_LAST)
    server.MAX_UPLOADS = options.pop("max_uploads", server.MAX_UPLOADS)
    server.MAX_FILE_SIZE = 100 * 1024
    server.serve(page, server.Place(**options))
