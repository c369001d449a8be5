"""Glow.make_graphed on the CPU: recordings in the place of CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from pyglow_fast.models import graphed
from support.captures import Recording, capture_guard, like_a_gpu


class Side:
    """A stand-in for the side stream, and whether it is the current one."""

    def __init__(self) -> None:
        self.is_current = False

    @contextlib.contextmanager
    def entered(self, device: torch.device) -> Iterator[Side]:
        self.is_current = True
        try:
            yield self
        finally:
            self.is_current = False

    def capture(self, function: Callable[[], Any], stream: object) -> tuple[Callable[[], None], Any]:
        assert stream is self, "captured on another stream than the one that was warmed up"
        with Recording() as graph, capture_guard():
            result = function()
        return graph.replay, result


@contextlib.contextmanager
def recorded_graphs() -> Iterator[Side]:
    """A context in which make_graphed takes a model on the CPU as one on a GPU, and its captures are recordings."""
    side = Side()
    own = {"_side_stream": side.entered, "_capture": side.capture}
    with like_a_gpu(), mock.patch.multiple(graphed, **own):
        yield side
