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
        self._kept: dict[Hashable, Any] | None = None

    def __reduce__(self) -> tuple[type[Folded], tuple[()]]:
        """A copy of a run begins with nothing."""
        return Folded, ()

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """A context in which :meth:`get` keeps what it makes."""
        with self._lock:
            self._entered += 1
            self._kept = {} if self._kept is None else self._kept
        try:
            yield
        finally:
            with self._lock:
                self._entered -= 1
                self._kept = self._kept if self._entered else None

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Make something, or give what was made for that key in this context."""
        kept: dict[Hashable, T] | None = self._kept
        if kept is None:
            return make()
        return kept[key] if key in kept else kept.setdefault(key, make())
