"""Turns Ctrl-C and SIGTERM into a request that the training loop answers between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """A context in which the first SIGINT or SIGTERM only sets :attr:`signum`; a second has its ordinary effect.

    Python lets only the main thread handle signals; in another thread this does nothing.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._former: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._former[signum] = signal.signal(signum, self._note)
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()

    def release(self) -> None:
        """Give signals their ordinary effect from now on: all that matters is saved."""
        self._restore()

    def _restore(self) -> None:
        while self._former:
            signum, handler = self._former.popitem()
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
