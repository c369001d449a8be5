"""Settings declared at their fields: ranges in words, what is refused, and the page that lists them."""

from __future__ import annotations

import dataclasses
import math
from decimal import Decimal
from typing import Any

import pytest

from pyglow_fast import GlowConfig
from pyglow_fast._core.settings import (
    Range,
    check_setting,
    check_settings,
    declared_of,
    setting,
    settings,
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
    tilt: float = setting(0.0, "its slope", range=Range(most=10, why="it is held"))
    turns: int = setting(0, "of its clock", range=Range(least=0))

    def __post_init__(self) -> None:
        check_settings(self)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heat": math.nan}, "heat: expected a positive number, found nan"),
        ({"heat": True}, "heat: expected a positive number, found True"),
        ({"heat": 10**400}, f"heat: expected at most 300 (it melts), found {10**400}"),
        ({"shelf": 0}, "shelf: expected a whole number in 1..4, or none, found 0"),
        ({"shelf": Decimal(2)}, "shelf: expected a whole number in 1..4, or none, found Decimal('2')"),
        ({"fan": 1}, "fan: expected true or false, found 1"),
        ({"mode": ["bake"]}, "mode: expected one of ('bake', 'grill'), found ['bake']"),
        ({"name": ""}, "name: expected a name, found ''"),
        ({"tilt": -11}, "tilt: expected at most 10 (it is held), found -11"),  # a bound alone is of the magnitude
        ({"turns": 2**63}, f"turns: expected at most {2**63 - 1} (64 bits hold no more), found {2**63}"),
    ],
)
def test_what_is_not_declared_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Oven(**values)
    assert str(caught.value) == message


def test_what_is_declared_passes() -> None:
    Oven(300, 4, True, "grill", tray="its own check", tilt=-10, turns=2**63 - 1)  # type: ignore[arg-type]
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


def test_every_default_is_in_its_range_and_names_are_unique() -> None:
    names = [name for cls in CONFIGS for name in declared_of(cls)]
    assert len(names) == len(set(names))
    for cls in CONFIGS:
        for item in declared_of(cls).values():
            if item.default is not dataclasses.MISSING:
                item.check(item.default)
