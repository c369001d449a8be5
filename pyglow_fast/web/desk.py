"""Holds what one visitor works on: a run, the image under edit, samples, the ends of a path; no two share one."""

from __future__ import annotations

import math
import threading
from typing import Any

import gradio as gr

from pyglow_fast._errors import expect
from pyglow_fast.data import UnreadableImageError
from pyglow_fast.models import GlowConfig
from pyglow_fast.studio.directions import Progress
from pyglow_fast.studio.edits import Edit, Subject
from pyglow_fast.studio.opened import OpenRun, OwnImages, Picked
from pyglow_fast.studio.pictures import Between, Grid
from pyglow_fast.studio.words import File, HeldOut
from pyglow_fast.web.shelf import Shelf, Stamp
from pyglow_fast.web.uploads import Upload

NO_CLASS = "its own"  # the class of the image under edit while none was chosen
MOST_PIXELS = 40_000_000  # pixels of an upload: as many as a large camera's photograph has
# What cameras and the web have; Pillow's decoders of the other forty are older, and few look for faults in them.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")


class Kept:
    """An image that was chosen, its latents once they were asked for, and the checkpoint that these are of.

    A sample is one of a checkpoint, and the class of an upload is what a checkpoint finds likeliest.
    """

    def __init__(self, picked: Picked, opened: OpenRun) -> None:
        self.picked, self._opened = picked, opened
        self._subject: Subject | None = None

    def by(self, opened: OpenRun) -> Picked:
        """Find the same image by a newer checkpoint of the run, which draws other samples."""
        if opened is not self._opened:
            self.picked, self._opened = self._picked_by(opened), opened
        return self.picked

    def _picked_by(self, opened: OpenRun) -> Picked:
        return opened.relabelled(self.picked, self.picked.label)

    def subject(self, opened: OpenRun, space: str) -> Subject:
        """Take its latents, once for a checkpoint and a space."""
        picked, found = self.by(opened), self._subject
        if found is None or found.opened is not opened or found.space != space:
            self._subject = found = Subject(opened, picked, space)
        return found


class KeptEdit(Kept):
    """An edit of an image that was chosen, as the file that a command writes, from which it can be read again.

    Args:
        of: the image before the edit.
        edit: what is done to it, which is something.
        space: the space that is edited.
        name: the name of the file.
        opened: the checkpoint.

    Raises:
        ValueError: the edit cannot be made.
    """

    def __init__(self, of: Kept, edit: Edit, space: str, name: str, opened: OpenRun) -> None:
        self._of, self._edit, self._space, self._name = of, edit, space, name
        self.command = ""
        super().__init__(self._picked_by(opened), opened)

    def _picked_by(self, opened: OpenRun) -> Picked:
        """Make the edit by a checkpoint of the run."""
        subject = self._of.subject(opened, self._space)
        made = subject.made(subject.edited(self._edit).pixels, self._edit)
        self.command = made.whole_command(self._name)
        return opened.pick_file(made.data, File(made.file_name(self._name)), subject.picked.label)


class Desk:
    """The state of one visitor. All that depends on the checkpoint is made anew when there is another."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.looks_at: int | str | None = None  # the tab that is open
        self.waits_for: str | None = None  # a run that was chosen and had no checkpoint
        self._clear(None)

    def _clear(self, run: str | None) -> None:
        self.run = run
        self._common: tuple[OwnImages, GlowConfig] | None = None  # what the checkpoints of a run have in common
        self.space: str | None = None
        self.strip = ""  # the command of the path's strip
        self.report: tuple[Stamp, ...] | None = None  # the files that the report is of which is shown
        self.has_path = False  # whether the tab of paths is about the run
        self.drawn_for: tuple[OpenRun, str] | None = None  # the checkpoint and the space of its strip
        self.pairs: list[tuple[str, str]] = []  # attributes that have sliders, as (plus, minus)
        self.thumbs: dict[str, list[int]] = {}  # numbers of the held-out images that a tab offers
        self.grid: Grid | None = None
        self._edited: Kept | None = None  # the image under edit
        self._ends: list[Kept | None] = [None, None]  # of the path

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
            self.waits_for = name
            raise
        self.waits_for = None
        with self._lock:
            self._clear(name)
            self._common = opened.images, opened.model.config
        return opened

    def has_come(self, shelf: Shelf) -> bool:
        """Whether the run that could not be opened when it was chosen last can be opened now."""
        if self.waits_for is None:
            return False
        try:
            shelf.open(self.waits_for)
        except ValueError:
            return False
        return True

    def is_another(self, opened: OpenRun) -> bool:
        """Whether another run took the place of the chosen one in its folder: one of other images or another model."""
        with self._lock:
            return self.has(opened) and self._common != (opened.images, opened.model.config)

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
            if self._edited is None:
                return None
            return self._edited.by(opened) if self.has(opened) else self._edited.picked

    def subject(self, shelf: Shelf) -> Subject:
        """The image under edit, with its latents by the newest checkpoint.

        Raises:
            ValueError: no image was chosen.
        """
        with self._lock:
            opened = self.opened(shelf)
            if self._edited is None:
                raise ValueError("image: expected an image to edit, found none; choose one above")
            return self._edited.subject(opened, self.space_of(opened))

    def put(self, picked: Picked, opened: OpenRun) -> None:
        """Put another image of the chosen run under edit."""
        with self._lock:
            if self.has(opened):
                self._edited = Kept(picked, opened)

    def put_end(self, i: int, picked: Picked, opened: OpenRun) -> None:
        """Make an image of the chosen run the first end of the path, with ``i`` 0, or the last one."""
        with self._lock:
            if self.has(opened):
                self._ends[i] = Kept(picked, opened)

    def put_edited_end(self, i: int, edit: Edit, name: str, opened: OpenRun) -> None:
        """Make the image under edit an end of the path, as the edit leaves it; an edit is then a file of that name.

        Raises:
            ValueError: there is none, or the edit cannot be made.
        """
        with self._lock:
            if self._edited is None:
                raise ValueError("image: expected an image under Edit, found none")
            if self.has(opened):
                space = self.space_of(opened)
                self._ends[i] = self._edited if edit.is_none else KeptEdit(self._edited, edit, space, name, opened)

    @property
    def end_commands(self) -> list[str]:
        """The commands that write those ends of the path which are edits."""
        with self._lock:
            return [end.command for end in self._ends if isinstance(end, KeptEdit)]

    def between(self, shelf: Shelf, spherical: bool) -> Between | None:
        """The path between both ends, with their latents by the newest checkpoint; None where one was not chosen."""
        with self._lock:
            opened = self.opened(shelf)
            first, last = self._ends
            if first is None or last is None:
                return None
            space = self.space_of(opened)
            return Between(first.subject(opened, space), last.subject(opened, space), spherical)


def picked_upload(opened: OpenRun, upload: Upload, label: int | None = None) -> Picked:
    """Read an uploaded image and bring it to what the model sees.

    Raises:
        UnreadableImageError: it is no image, or too small or too large; the message has its name.
    """
    try:
        return opened.pick_file(upload.data, File(upload.name), label, MOST_PIXELS, FORMATS)
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


def with_class(text: str, picked: Picked, opened: OpenRun) -> str:
    """Write the class of an image behind what is said of it, where it has one."""
    return text if picked.label is None else f"{text}; class {opened.classes[picked.label]}"


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
