"""What a handler raises, as the page says it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import web

web.require("gradio")

import gradio as gr  # noqa: E402

from pyglow_fast.data import MissingExtraError, UnreadableImageError  # noqa: E402
from pyglow_fast.web.between_tab import BetweenTab  # noqa: E402
from pyglow_fast.web.desk import Desk  # noqa: E402
from pyglow_fast.web.edit_tab import EditTab  # noqa: E402
from pyglow_fast.web.errors import LONGEST, on_page, sentence  # noqa: E402
from pyglow_fast.web.shelf import Shelf  # noqa: E402


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("seed: expected an int, found x", "seed: expected an int, found x"),
        ("first\nsecond", "first"),
        ("\n  \nfirst", "first"),
        ("", ""),
        ('<img src=x onerror=alert(1)> & "more"', "&lt;img src=x onerror=alert(1)&gt; &amp; &quot;more&quot;"),
        ("/srv/runs/demo/last.pt: no checkpoint", "last.pt: no checkpoint"),
        ("No such file: '/srv/secret/a.png'", "No such file: &#x27;a.png&#x27;"),
        (r"C:\Users\me\a.png: broken", "a.png: broken"),
        ("3.2 bits/dim, 1/2 and and/or stay", "3.2 bits/dim, 1/2 and and/or stay"),
        ("x" * (LONGEST + 1), "x" * (LONGEST - 3) + "..."),
    ],
)
def test_a_message_is_one_line_of_text_without_folders(message: str, shown: str) -> None:
    assert sentence(message) == shown


def plain(error: Exception) -> Callable[[], Any]:
    @on_page()
    def handler() -> None:
        raise error

    return handler


def generator(error: Exception) -> Callable[[], Any]:
    @on_page()
    def handler() -> Iterator[int]:
        yield 1
        raise error

    return lambda: list(handler())


@pytest.mark.parametrize("handler", [plain, generator])
@pytest.mark.parametrize("error", [ValueError("a<b"), UnreadableImageError("a<b"), MissingExtraError("a<b")])
def test_bad_input_is_said_and_not_logged(
    handler: Callable[[Exception], Callable[[], Any]], error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(gr.Error) as raised:
        handler(error)()
    assert raised.value.message == "a&lt;b"
    assert not raised.value.print_exception
    assert caplog.records == []


@pytest.mark.parametrize("handler", [plain, generator])
def test_a_fault_is_logged_and_only_its_class_is_said(
    handler: Callable[[Exception], Callable[[], Any]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(gr.Error) as raised:
        handler(KeyError("/srv/secret"))()
    assert raised.value.message.startswith("KeyError: ")
    assert "secret" not in raised.value.message
    assert "log" in raised.value.message
    assert "Traceback" in caplog.text
    assert "/srv/secret" in caplog.text


def test_an_error_made_for_the_page_passes() -> None:
    error = gr.Error("<b>as it is</b>")
    with pytest.raises(gr.Error) as raised:
        plain(error)()
    assert raised.value is error


def test_what_succeeds_is_left_alone() -> None:
    """A generator stays one, which Gradio looks at, and a function keeps its result, name and signature."""

    @on_page()
    def numbers(up_to: int) -> Iterator[int]:
        yield from range(up_to)

    @on_page()
    def double(number: int) -> int:
        return 2 * number

    assert list(numbers(3)) == [0, 1, 2]
    assert gr.utils.get_function_params(double)[0][0] == "number"
    assert (double(2), double.__name__) == (4, "double")


def test_a_forged_number_of_images_is_told_by_its_name() -> None:
    """A slider of the page gives none such, but an event that nobody's browser made may."""
    with gr.Blocks(analytics_enabled=False):
        shelf, desk = Shelf([]), gr.State()
        tab = BetweenTab(shelf, desk, EditTab(shelf, desk))
    click = gr.EventData(None, {"index": 0})
    assert tab.point(5, click)[0] == 0
    for steps in (float("nan"), float("inf"), 1e9):
        with pytest.raises(ValueError, match=r"^images: expected a number from 0 to 25, found"):
            tab.point(steps, click)
        with pytest.raises(ValueError, match=r"^images: expected a number from 0 to 25, found"):
            tab.drawn(Desk(), "linear", steps)
