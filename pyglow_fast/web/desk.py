"""What one visitor has on the desk: a run, the image under edit, samples, the ends of a path; no two share one."""

from __future__ import annotations

import threading
from typing import Any

import gradio as gr

from pyglow_fast.data import UnreadableImageError
from pyglow_fast.studio.edits import Subject
from pyglow_fast.studio.grids import Grid
from pyglow_fast.studio.opened import OpenRun, Picked, Progress
from pyglow_fast.studio.words import File, HeldOut
from pyglow_fast.web.shelf import Shelf
from pyglow_fast.web.uploads import Upload

NO_CLASS = "its own"  # of the image under edit: none was chosen
MOST_PIXELS = 40_000_000  # of an upload: a photograph of a large camera


class Desk:
    """The state of one visitor. All that depends on the checkpoint is made anew when there is another."""

    def __init__(self) -> None:
        self.run: str | None = None
        self.space: str | None = None
        self.picked: Picked | None = None  # the image under edit
        self.ends: list[Picked | None] = [None, None]  # of the path
        self.strip = ""  # the command of the path's strip
        self.pairs: list[tuple[str, str]] = []  # attributes that have sliders, as (plus, minus)
        self.thumbs: list[int] = []  # numbers of the held-out images that are offered
        self.scored: list[tuple[str, bytes]] = []
        self.grid: Grid | None = None
        self._subject: Subject | None = None
        self._lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Desk:
        return Desk()  # of a new visitor

    def choose(self, shelf: Shelf, name: str) -> OpenRun:
        """Another run: nothing of the last one stays.

        Raises:
            ValueError: it is not served, or cannot be opened; the desk is then as it was.
        """
        opened = shelf.open(name)
        with self._lock:
            self.__init__()  # type: ignore[misc]
            self.run = name
        return opened

    def opened(self, shelf: Shelf) -> OpenRun:
        """The run at its newest checkpoint.

        Raises:
            ValueError: none was chosen, or it is no longer there.
        """
        if self.run is None:
            raise ValueError("run: expected a run to be chosen, found none")
        return shelf.open(self.run)

    def space_of(self, opened: OpenRun) -> str:
        """The space that is edited."""
        return self.space or opened.space

    def subject(self, shelf: Shelf) -> Subject:
        """The image under edit, with its latents by the newest checkpoint.

        Raises:
            ValueError: no image was chosen.
        """
        with self._lock:
            opened = self.opened(shelf)
            if self.picked is None:
                raise ValueError("image: expected an image to edit, found none; choose one above")
            found = self._subject
            if found is None or found.opened is not opened or found.space != self.space_of(opened):
                self._subject = found = Subject(opened, self.picked, self.space_of(opened))
            return found

    def put(self, picked: Picked) -> None:
        """Another image is under edit."""
        with self._lock:
            self.picked, self._subject = picked, None


def picked_upload(opened: OpenRun, upload: Upload, label: int | None = None) -> Picked:
    """An uploaded image, brought to what the model sees.

    Raises:
        UnreadableImageError: it is no image, or too small or too large; the message has its name.
    """
    try:
        return opened.pick_file(upload.data, File(upload.name), label, MOST_PIXELS)
    except MemoryError:
        raise UnreadableImageError(
            f"{upload.name}: expected an image that fits into memory, found a larger one"
        ) from None


def picked_number(opened: OpenRun, number: float | None) -> Picked:
    """A held-out image by its number.

    Raises:
        ValueError: there is none of that number.
    """
    if number is None or number != int(number) or number < 0:
        raise ValueError(f"image: expected the number of a held-out image, from 0, found {number}")
    return opened.pick(HeldOut(int(number)))


def progress_on(progress: gr.Progress, words: str) -> Progress:
    """Shows (done, total) on the page."""
    return lambda done, total: progress((done, total), desc=words, unit="images")
