"""Turns a handler's failure into one plain sentence for the user, and a traceback for the log."""

from __future__ import annotations

import functools
import html
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import gradio as gr

from pyglow_fast.data import MissingExtraError
from pyglow_fast.web.html import note

Handler = TypeVar("Handler", bound=Callable[..., Any])

LOG = logging.getLogger("pyglow_fast.web")
LONGEST = 400  # characters of a message: a toast is no place for more
# An absolute path of two parts or more, as POSIX or Windows writes it; only its last part is kept.
_PATH = re.compile(r"(?<![\w./:\\])(?:[A-Za-z]:)?(?:[\\/][^\\/\s'\",:;()<>]+)+[\\/]([^\\/\s'\",:;()<>]+)")


def plain_sentence(message: str) -> str:
    """Take the first line of a message, without the folders of files in it: a visitor need not know them."""
    line = next((line for line in message.splitlines() if line.strip()), "").strip()
    line = _PATH.sub(r"\1", line)
    return line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."


def reason(error: Exception, missing: str = "") -> str:
    """Write as HTML, in quiet type, why something is not shown: ``missing`` says what, the rest is its sentence."""
    return note(missing + plain_sentence(str(error)))


def sentence(message: str) -> str:
    """Write :func:`plain_sentence` as HTML that shows just these characters."""
    return html.escape(plain_sentence(message))


def refusal(message: str) -> gr.Error:
    """Make the error that shows ``message`` on the page and nothing in the log."""
    return gr.Error(sentence(message), print_exception=False)


@contextmanager
def _shown(log: logging.Logger, handler: str) -> Iterator[None]:
    try:
        yield
    except gr.Error:
        raise
    except (ValueError, MissingExtraError) as error:
        raise refusal(str(error)) from error
    except Exception as error:
        log.error("%s failed", handler, exc_info=error)
        said = f"{type(error).__name__}: this should not have happened; the traceback is in the log of the server."
        raise gr.Error(html.escape(said), print_exception=False) from error


def on_page(log: logging.Logger = LOG) -> Callable[[Handler], Handler]:
    """Decorate a handler of the page, function or generator: what it raises becomes a ``gr.Error``.

    A ValueError or a missing library is the user's to mend: the first line of its message is shown as text, with the
    folders of files left out. Any other exception is a fault: it is written to ``log`` with its traceback, and the page
    shows the name of its class. A ``gr.Error`` is raised as it is.
    """

    def decorate(handler: Handler) -> Handler:
        name = getattr(handler, "__qualname__", repr(handler))
        if inspect.isgeneratorfunction(handler):

            @functools.wraps(handler)
            def generate(*args: Any, **options: Any) -> Any:
                with _shown(log, name):
                    return (yield from handler(*args, **options))

            return cast(Handler, generate)

        @functools.wraps(handler)
        def call(*args: Any, **options: Any) -> Any:
            with _shown(log, name):
                return handler(*args, **options)

        return cast(Handler, call)

    return decorate
