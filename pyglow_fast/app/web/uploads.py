"""Takes images that visitors upload, within limits of pixels that Gradio does not have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import gradio as gr
from gradio.data_classes import FileData, ImageData, ListFiles

from pyglow_fast._core.errors import expect
from pyglow_fast.app.studio import File, OpenRun, Picked
from pyglow_fast.data import optional
from pyglow_fast.data.files import FORMATS

MOST_FILES = 64  # of one event
MOST_PIXELS = 40_000_000  # of an image: as many as a large camera's photograph has
EVENT_PIXELS = 160_000_000  # of all images of one event, which take a second or two to decode


class Upload(NamedTuple):
    """An uploaded file: its name on the visitor's machine (of a path the last part), and where it lies here."""

    name: str
    path: Path

    @classmethod
    def of(cls, payload: FileData | ImageData) -> Upload:
        """Take what the page sent; Gradio has looked that the path is one of an upload."""
        last = (payload.orig_name or "").replace("\\", "/").rpartition("/")[2]
        last = "".join(character for character in last if character.isprintable()).strip()
        return cls("upload" if last in ("", ".", "..") else last, Path(payload.path or ""))


class ImageBox(gr.Image):
    """A ``gr.Image`` for input whose handler gets a list of one :class:`Upload`, or none; nothing has opened it yet."""

    is_template = True  # the browser shows it as an image

    def preprocess(self, payload: ImageData | None) -> list[Upload]:  # type: ignore[override]
        return [] if payload is None else [Upload.of(payload)]


class FilesBox(gr.File):
    """A ``gr.File`` for input of several files, whose handler gets a list of :class:`Upload`."""

    is_template = True

    def preprocess(self, payload: ListFiles | None) -> list[Upload]:  # type: ignore[override]
        return [Upload.of(file) for file in payload or ()]


def read(opened: OpenRun, uploads: Sequence[Upload]) -> tuple[list[Picked], list[str]]:
    """Bring uploaded images to what the model sees, and say in a sentence what is wrong with each of the others."""
    expect(1 <= len(uploads) <= MOST_FILES, "files", f"1 to {MOST_FILES} at once", len(uploads))
    pixels = sum(map(_pixels, uploads))
    most = f"at most {EVENT_PIXELS // 10**6} million pixels in all images together"
    expect(pixels <= EVENT_PIXELS, "files", most, f"{pixels // 10**6} million")
    found, refused = [], []
    for name, path in uploads:
        try:
            found.append(opened.pick_file(path, File(name), None, MOST_PIXELS))
        except ValueError as error:
            refused.append(str(error))
    if not found:
        raise ValueError(refused[0])
    return found, refused


def _pixels(upload: Upload) -> int:
    """Read the number of pixels from the head of a file; None where there is no head that says it."""
    pil = optional("PIL.Image", "the page")
    try:
        with pil.open(upload.path, formats=FORMATS) as image:
            return math.prod(image.size)
    except (OSError, ValueError, SyntaxError, pil.DecompressionBombError):
        return 0
