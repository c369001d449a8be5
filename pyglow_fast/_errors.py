"""The one way bad input is refused: a ValueError that names the argument, what it must be and what it is."""

from __future__ import annotations

from typing import Any


def expect(condition: bool, argument: str, expected: str, found: Any) -> None:
    """Raise ``ValueError("argument: expected ..., found ...")`` unless ``condition`` holds.

    Args:
        condition: what must be true.
        argument: the name the caller knows the value by.
        expected: what it must be, in words.
        found: the offending value, shown with ``str``.
    """
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, found {found}")
