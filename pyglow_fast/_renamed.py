"""Former names of arguments, fields and functions, which go on working for one version and warn."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from pyglow_fast._errors import expect

T = TypeVar("T")
P = ParamSpec("P")


def renamed_words(old: str, new: str) -> str:
    """Write the sentence that tells a user of ``old`` what it is called now."""
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
    _accept(old, new, formerly, value == default)
    return formerly


def _accept(old: str, new: str, formerly: object, alone: bool) -> None:
    """Warns of a value by its former name, unless the new one is given too, which is refused."""
    expect(alone, old, f"nothing beside {new}, its name now", repr(formerly))
    warn_renamed(old, new, 4)


def _take_former(old: str, new: str, options: dict[str, Any]) -> None:
    """Renames a keyword in ``options``, for the caller of the function that calls this one."""
    if old in options:
        _accept(old, new, options[old], new not in options)
        options[new] = options.pop(old)


def with_former_argument(old: str, new: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates a function whose argument ``new`` was called ``old``: it may be given as a keyword of that name."""

    def decorated(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def called(*values: P.args, **options: P.kwargs) -> T:
            _take_former(old, new, options)
            return function(*values, **options)

        return called

    return decorated


def with_former_field(old: str, new: str) -> Callable[[type[T]], type[T]]:
    """Decorates a NamedTuple or dataclass whose field ``new`` was called ``old``: it may be given and read so."""

    def decorated(made: type[T]) -> type[T]:
        maker = "__init__" if dataclasses.is_dataclass(made) else "__new__"
        make = getattr(made, maker)

        @functools.wraps(make)
        def new_or_old(made_or_self: Any, *values: Any, **fields: Any) -> Any:
            _take_former(old, new, fields)
            return make(made_or_self, *values, **fields)

        setattr(made, maker, new_or_old)
        setattr(made, old, former_attribute(old, new))
        return made

    return decorated


def former_attribute(old: str, new: str) -> Any:
    """A property for the body of a class: the attribute ``new`` by its former name ``old``, to be read."""

    def read(self: Any) -> Any:
        warn_renamed(old, new)
        return getattr(self, new)

    return property(read, doc=f"``{new}`` by its former name.")


def former_function(old: str, function: Callable[P, T]) -> Callable[P, T]:
    """Gives a function or method by its former name ``old``."""
    new = function.__name__

    def called(*values: P.args, **options: P.kwargs) -> T:
        warn_renamed(old, new)
        return function(*values, **options)

    called.__name__, called.__doc__ = old, f"``{new}`` by its former name."
    return called
