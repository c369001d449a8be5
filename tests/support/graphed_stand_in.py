"""Glow.make_graphed on the CPU: recordings in the place of CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from support.captures import Recording, capture_guard, like_a_gpu, own_factorisations

from pyglow_fast.models import graphed


def _capture(function: Callable[[], Any], stream: object) -> tuple[Callable[[], None], Any]:
    assert stream == STREAM, "captured on another stream than the one that was warmed up"
    with Recording() as graph, capture_guard():
        result = function()
    return graph.replay, result


STREAM = "the side stream"


@contextlib.contextmanager
def recorded_graphs() -> Iterator[None]:
    """Inside, make_graphed takes a model on the CPU as one on a GPU, and its captures are recordings."""

    def warm_up(function: Callable[[], object], stream: object) -> None:
        assert stream == STREAM
        for _ in range(graphed.WARM_UPS):
            function()

    with (
        like_a_gpu(),
        own_factorisations(),
        mock.patch.object(graphed, "_require_gpu", lambda device: None),
        mock.patch.object(graphed, "_side_stream", lambda device: contextlib.nullcontext(STREAM)),
        mock.patch.object(graphed, "_warm_up", warm_up),
        mock.patch.object(graphed, "_capture", _capture),
    ):
        yield
