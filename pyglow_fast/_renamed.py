"""Former names of arguments and fields, which go on working for one version and warn."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from pyglow_fast._errors import expect

T = TypeVar("T")
P = ParamSpec("P")


def renamed_words(old: str, new: str) -> str:
    """What is said of a name that is another one now."""
    return f"{old} is called {new} now; the old name goes with the next version"


def warn_renamed(old: str, new: str, stacklevel: int = 2) -> None:
    """Warns that ``old`` is called ``new`` now.

    Args:
        old, new: the names.
        stacklevel: 1 is who calls this function, 2 who called that one.
    """
    warnings.warn(renamed_words(old, new), DeprecationWarning, stacklevel + 1)


def renamed(old: str, new: str, value: T, default: T, formerly: T | None) -> T:
    """The value of an argument that may be given by its former name, in a function that somebody else calls.

    Args:
        old, new: the names.
        value: what was given as ``new``.
        default: of ``new``.
        formerly: what was given as ``old``, or None.

    Raises:
        ValueError: both were given.
    """
    if formerly is None:
        return value
    expect(value == default, old, f"nothing beside {new}, its name now", repr(formerly))
    warn_renamed(old, new, 3)
    return formerly


def with_former_argument(old: str, new: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates a function whose argument ``new`` was called ``old``: it may be given as a keyword of that name."""

    def decorated(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def called(*values: P.args, **options: P.kwargs) -> T:
            if old in options:
                expect(new not in options, old, f"nothing beside {new}, its name now", repr(options[old]))
                warn_renamed(old, new)
                options[new] = options.pop(old)
            return function(*values, **options)

        return called

    return decorated


def with_former_field(old: str, new: str) -> Callable[[type[T]], type[T]]:
    """Decorates a NamedTuple whose field ``new`` was called ``old``: it may be given and read by that name."""

    def decorated(made: type[T]) -> type[T]:
        make = made.__new__

        @functools.wraps(make)
        def new_or_old(cls: type[T], *values: Any, **fields: Any) -> T:
            if old in fields:
                expect(new not in fields, old, f"nothing beside {new}, its name now", repr(fields[old]))
                warn_renamed(old, new)
                fields[new] = fields.pop(old)
            return make(cls, *values, **fields)

        def read(self: T) -> Any:
            warn_renamed(old, new)
            return getattr(self, new)

        made.__new__ = new_or_old  # type: ignore[method-assign,assignment]
        setattr(made, old, property(read, doc=f"``{new}`` by its former name."))
        return made

    return decorated
