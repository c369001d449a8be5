"""The rows of metrics.csv, one for every step that is logged or evaluated; and rows as the text of any table."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from pyglow_fast._core.errors import visible

Cell = str | float | int | None
# With these a spreadsheet begins a formula, in wide forms too. The last one marks a text.
_MARKED = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20", "'")
COLUMNS = (
    "step",
    "epoch",
    "seconds",
    "lr",
    "train_bpd",  # mean over the steps since the last row, as they were trained on
    "grad_norm",
    "images_per_s",
    "held_out_bpd",  # these four only at evaluations
    "held_out_se",
    "train_subset_bpd",
    "train_subset_se",
    "skipped_steps",  # steps left out so far, as loss or gradient were not finite
    "unreadable_images",  # how many so far
    "train_class_bits",  # bits that a label costs by the classifier on the top latent, as train_bpd; then held out
    "held_out_class_bits",
    "held_out_accuracy",  # share of the images whose likeliest class is right
)
Row = dict[str, float | int | None]


def read_metrics(path: Path) -> list[Row]:
    """Read the rows of metrics.csv; damaged ones (a full disk, a crash, an editor) are left out, with a warning."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return []
    # The rows are read by hand, as there are only numbers: for csv a stray quote would swallow all rows after it.
    header, *lines = text.split("\n")
    names, rows = header.split(","), list[Row]()
    for line in lines[:-1]:
        with suppress(ValueError, KeyError):
            cells = dict(zip(names, line.split(","), strict=True))
            rows.append({name: _number(cells[name]) for name in COLUMNS} | {"step": int(cells["step"])})
    # What follows the last line end is nothing, unless the last row was cut off.
    if bad := len(lines[:-1]) - len(rows) + any(lines[-1:]):
        what = "1 row that cannot be read is" if bad == 1 else f"{bad} rows that cannot be read are"
        warnings.warn(visible(f"{path}: {what} left out"), stacklevel=2)
    return rows


def _number(text: str) -> float | int | None:
    return None if text == "" else int(text) if text.lstrip("-").isdecimal() else float(text)


def csv_text(rows: Iterable[Sequence[Cell]], digits: int = 6) -> str:
    """Write rows as CSV lines: floats with so many digits, nan, inf and -inf; None as an empty cell.

    An apostrophe stands before a text that a spreadsheet would take for a formula; control characters are written out.
    """
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([_cell(value, digits) for value in row] for row in rows)
    return buffer.getvalue()


def markdown_text(rows: Sequence[Sequence[str]]) -> str:
    """Write rows, the titles first, as a Markdown table that can be read as it stands."""
    rows = [[visible(cell).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows]
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return "\n".join(lines)


def _cell(value: Cell, digits: int) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return visible(f"'{value}" if value.startswith(_MARKED) else value)
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
