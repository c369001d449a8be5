"""A page that needs no model, as a program: what tests of the server, of uploads and of errors talk to.

Its arguments are those of ``serve``, as JSON.
"""

from __future__ import annotations

import atexit
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from pyglow_fast.web.errors import on_page
from pyglow_fast.web.server import serve
from pyglow_fast.web.uploads import Upload, UploadedFiles, UploadedImage

SLOW = 600.0  # seconds: longer than any test waits


@on_page()
def double(number: float) -> str:
    return f"twice: {2 * number:g}"


@on_page()
def fail(cause: str) -> str:
    if cause == "input":
        raise ValueError("<img src=x onerror=alert(1)> **bold** [link](javascript:alert(1))\nsecond line")
    raise KeyError("/srv/secret/file.txt")


@on_page()
def count() -> Iterator[str]:
    yield "one"
    raise ValueError("the generator stops at /srv/secret/run/two.png")


@on_page()
def slow() -> str:
    atexit.register(print, "the interpreter was torn down under a handler", file=sys.stderr)
    Path("computing").touch()
    end = time.monotonic() + SLOW
    while time.monotonic() < end:
        pass
    return "done"


def told(upload: Upload | None) -> str:
    return "none" if upload is None else f"{upload.name}: {len(upload.data)} bytes"


@on_page()
def received(upload: Upload | None) -> tuple[Any, str]:
    if upload is None:
        return gr.skip(), "none"
    return None, told(upload)


@on_page()
def received_files(uploads: list[Upload]) -> str:
    return "; ".join(told(upload) for upload in uploads) or "none"


def page() -> gr.Blocks:
    with gr.Blocks(title="A small page", analytics_enabled=False) as blocks:
        number = gr.Slider(0, 10, value=3, label="Number")
        out = gr.Textbox(label="Out")
        number.release(double, number, out)
        gr.Button("Double").click(double, number, out)
        cause = gr.State("input")
        other = gr.State("other")
        gr.Button("Bad input").click(fail, cause, out)
        gr.Button("Fault").click(fail, other, out)
        gr.Button("Count").click(count, None, out)
        gr.Button("Slow").click(slow, None, out)
        image = UploadedImage(label="Picture", buttons=[])
        image.upload(received, image, [image, out])
        files = UploadedFiles(label="Files", file_count="multiple")
        files.upload(received_files, files, out)
    return blocks


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    if options.get("auth"):
        options["auth"] = tuple(options["auth"])
    serve(page, **options)
