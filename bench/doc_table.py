"""A table of measured figures in a page of the documentation: how it is read out of bench/results, and written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.harness import ROOT

RESULTS = ROOT / "bench" / "results"


class Table(NamedTuple):
    """A page, and a table in Markdown whose first line no other table of the page has."""

    page: str
    text: str


def made(page: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Make the table of a page."""
    lines = ["".join(f"| {cell} " if cell != "" else "| " for cell in cells) + "|" for cells in (head, *rows)]
    return Table(page, "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]))


def is_there(name: str) -> bool:
    """Whether bench/results has a file."""
    return (RESULTS / name).is_file()


def read(name: str) -> dict[str, Any]:
    """Read a file of bench/results."""
    content: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return content


def short(value: float) -> str:
    """Write a number with one decimal below 100, with none from there on."""
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def coarse(value: float) -> str:
    """Write a number with one decimal below 20, with none from there on."""
    return f"{value:.1f}" if value < 19.95 else f"{value:.0f}"
