"""Writes files so that a reader, or the next run after a crash, never sees half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyglow_fast._core.errors import expect

TEMPORARY = ".partial"


class FolderError(ValueError):
    """Raised when the folder of a run cannot be made or written, or another process trains in it."""


def check_place(argument: str, path: Path) -> None:
    """Refuse a path that the system does not take, as one that is too long, and a link that leads nowhere."""
    try:
        os.lstat(f"{path}{TEMPORARY}")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:  # the latter of a NUL
        found = getattr(error, "strerror", error)
        raise ValueError(f"{argument}: expected a path that the system takes, found {found}") from error
    astray = path.is_symlink() and not path.exists()
    expect(not astray, argument, "no link that leads nowhere", repr(str(path)))


def check_file(argument: str, path: Path) -> None:
    """Refuse a path where no file can be written: see :func:`check_place`; a folder, or one in none that is there."""
    check_place(argument, path)
    place = repr(str(path))
    expect(path.parent.is_dir(), argument, "a file in an existing folder", place)
    expect(not path.is_dir(), argument, "a file", f"a folder, {place}")
    expect(os.access(path.parent, os.W_OK), argument, "a file in a folder that can be written", place)


@contextmanager
def refusing() -> Iterator[None]:
    """A context for the first writes of a run: what the disk refuses is a FolderError, the user's to mend."""
    try:
        yield
    except OSError as error:
        raise FolderError(f"out: expected a folder that can be written, found {error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A context that gives a temporary path; on success the file there is flushed and takes the place of ``path``.

    A crash leaves at most a ``*.partial`` file, which the next write replaces.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        temporary.touch()
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself must survive a power cut; Windows cannot open a folder
        _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` by a file with these bytes."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``."""
    write_bytes(path, text.encode())
