"""Listens to the page without a spinner, and so that the last of many events is the one that counts."""

import itertools
from typing import Any

import gradio as gr

QUIET: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
# What follows a slider is not queued, which would cost as long as the edit itself; of the drags that come while one is
# computed the last one counts.
DRAG: dict[str, Any] = QUIET | {"queue": False}
_NUMBERS = itertools.count(1)


def follow(triggers: Any, handler: Any, inputs: Any, outputs: Any) -> None:
    """Listen as for drags; what fails is done again in the queue, without which Gradio shows no error."""
    dragged = gr.on(triggers, handler, inputs, outputs, **DRAG)
    dragged.failure(handler, inputs, outputs, **QUIET)


def anew() -> int:
    """Give a number that no call gave before: a gr.State that takes it has changed, so its listeners are called.

    One picture has one listener, so that what an earlier event asked for never comes after what a later one did.
    """
    return next(_NUMBERS)
