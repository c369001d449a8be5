"""Replays on the CPU: recordings in the place of CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from pyglow_fast import replays
from support.captures import Recording, capture_guard, like_a_gpu


class Side:
    """A stand-in for the side stream, and whether it is the current one."""

    def __init__(self) -> None:
        self.is_current = False

    @contextlib.contextmanager
    def entered(self, stream: object) -> Iterator[None]:
        assert stream is self
        self.is_current = True
        try:
            yield
        finally:
            self.is_current = False

    def capture(self, function: Callable[[], Any], stream: object) -> tuple[Callable[[], None], Any]:
        assert stream is self, "captured on another stream than the one that was warmed up"
        with Recording() as graph, capture_guard():
            result = function()
        return graph.replay, result


@contextlib.contextmanager
def recorded_graphs() -> Iterator[Side]:
    """A context in which Replays takes the CPU for a GPU, and its captures are recordings."""
    side = Side()
    own = {"_side_stream": lambda device: side, "_on": side.entered, "_capture": side.capture}
    own["rehearsed"] = capture_guard
    with like_a_gpu(), mock.patch.multiple(replays, **own):
        yield side
