"""The cache of ``with model.folded():``, of the folded maps of a run of steps."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class Folded(threading.local):
    """What a thread makes of a run's parameters, kept within a context; no write to a parameter is noticed there."""

    _kept: dict[Hashable, Any] | None = None

    def __reduce__(self) -> tuple[type[Folded], tuple[()]]:
        """A copy of a run begins with nothing."""
        return Folded, ()

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """A context in which :meth:`get` keeps what it makes."""
        outside = self._kept
        self._kept = {} if outside is None else outside
        try:
            yield
        finally:
            self._kept = outside

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Make something, or give what was made for that key in this context."""
        kept: dict[Hashable, T] | None = self._kept
        if kept is None:
            return make()
        return kept[key] if key in kept else kept.setdefault(key, make())
