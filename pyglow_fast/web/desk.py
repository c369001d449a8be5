"""Holds what one visitor works on: a run, the image under edit, samples, the ends of a path; no two share one."""

from __future__ import annotations

import math
import threading
from typing import Any, NamedTuple

import gradio as gr

from pyglow_fast._errors import expect
from pyglow_fast.data import UnreadableImageError
from pyglow_fast.studio.edits import Subject
from pyglow_fast.studio.grids import Grid
from pyglow_fast.studio.opened import OpenRun, Picked, Progress
from pyglow_fast.studio.words import File, HeldOut
from pyglow_fast.web.shelf import Shelf
from pyglow_fast.web.uploads import Upload

NO_CLASS = "its own"  # the class of the image under edit while none was chosen
MOST_PIXELS = 40_000_000  # pixels of an upload: as many as a large camera's photograph has


class Kept(NamedTuple):
    """An image, and the checkpoint by which it was chosen: a sample of it, or the class that it finds likeliest."""

    picked: Picked
    opened: OpenRun

    def by(self, opened: OpenRun) -> Picked:
        """Find the same image by another checkpoint of the run, which draws other samples."""
        return self.picked if opened is self.opened else opened.relabelled(self.picked, self.picked.label)


class Desk:
    """The state of one visitor. All that depends on the checkpoint is made anew when there is another."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waits_for: str | None = None  # a run that was chosen and had no checkpoint
        self._clear(None)

    def _clear(self, run: str | None) -> None:
        self.run = run
        self.space: str | None = None
        self.ends: list[Kept | None] = [None, None]  # the ends of the path
        self.strip = ""  # the command of the path's strip
        self.pairs: list[tuple[str, str]] = []  # attributes that have sliders, as (plus, minus)
        self.thumbs: list[int] = []  # numbers of the held-out images that are offered
        self.grid: Grid | None = None
        self._edited: Kept | None = None  # the image under edit
        self._subject: Subject | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Desk:
        return Desk()  # a copy is for a new visitor

    def choose(self, shelf: Shelf, name: str) -> OpenRun:
        """Choose another run; nothing of the last one stays.

        Raises:
            ValueError: it is not served, or cannot be opened; the desk is then as it was, and waits for the run.
        """
        try:
            opened = shelf.open(name)
        except ValueError:
            self._waits_for = name
            raise
        self._waits_for = None
        opened.images.look_again()
        with self._lock:
            self._clear(name)
        return opened

    def has_come(self, shelf: Shelf) -> bool:
        """Whether the run that could not be opened when it was chosen last can be opened now."""
        if self._waits_for is None:
            return False
        try:
            shelf.open(self._waits_for)
        except ValueError:
            return False
        return True

    def opened(self, shelf: Shelf) -> OpenRun:
        """Open the run at its newest checkpoint.

        Raises:
            ValueError: none was chosen, or it is no longer there.
        """
        if self.run is None:
            raise ValueError("run: expected a run to be chosen, found none")
        return shelf.open(self.run)

    def has(self, opened: OpenRun) -> bool:
        """Whether this run is the chosen one: what was computed for another must not come to the page."""
        return self.run == opened.name

    def space_of(self, opened: OpenRun) -> str:
        """Choose the space that is edited."""
        return self.space or opened.space

    def picked(self, opened: OpenRun) -> Picked | None:
        """The image under edit."""
        with self._lock:
            if self._edited is not None and self._edited.opened is not opened and self.has(opened):
                self._edited = Kept(self._edited.by(opened), opened)
            return None if self._edited is None else self._edited.picked

    def subject(self, shelf: Shelf) -> Subject:
        """The image under edit, with its latents by the newest checkpoint.

        Raises:
            ValueError: no image was chosen.
        """
        with self._lock:
            opened = self.opened(shelf)
            picked = self.picked(opened)
            if picked is None:
                raise ValueError("image: expected an image to edit, found none; choose one above")
            found = self._subject
            if found is None or found.opened is not opened or found.space != self.space_of(opened):
                self._subject = found = Subject(opened, picked, self.space_of(opened))
            return found

    def put(self, picked: Picked, opened: OpenRun) -> None:
        """Put another image of the chosen run under edit."""
        with self._lock:
            if self.has(opened):
                self._edited, self._subject = Kept(picked, opened), None


def picked_upload(opened: OpenRun, upload: Upload, label: int | None = None) -> Picked:
    """Read an uploaded image and bring it to what the model sees.

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
    """Find a held-out image by its number.

    Raises:
        ValueError: there is none of that number.
    """
    whole = isinstance(number, int | float) and math.isfinite(number) and number >= 0 and number == int(number)
    expect(whole, "image", "the number of a held-out image, from 0", number)
    return opened.pick(HeldOut(int(number or 0)))


def check_number(argument: str, value: float | None, most: float = math.inf) -> None:
    """Refuse what a field or a forged event may hold: no number, NaN, inf, one below 0 or above ``most``.

    Raises:
        ValueError: it is one.
    """
    fits = isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= most
    expect(fits, argument, f"a number from 0{f' to {most:g}' if most < math.inf else ''}", value)


def clicked(event: gr.EventData, count: int) -> int:
    """Find which of ``count`` images a click was on.

    Raises:
        ValueError: none, in an event that no click made.
    """
    index = getattr(event, "_data", None)
    index = index.get("index") if isinstance(index, dict) else None
    fits = isinstance(index, int) and not isinstance(index, bool) and 0 <= index < count
    expect(fits, "image", f"a click on one of {count} images", index)
    return int(index)  # type: ignore[arg-type]


def progress_on(progress: gr.Progress, words: str) -> Progress:
    """Make a function that shows (done, total) on the page."""
    return lambda done, total: progress((done, total), desc=words, unit="images")
