"""Locks the folder of a run, so that no other process trains in it meanwhile."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from pyglow_fast.train.files import FolderError, refusing


class FolderLock:
    """A lock on a folder, held through a file in it. Making the object touches nothing.

    Where the system or the file system has no locks, nothing is promised.

    Args:
        path: the file, which stays when the lock is given back.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None
        self._is_held = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A context in which this process holds the lock.

        Raises:
            FolderError: somebody else holds it, or the file cannot be made.
        """
        with refusing():
            self._take()
        try:
            yield
        finally:
            self._close()
            self._is_held = False

    @property
    def is_lost(self) -> bool:
        """Whether the lock was held, and its file is not there any more or is another one."""
        if not self._is_held:
            return False
        try:
            return self._handle is None or not os.path.samestat(os.fstat(self._handle), os.stat(self.path))
        except OSError:
            return True

    def take_again(self) -> None:
        """Take the lock of the file that is there now, or of a new one.

        Raises:
            FolderError: somebody else holds it, and this one stays lost.
            OSError: the file cannot be made.
        """
        self._close()
        self._take()

    def _take(self) -> None:
        try:
            import fcntl  # posix only
        except ImportError:
            return
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        _handles.add(self._handle)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._is_held = True
        except BlockingIOError:
            self._close()
            where = repr(str(self.path.parent))
            raise FolderError(f"out: expected a run that no other process trains, found one in {where}") from None
        except OSError:
            pass  # no locks there

    def _close(self) -> None:
        if self._handle is not None:
            _handles.discard(self._handle)
            os.close(self._handle)
        self._handle = None


_handles: set[int] = set()  # file descriptors of the locks that this process holds


def _close_all() -> None:
    """Close the locks in a forked process that reads images: it must not hold them when this one is killed."""
    for handle in _handles:
        os.close(handle)
    _handles.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_all)
