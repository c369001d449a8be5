"""Rows as the text of a CSV file, which no spreadsheet takes for a formula."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from pyglow_fast._errors import visible

Cell = str | float | int | None
# With these a spreadsheet begins a formula, in wide forms too. The last one marks a text.
_MARKED = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20", "'")


def csv_text(rows: Iterable[Sequence[Cell]], digits: int = 6) -> str:
    """The text of a CSV file with these rows, each ended by a newline.

    A text may come from elsewhere, and a spreadsheet would take some of it for a formula. One that begins with =, +,
    -, @ (or their wide forms) or an apostrophe has an apostrophe before it, as spreadsheets mark a text. Control
    characters in it, and bytes that are no UTF-8, are written out, as \\n or \\udcff.

    Args:
        rows: of cells: texts, ints, floats, and None for an empty cell.
        digits: significant digits of floats; those that are not finite are ``nan``, ``inf`` and ``-inf``.
    """
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([_cell(value, digits) for value in row] for row in rows)
    return buffer.getvalue()


def _cell(value: Cell, digits: int) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return visible(f"'{value}" if value.startswith(_MARKED) else value)
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
