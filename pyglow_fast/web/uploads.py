"""Takes files that a user gives: their bytes reach the handler unread, and soon nothing of them is on disk."""

from __future__ import annotations

import contextlib
import os
import threading
from abc import ABCMeta
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.component_meta import ComponentMeta
from gradio.data_classes import FileData, ImageData, ListFiles

from pyglow_fast.web.errors import refusal
from pyglow_fast.web.gate import FILES_AT_ONCE, MAX_FILE_SIZE

LONGEST_NAME = 255  # characters: file systems have none longer
MOST_FILES = 64  # files that one handler gets; all of them are in memory at once
MOST_BYTES = FILES_AT_ONCE * MAX_FILE_SIZE  # and the bytes of all: as many as one upload may bring
LINGER = 3.0  # seconds that a file stays after it was read: the browser may still be fetching it to show it


@dataclass(frozen=True)
class Upload:
    """A file as it was uploaded: its name on the user's machine (the last part), and its bytes.

    A picture of the webcam is named image.png, one from the clipboard clipboard.png.
    """

    name: str
    data: bytes


def clean_name(name: str | None, otherwise: str = "upload") -> str:
    """Take the last part of a path, without characters that do not print, of at most LONGEST_NAME characters.

    Args:
        name: the name as the browser gave it, which may be a path of any system.
        otherwise: the name where nothing is left of it.
    """
    last = (name or "").replace("\\", "/").rstrip("/").rpartition("/")[2]
    last = "".join(character for character in last if character.isprintable())
    if len(last) > LONGEST_NAME:
        stem, ending = os.path.splitext(last)
        ending = ending[:10]
        last = stem[: LONGEST_NAME - len(ending)] + ending
    return otherwise if last.strip() in ("", ".", "..") else last


def _forget(path: Path, inode: int) -> None:
    """Unlink a file, unless the same was uploaded again meanwhile: it has the same name and another inode."""
    try:
        if path.stat().st_ino == inode:
            path.unlink()
            path.parent.rmdir()  # named by the file's hash, it holds nothing else
    except OSError:
        pass  # gone already, or the folder is in use again


def sweep(folder: Path, before: float) -> None:
    """Remove the files in a folder, not below it, that were last written before a moment: uploads that were broken off.

    Args:
        folder: where Gradio writes what arrives; what arrived as a whole it moves to a folder below.
        before: seconds as ``time.time`` has them.
    """
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # gone meanwhile
            if path.is_file() and path.lstat().st_mtime < before:
                path.unlink()


def take(payload: FileData | ImageData, cache: str, linger: float = LINGER) -> Upload:
    """Read an uploaded file, which is unlinked ``linger`` seconds later.

    Args:
        payload: what the page sent; its path must lie in the cache. Its url is not looked at.
        cache: the folder that holds what was uploaded.

    Raises:
        gr.Error: it is not there any more, or lies elsewhere.
    """
    name = clean_name(payload.orig_name)
    folder = Path(cache).resolve()
    path = Path(payload.path or "").resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        raise refusal(f"{name}: not on the server any more; choose the file again")
    try:
        with path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            data = file.read()
    except OSError:
        raise refusal(f"{name}: not on the server any more; choose the file again") from None
    timer = threading.Timer(linger, _forget, (path, inode))
    timer.daemon = True
    timer.start()
    return Upload(name, data)


class WithoutStub(ComponentMeta):
    """Makes a component's class as Gradio does, but writes no .pyi beside this file."""

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        return ABCMeta.__new__(cls, name, bases, namespace)


class UploadedImage(gr.Image, metaclass=WithoutStub):
    """A ``gr.Image`` for input whose handler gets an :class:`Upload`, or None; nothing opens the picture before it.

    The file is gone some seconds after a handler read it. So listen to ``upload`` alone, which a file, the webcam and
    the clipboard cause (``input`` and ``change`` also come with None, when a source is chosen), keep what you make of
    the picture in a ``gr.State``, give this component None and show the picture elsewhere.
    """

    is_template = True  # the browser shows it as an image

    def preprocess(self, payload: ImageData | None) -> Upload | None:  # type: ignore[override]
        return None if payload is None else take(payload, self.GRADIO_CACHE)


class UploadedFiles(gr.File, metaclass=WithoutStub):
    """A ``gr.File`` for input, also with ``file_count="multiple"``, whose handler gets a list of :class:`Upload`.

    As with :class:`UploadedImage` the files can be read once. More than MOST_FILES are refused unread, and those that
    have more than MOST_BYTES together.
    """

    is_template = True

    def preprocess(self, payload: ListFiles | FileData | None) -> list[Upload]:  # type: ignore[override]
        if payload is None:
            return []
        files = [payload] if isinstance(payload, FileData) else list(payload)
        if len(files) > MOST_FILES:  # a request may name one file thousands of times
            raise refusal(f"files: expected at most {MOST_FILES} at once, found {len(files)}")
        taken: list[Upload] = []
        for file in files:
            taken.append(take(file, self.GRADIO_CACHE))
            if sum(len(upload.data) for upload in taken) > MOST_BYTES:
                raise refusal(f"files: expected at most {MOST_BYTES // 2**20} MB at once, found more")
        return taken
