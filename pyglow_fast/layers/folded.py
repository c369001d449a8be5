"""The cache of ``with model.folded():``, of the folded maps of a run of steps."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class Folded:
    """What is made of a run's parameters, kept within a context; no write to a parameter is noticed there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entered = 0
        self._kept: dict[Hashable, Any] = {}

    def __reduce__(self) -> tuple[type[Folded], tuple[()]]:
        """A copy of a run begins with nothing."""
        return Folded, ()

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """A context in which :meth:`get` keeps what it makes."""
        with self._lock:
            self._entered += 1
        try:
            yield
        finally:
            with self._lock:
                self._entered -= 1
                if not self._entered:
                    self._kept.clear()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Make something, or give what was made for that key in this context."""
        if not self._entered:
            return make()
        found = self._kept.get(key)
        if found is None:
            found = make()
            with self._lock:
                if self._entered:
                    self._kept[key] = found
        return found
