"""Declares the options of ``pyglow-fast train``: one for each field of its settings that has a group."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from pyglow_fast import presets
from pyglow_fast._settings import GROUPS, Declared, declared_of, value_text
from pyglow_fast.cli._common import number, whole
from pyglow_fast.data import DataConfig
from pyglow_fast.models import GlowConfig
from pyglow_fast.train import TrainConfig

_TYPES: dict[Any, tuple[Callable[[str], Any], str]] = {int: (whole, "N"), float: (number, "X")}
_DIGITS = presets.PRESETS["digits"].settings  # the preset of the images that come with the package


def options() -> Iterator[Declared]:
    """The settings that have an option, in the order of the groups."""
    found = [item for section in (DataConfig, GlowConfig, TrainConfig) for item in declared_of(section).values()]
    for group in GROUPS:
        yield from (item for item in found if item.rule.group == group)


def default_text(item: Declared) -> str:
    """What is taken where a setting is not given: "3; digits: 2", since the digits have a preset by themselves."""
    digits = _DIGITS.get(item.name, item.default)
    own = _words(item, item.default)
    return own if digits == item.default else f"{own}; digits: {_words(item, digits)}"


def _words(item: Declared, value: Any) -> str:
    return item.rule.absent if value is None and item.rule.absent else value_text(value)


def _or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Where a setting may be absent: "none" takes back what a file or a preset says."""
    return lambda text: None if text == "none" else parse(text)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options; one that is not given does not appear in the namespace."""
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    for item in options():
        _add(groups[item.rule.group], item)


def _add(group: argparse._ArgumentGroup, item: Declared) -> None:
    text = f"{item.rule.help} (default: {default_text(item)})".replace("%", "%%")
    given: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS}
    if item.type is bool and item.rule.other is None:
        group.add_argument(item.flag, action=argparse.BooleanOptionalAction, help=text, **given)
        return
    place: Any = group if item.rule.other is None else group.add_mutually_exclusive_group()
    if item.type is bool:
        place.add_argument(item.flag, action="store_true", help=text, **given)
    else:
        parse, metavar = _TYPES.get(item.type, (str, "NAME"))
        parse = _or_none(parse) if item.optional else parse
        place.add_argument(item.flag, type=parse, metavar=metavar, help=text, **given)
    if item.rule.other is not None:
        flag, words = item.rule.other
        place.add_argument(flag, action="store_const", const=False if item.type is bool else None, help=words, **given)
