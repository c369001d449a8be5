"""Products of options, thinned out to covering arrays: every pair of values of two options is in some case.

A fault that shows at all shows, nearly always, for one value of one option or for a pair of them. A product of options
tries each pair many times over; :func:`pairs` keeps as few cases as it can while every pair stays.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pytest


class _Option(NamedTuple):
    """One stacked ``parametrize``: the arguments it sets, and for each value its label and what it sets them to."""

    names: list[str]
    values: list[tuple[str, tuple[Any, ...]]]


def _option(mark: pytest.MarkDecorator) -> _Option:
    names, values = mark.args
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    labelled = []
    for index, value in enumerate(values):
        parts = tuple(value) if len(names) > 1 else (value,)
        labelled.append((_label(names, parts, index, mark.kwargs.get("ids")), parts))
    return _Option(names, labelled)


def _label(
    names: list[str], parts: tuple[Any, ...], index: int, ids: Callable[[Any], str] | Iterable[str] | None
) -> str:
    """What pytest would call the value."""
    if ids is not None and not callable(ids):
        return list(ids)[index]
    if ids is not None:
        return "-".join(str(ids(part)) for part in parts)
    plain = (str, int, float, bool, type(None))
    return "-".join(
        str(part) if isinstance(part, plain) else getattr(part, "__name__", f"{name}{index}")
        for name, part in zip(names, parts, strict=True)
    )


def covering_array(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Rows of indices below ``sizes`` in which every pair of indices of two columns occurs; the same rows every time.

    Greedy: a row starts from the first pair that is still missing, and each other column takes the index with which the
    row brings most missing pairs, the least used one among equals.
    """
    if not all(sizes):
        return []
    if len(sizes) < 2:
        return [(index,) for index in range(sizes[0])] if sizes else [()]
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
    options = [_option(mark) for mark in marks]
    cases = []
    for row in covering_array([len(option.values) for option in options]):
        chosen = [option.values[index] for option, index in zip(options, row, strict=True)]
        # Stacked marks are named from the last to the first.
        label = "-".join(label for label, _ in reversed(chosen))
        cases.append(pytest.param(*[part for _, parts in chosen for part in parts], id=label))
    return pytest.mark.parametrize([name for option in options for name in option.names], cases)
