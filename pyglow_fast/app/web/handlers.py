"""Listens to the page: errors become one sentence, and of many events the last one counts."""

from __future__ import annotations

import functools
import html
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gradio as gr

from pyglow_fast._core.errors import expect
from pyglow_fast.data import MissingExtraError

QUIET: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
_NUMBERS = itertools.count(1)


def on_page(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a handler of the page: what the user is to mend (a ValueError, a missing library) is shown as text.

    Any other exception is a fault, of which Gradio writes the traceback to the log and shows nothing but "Error".
    """

    @functools.wraps(handler)
    def call(*args: Any, **options: Any) -> Any:
        try:
            return handler(*args, **options)
        except (ValueError, MissingExtraError) as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    return call


def listen(events: Any, handler: Callable[..., Any], inputs: Any, outputs: Any, **options: Any) -> Any:
    """Call a handler on an event, or on each of a list, without a spinner unless ``options`` say otherwise."""
    if isinstance(events, list):
        return gr.on(events, on_page(handler), inputs, outputs, **QUIET | options)
    return events(on_page(handler), inputs, outputs, **QUIET | options)


def follow(sliders: Iterable[gr.Slider], others: Sequence[Any], handler: Any, inputs: Any, outputs: Any) -> None:
    """Call a handler while sliders are dragged, and on other events.

    It is not queued, which would take as long as an edit itself. What fails is done again in the queue, without which
    Gradio shows no error. A click on a slider's button "Reset" is a ``release`` alone.
    """
    moves = [event for slider in sliders for event in (slider.input, slider.release)]
    dragged = listen([*moves, *others], handler, inputs, outputs, queue=False)
    listen(dragged.failure, handler, inputs, outputs)


def anew() -> int:
    """Give a number that no call gave before: a gr.State that takes it has changed, so its listeners are called."""
    return next(_NUMBERS)


def check_count(argument: str, value: float | None, most: float) -> int:
    """Read a whole number from 0 to ``most``, which a field or a forged event may not hold."""
    fits = isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= most and value == int(value)
    expect(fits, argument, f"a whole number from 0 to {most:g}", value)
    return int(value or 0)


def clicked(event: gr.EventData, count: int) -> int:
    """Find which of ``count`` images a click was on."""
    data = getattr(event, "_data", None)
    return check_count("image", data.get("index") if isinstance(data, dict) else None, count - 1)
