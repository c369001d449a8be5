"""Counts what a run has done, as checkpoints keep it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pyglow_fast._errors import expect

_COUNTS = ("step", "steps_summed", "stale", "skipped", "skipped_in_row", "unreadable")
_SUMS = ("seconds", "loss_sum", "class_sum")


@dataclass
class Progress:
    """The counters of a run, all plain numbers that JSON can hold.

    Args:
        step: steps done.
        seconds: spent so far, over all parts.
        loss_sum, steps_summed: sum and count of the running mean since the last row of metrics.csv, in bits/dim.
        class_sum: the sum, over the same steps, of the bits that the labels cost.
        best: lowest held-out bits/dim so far.
        stale: evaluations since then.
        skipped, skipped_in_row: how many steps were left out since loss or gradient were not finite, in all and just
            before now.
        unreadable: images that could not be read and had another one in their place.
    """

    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    steps_summed: int = 0
    best: float | None = None
    stale: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    unreadable: int = 0
    class_sum: float = 0.0

    @classmethod
    def of(cls, values: Mapping[str, Any], name: str) -> Progress:
        """Read the counters that a checkpoint saved as ``values``, which messages call ``name``.

        Raises:
            ValueError: one is missing or unknown, of another type, or no such number can have been reached.
        """
        known = set(asdict(cls()))
        expect(isinstance(values, Mapping), name, f"progress with {sorted(known)}", type(values).__name__)
        expect(set(values) == known, name, f"progress with {sorted(known)}", sorted(values))
        for key, value in values.items():
            expected = "a whole number, 0 or more" if key in _COUNTS else "a finite number"
            expect(_fits(key, value), name, f"progress.{key}: {expected}", repr(value))
        found = cls(**values)
        expect(found.seconds >= 0, name, "progress.seconds of 0 or more", found.seconds)
        expect(found.steps_summed <= found.step, name, f"at most {found.step} steps summed", found.steps_summed)
        expect(found.skipped <= found.step, name, f"at most {found.step} steps skipped", found.skipped)
        expect(found.skipped_in_row <= found.skipped, name, f"at most {found.skipped} in a row", found.skipped_in_row)
        return found


def _fits(key: str, value: Any) -> bool:
    if key in _COUNTS:
        return type(value) is int and 0 <= value < 2**63
    if value is None:
        return key not in _SUMS
    return abs(value) < 2**63 if type(value) is int else type(value) is float and math.isfinite(value)
