"""Listens to the page without a spinner, and so that the last of many events is the one that counts."""

import itertools
from collections.abc import Iterable
from typing import Any

import gradio as gr

QUIET: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
# Listeners to a slider are not queued, which would take as long as the edit itself; of the drags that come while one is
# computed, only the last is computed.
DRAG: dict[str, Any] = QUIET | {"queue": False}
_NUMBERS = itertools.count(1)


def moves(sliders: Iterable[gr.Slider]) -> list[Any]:
    """List the events by which visitors move sliders: ``input`` as they drag or type; ``release`` as they let go.

    A click on a slider's button "Reset" is a ``release`` alone; so is a number beyond the ends that becomes the end.
    """
    return [event for slider in sliders for event in (slider.input, slider.release)]


def follow(triggers: Any, handler: Any, inputs: Any, outputs: Any) -> None:
    """Listen as for drags; what fails is done again in the queue, without which Gradio shows no error."""
    dragged = gr.on(triggers, handler, inputs, outputs, **DRAG)
    dragged.failure(handler, inputs, outputs, **QUIET)


def anew() -> int:
    """Give a number that no call gave before: a gr.State that takes it has changed, so its listeners are called.

    Each picture has one listener, so that the picture of an earlier event never comes after that of a later one.
    """
    return next(_NUMBERS)
