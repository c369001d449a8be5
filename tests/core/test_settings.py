"""Settings declared at their fields: ranges in words, what is refused, and the page that lists them."""

from __future__ import annotations

import dataclasses
import math
from decimal import Decimal
from typing import Any

import pytest

from docs._site import settings_page
from pyglow_fast import GlowConfig, presets
from pyglow_fast._settings import (
    Range,
    check_setting,
    check_settings,
    declared_of,
    setting,
    settings,
    value_text,
)
from pyglow_fast.data import DataConfig
from pyglow_fast.train import TrainConfig

CONFIGS = (DataConfig, GlowConfig, TrainConfig)


@settings
@dataclasses.dataclass(frozen=True)
class Oven:
    """An oven.

    Raises:
        ValueError: a value that it cannot have.
    """

    heat: float = setting(180.0, "degrees", range=Range(above=0, most=300, why="it melts"))
    shelf: int | None = setting(None, "the shelf", range=Range(least=1, most=4), absent="in the middle")
    fan: bool = setting(False, "with air around")
    mode: str = setting("bake", "how", choices=("bake", "grill"))
    name: str = setting("oven", "what it is called")
    tray: int = setting(1, "its tray", expected="a tray")

    def __post_init__(self) -> None:
        check_settings(self)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heat": 0}, "heat: expected a positive number, found 0"),
        ({"heat": math.nan}, "heat: expected a positive number, found nan"),
        ({"heat": math.inf}, "heat: expected a positive number, found inf"),
        ({"heat": "hot"}, "heat: expected a positive number, found 'hot'"),
        ({"heat": True}, "heat: expected a positive number, found True"),
        ({"heat": None}, "heat: expected a positive number, found None"),
        ({"heat": 301}, "heat: expected at most 300 (it melts), found 301"),
        ({"heat": 10**400}, f"heat: expected at most 300 (it melts), found {10**400}"),
        ({"shelf": 0}, "shelf: expected a whole number in 1..4, or none, found 0"),
        ({"shelf": 5}, "shelf: expected a whole number in 1..4, or none, found 5"),
        ({"shelf": 1.0}, "shelf: expected a whole number in 1..4, or none, found 1.0"),
        ({"shelf": Decimal(2)}, "shelf: expected a whole number in 1..4, or none, found Decimal('2')"),
        ({"fan": 1}, "fan: expected true or false, found 1"),
        ({"fan": "yes"}, "fan: expected true or false, found 'yes'"),
        ({"mode": "fry"}, "mode: expected one of ('bake', 'grill'), found 'fry'"),
        ({"mode": ["bake"]}, "mode: expected one of ('bake', 'grill'), found ['bake']"),
        ({"name": ""}, "name: expected a name, found ''"),
        ({"name": 3}, "name: expected a name, found 3"),
    ],
)
def test_what_is_not_declared_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Oven(**values)
    assert str(caught.value) == message


def test_what_is_declared_passes() -> None:
    Oven(heat=300, shelf=4, fan=True, mode="grill", tray="its own check")  # type: ignore[arg-type]
    check_setting(Oven, "shelf", None)
    with pytest.raises(ValueError, match=r"^shelf: expected a whole number in 1\.\.4, or none, found 9$"):
        check_setting(Oven, "shelf", 9)


def test_the_docstring_lists_the_fields() -> None:
    assert (Oven.__doc__ or "").splitlines()[:5] == [
        "An oven.",
        "",
        "Args:",
        "    heat: degrees.",
        "    shelf: the shelf (None: in the middle).",
    ]
    assert (Oven.__doc__ or "").endswith("Raises:\n    ValueError: a value that it cannot have.")


@pytest.mark.parametrize(
    ("numbers", "whole", "words"),
    [
        (Range(), False, "a finite number"),
        (Range(), True, "a whole number"),
        (Range(least=0), True, "a whole number, 0 or more"),
        (Range(least=2), True, "a whole number, 2 or more"),
        (Range(least=1), True, "a positive whole number"),
        (Range(above=0), False, "a positive number"),
        (Range(above=0, most=80.0), False, "a positive number, at most 80"),
        (Range(above=0, below=1), False, "a number between 0 and 1"),
        (Range(least=0, below=1), False, "a number from 0 to below 1"),
        (Range(least=1 / 1e30, most=1e30), False, "a number from 1e-30 to 1e+30"),
        (Range(least=1, most=8), True, "a whole number in 1..8"),
        (Range(least=1, most=8, why="so"), True, "a positive whole number"),
    ],
)
def test_ranges_in_words(numbers: Range, whole: bool, words: str) -> None:
    assert numbers.words(whole) == words


def test_a_bound_without_a_least_number_is_of_the_magnitude() -> None:
    held = Range(most=10, why="it is held")
    held.check("x", -10)
    with pytest.raises(ValueError, match=r"^x: expected at most 10 \(it is held\), found -11$"):
        held.check("x", -11)


def test_whole_numbers_have_64_bits() -> None:
    Range(least=0).check("x", 2**63 - 1, whole=True)
    with pytest.raises(ValueError, match=r"^x: expected at most 9223372036854775807 \(64 bits hold no more\), found"):
        Range(least=0).check("x", 2**63, whole=True)


def test_every_default_is_in_its_range_and_names_are_unique() -> None:
    names = [name for cls in CONFIGS for name in declared_of(cls)]
    assert len(names) == len(set(names))
    for cls in CONFIGS:
        for item in declared_of(cls).values():
            if item.default is not dataclasses.MISSING:
                item.check(item.default)


def test_presets_are_of_settings_in_their_ranges() -> None:
    known = {name: item for cls in CONFIGS for name, item in declared_of(cls).items()}
    for preset in {**presets.PRESETS, **presets.CONDITIONAL}.values():
        for name, value in preset.settings.items():
            known[name].check(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "on"), (False, "off"), (None, "none"), (0.1, "0.1"), (1e30, "1e+30"), ((0.0, 1), "0 1"), ("auto", "auto")],
)
def test_values_for_people(value: object, text: str) -> None:
    assert value_text(value) == text


def test_the_page_lists_what_the_fields_say() -> None:
    found = settings_page.PAGE.read_text(encoding="utf-8")
    assert found == settings_page.page(), "python docs/_site/settings_page.py --write puts it there"
