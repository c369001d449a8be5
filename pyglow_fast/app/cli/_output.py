"""Prints what commands say: results and errors of one line, progress, the next command; no control characters."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pyglow_fast._core.errors import did_you_mean, visible
from pyglow_fast.data import Yardstick
from pyglow_fast.train import Score

# "preset: expected one of cifar10, lsun64, found 'cifar'": the end of a message about a name, and the names.
_UNKNOWN = re.compile(r"(?:expected one of|data: expected) (?P<known>.*), found '(?P<word>[^':]+)[^']*'")
_NAME = re.compile(r"[A-Za-z][\w./-]+")


class InputError(Exception):
    """Raised when something the user gave is wrong; the message says what, what was expected and what was found."""


@contextmanager
def user_input() -> Iterator[None]:
    """A context for code that looks at what the user gave: a ValueError there is the user's to mend.

    Errors raised outside of it are bugs and keep their traceback.
    """
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error


def say(text: object, lines: bool = False) -> None:
    """Print a line, or a text that has lines of its own, in which nothing acts on the terminal."""
    print(visible(str(text), lines))


def say_error(error: object, lines: bool = False) -> None:
    """Print an error, in one line unless it has lines of its own; of an unknown name with the nearest that is known."""
    text = str(error)
    found = _UNKNOWN.fullmatch(text.partition(": ")[2]) or _UNKNOWN.fullmatch(text)
    if found is not None:
        word = found["word"]
        is_folder = text.startswith("data: ") and Path(word).is_dir()
        text += f"; did you mean 'folder:{word}'?" if is_folder else did_you_mean(word, _NAME.findall(found["known"]))
    print(f"error: {visible(text, lines)}", file=sys.stderr)


def say_next(*words: str) -> None:
    """Print a command that may come next, ready to be copied."""
    say(f"next: {shlex.join(['pyglow-fast', *words])}")


def not_finite_note(count: int, of: str = "of them") -> str:
    """Say how many images were not finite, as the end of a sentence; empty for none."""
    return f" ({count} {of} not finite, shown grey)" if count else ""


def table(scores: dict[str, Score], yardsticks: Iterable[Yardstick] = ()) -> str:
    """Write scores and yardsticks as aligned lines."""
    rows = []
    for name, score in scores.items():
        labels = "" if score.accuracy is None else f"; labels {score.accuracy:.1%} right, {score.class_bits:.3f} bits"
        rows.append((name, score.mean, f"± {score.error_text} bits/dim, {score.images} images{labels}"))
    rows += [(item.name, item.bits_per_dim, f"bits/dim, {item.how}") for item in yardsticks]
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"  {name.ljust(width)}  {value:>7.3f}  {rest}" for name, value, rest in rows)
