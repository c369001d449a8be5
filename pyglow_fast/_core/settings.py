"""A setting is declared once, at its field of a dataclass: type, range, meaning, default, option of the command line.

What else says something of a setting is made from that: the check when the dataclass is constructed (check_settings),
the options and help texts of ``train`` and ``ablate`` (app/cli/training), the keys of configuration files and which
may say "none" (train/config), what a resumed run may change (train/config), the list of fields in the class's
docstring (``settings`` below).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from pyglow_fast._core.errors import expect

# The headings of the options.
IMAGES = "images (what a source does not have, it refuses)"
MODEL = "model"
OPTIMISATION = "optimisation"
COMPUTING = "how it is computed"
OUTPUT = "output, in training steps"
GROUPS = (IMAGES, MODEL, OPTIMISATION, COMPUTING, OUTPUT)

_MOST_INT = 2**63 - 1  # what torch's generators, shapes and files of tensors hold
_KEY = "setting"
Class = TypeVar("Class", bound=type[Any])


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may be: all finite ones unless it says more.

    ``why`` is the reason of ``most`` where larger numbers have a meaning, but no good end: the message says it.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    why: str = ""

    def words(self, whole: bool) -> str:
        """The range in words, without the bound that has a reason: "a positive whole number"."""
        noun = "whole number" if whole else "number"
        most = None if self.why else self.most
        if self.least is not None and most is not None:
            low, high = value_text(self.least), value_text(most)
            return f"a whole number in {low}..{high}" if whole else f"a number from {low} to {high}"
        if self.above is not None and self.below is not None:
            return f"a {noun} between {value_text(self.above)} and {value_text(self.below)}"
        if self.least is not None and self.below is not None:
            return f"a {noun} from {value_text(self.least)} to below {value_text(self.below)}"
        positive = self.above == 0 or (whole and self.least == 1)
        if positive:
            return f"a positive {noun}" + ("" if most is None else f", at most {value_text(most)}")
        if self.least is not None:
            return f"a {noun}, {value_text(self.least)} or more"
        return f"a {noun}" if whole else f"a finite {noun}"

    def bound(self) -> str:
        """The bound that has a reason, with it: "at most 1024 (each is a process)"; empty if there is none."""
        return "" if self.most is None or not self.why else f"at most {value_text(self.most)} ({self.why})"

    def check(self, name: str, value: Any, whole: bool = False, or_none: str = "") -> None:
        """Refuse what is no number of this range, or no int where it is to be ``whole``.

        ``or_none`` says what else may be, in words, for the message: ", or none".
        """
        number_types = int if whole else int | float
        is_number = isinstance(value, number_types) and not isinstance(value, bool) and abs(value) < math.inf
        fits = is_number and self._fits(value)
        expect(fits, name, f"{self.words(whole)}{or_none}", repr(value))
        size = abs(value) if self.least is None and self.above is None else value
        expect(not self.why or self.most is None or size <= self.most, name, self.bound(), value)
        expect(not whole or abs(value) <= _MOST_INT, name, f"at most {_MOST_INT} (64 bits hold no more)", value)

    def _fits(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.most is None or bool(self.why) or value <= self.most)
        )


@dataclass(frozen=True)
class Setting:
    """The declaration of a field beyond its type and its default."""

    help: str  # what the value means, in words that follow "name:"; without the default
    range: Range = Range()  # of a number
    choices: tuple[str, ...] = ()  # of a text
    absent: str = ""  # what None comes to, in words; empty: there is none of it
    group: str = ""  # the heading of its option; empty: it has no option
    flag: str = ""  # the option; empty: --name, or for n_bits --n-bits
    other: tuple[str, str] | None = None  # (option, help) of the opposite: of None for what may be None, else of False
    adjustable: bool = False  # a resumed run may change it
    expected: str = ""  # what it must be, in words, where the class checks it by itself: no range or choices say it


class Declared(NamedTuple):
    """A field with what it declares: its type (another than bool, int, float or str where the class checks it itself),
    whether it may be None, its default (dataclasses.MISSING if a factory makes it), and all else.
    """

    name: str
    type: Any
    optional: bool
    default: Any
    rule: Setting

    @property
    def flag(self) -> str:
        """The option, "" if it has none."""
        return "" if not self.rule.group else self.rule.flag or f"--{self.name.replace('_', '-')}"

    def expected(self) -> str:
        """Say in words what the value must be."""
        if self.rule.expected:
            return self.rule.expected
        if self.type is bool:
            words = "true or false"
        elif self.rule.choices:
            words = f"one of {self.rule.choices}"
        elif self.type is str:
            words = "a name"
        else:
            words = self.rule.range.words(self.type is int)
        return f"{words}{self._or_none}"

    @property
    def _or_none(self) -> str:
        return ", or none" if self.optional else ""

    def check(self, value: Any) -> None:
        """Refuse a value that is not in the range."""
        if self.rule.expected or (self.optional and value is None):
            return
        if self.type in (int, float):
            self.rule.range.check(self.name, value, self.type is int, self._or_none)
        elif self.type is bool:
            expect(type(value) is bool, self.name, self.expected(), repr(value))
        else:
            known = isinstance(value, str) and (value in self.rule.choices if self.rule.choices else value != "")
            expect(known, self.name, self.expected(), repr(value))


def setting(default: Any, help: str, **rule: Any) -> Any:
    """A field of a dataclass with its declaration; the keywords are those of Setting."""
    return dataclasses.field(default=default, metadata=declaration(help, **rule))


def declaration(help: str, **rule: Any) -> Mapping[str, Setting]:
    """The metadata of a field; the keywords are those of Setting."""
    return {_KEY: Setting(help, **rule)}


@functools.cache
def declared_of(cls: type) -> Mapping[str, Declared]:
    """The declarations of a dataclass, by name, in their order."""
    hints = typing.get_type_hints(cls)
    found = {}
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        own_types = [part for part in parts if part is not types.NoneType]
        own_type = own_types[0] if len(own_types) == 1 else typing.Union[tuple(own_types)]  # noqa: UP007 - of a list
        found[item.name] = Declared(item.name, own_type, len(own_types) < len(parts), item.default, item.metadata[_KEY])
    return types.MappingProxyType(found)


def check_setting(cls: type, name: str, value: object) -> None:
    """Refuse a value that a field of a class does not declare, where it is an argument of something else."""
    declared_of(cls)[name].check(value)


def check_settings(config: Any) -> None:
    """Refuse a value that its field does not declare, by a message that names both; for ``__post_init__``."""
    for name, declared in declared_of(config.__class__).items():
        declared.check(getattr(config, name))


def settings(cls: Class) -> Class:
    """A class decorator: the docstring gets the list of the fields and what they mean."""
    lines = []
    for name, declared in declared_of(typing.cast(Any, cls)).items():
        absent = f" (None: {declared.rule.absent or 'none'})" if declared.optional else ""
        text = f"{name}: {declared.rule.help}{absent}."
        lines += textwrap.wrap(text, 112, initial_indent=" " * 4, subsequent_indent=" " * 8)
    about, raises, rest = inspect.cleandoc(cls.__doc__ or "").partition("\n\nRaises:")
    cls.__doc__ = "\n".join([f"{about}\n\nArgs:", *lines]) + raises + rest
    return cls


def value_text(value: Any) -> str:
    """A default for people: "on", "none", "0.001", "0 1 2"."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(value_text, value))
    return str(value)
