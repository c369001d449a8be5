"""Products of options, thinned out to covering arrays: every pair of values of two options is in some case.

A fault that shows at all shows, nearly always, for one value of one option or for a pair of them. A product of options
tries each pair many times over; :func:`pairs` keeps as few cases as it can while every pair stays.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def covering_array(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Rows of indices below ``sizes`` in which every pair of indices of two columns occurs; the same rows every time.

    Greedy: a row starts from the first pair that is still missing, and each other column takes the index with which the
    row brings most missing pairs, the least used one among equals.
    """
    if not all(sizes):
        return []
    columns = range(len(sizes))
    missing = {
        (a, i, b, j): None
        for a, b in itertools.combinations(columns, 2)
        for i, j in itertools.product(range(sizes[a]), range(sizes[b]))
    }
    used = [[0] * size for size in sizes]
    rows = []
    while missing:
        a, i, b, j = next(iter(missing))
        row: dict[int, int] = {a: i, b: j}
        for column in columns:
            if column in row:
                continue

            def gain(index: int, column: int = column, row: dict[int, int] = row) -> tuple[int, int]:
                found = sum(
                    ((other, at, column, index) if other < column else (column, index, other, at)) in missing
                    for other, at in row.items()
                )
                return found, -used[column][index]

            row[column] = max(range(sizes[column]), key=gain)
        for a, b in itertools.combinations(columns, 2):
            missing.pop((a, row[a], b, row[b]), None)
        for column in columns:
            used[column][row[column]] += 1
        rows.append(tuple(row[column] for column in columns))
    return sorted(rows)


def pairs(*marks: pytest.MarkDecorator) -> pytest.MarkDecorator:
    """One ``parametrize`` in place of the stacked ``marks``, over a covering array of their product.

    Args:
        marks: as they would stand above the test, each of one argument or of several that belong together.
    """
    names: list[str] = []
    options: list[list[tuple[str, tuple[Any, ...]]]] = []  # of each mark: its values, and what they are called
    for mark in marks:
        own, values = mark.args
        own = own.replace(" ", "").split(",") if isinstance(own, str) else list(own)
        listed = [tuple(value) if len(own) > 1 else (value,) for value in values]
        ids = mark.kwargs.get("ids", _label)
        labels = ids if isinstance(ids, list) else ["-".join(str(ids(part)) for part in parts) for parts in listed]
        options.append(list(zip(labels, listed, strict=True)))
        names += own
    cases = []
    for row in covering_array([len(option) for option in options]):
        chosen = [option[index] for option, index in zip(options, row, strict=True)]
        # Stacked marks are named from the last to the first.
        label = "-".join(label for label, _ in reversed(chosen))
        cases.append(pytest.param(*[part for _, parts in chosen for part in parts], id=label))
    return pytest.mark.parametrize(names, cases)


def _label(value: Any) -> str:
    plain = isinstance(value, str | int | float | None)
    return str(value if plain else getattr(value, "__name__", type(value).__name__))
