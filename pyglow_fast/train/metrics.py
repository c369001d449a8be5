"""The rows of metrics.csv, one for every step that is logged or evaluated: their columns, text and reading."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

from pyglow_fast._errors import visible
from pyglow_fast.train.csv_text import csv_text

COLUMNS = (
    "step",
    "epoch",
    "seconds",
    "lr",
    "train_bpd",  # mean over the steps since the last row, as they were trained on
    "grad_norm",
    "images_per_s",
    "memory_mb",
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


def rows_text(rows: Iterable[Row]) -> str:
    """Write rows as lines; names that are missing stay empty."""
    return csv_text([row.get(name) for name in COLUMNS] for row in rows)


def merged(known: Row, new: Row) -> Row:
    """Take two rows of one step for one: what is known stays, but for scores, which the new row may have of more."""
    scores = {name: value for name, value in new.items() if name.startswith(("held_out", "train_subset"))}
    return new | {name: value for name, value in (*known.items(), *scores.items()) if value is not None}


def read_metrics(path: Path) -> list[Row]:
    """Read the rows of metrics.csv; an empty cell is None.

    Damaged rows (a disk that was full, a crash, an editor) are left out, and a warning says how many.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return []
    # The rows are read by hand, as there are only numbers: for csv a stray quote would swallow all rows after it.
    header, *lines = text.split("\n")
    torn = lines.pop() if lines else ""  # what follows the last line end: nothing, unless the last row was cut off
    rows = [_row(header.split(","), line) for line in lines]
    bad = rows.count(None) + (torn != "")
    if bad:
        what = "1 row that cannot be read is" if bad == 1 else f"{bad} rows that cannot be read are"
        warnings.warn(visible(f"{path}: {what} left out"), stacklevel=2)
    return [row for row in rows if row is not None]


def _row(names: list[str], line: str) -> Row | None:
    """One line by the names in the header, or None if it is damaged."""
    try:
        cells = dict(zip(names, line.split(","), strict=True))
        row = {name: _number(cells[name]) for name in COLUMNS}
    except (ValueError, KeyError):
        return None
    return row if isinstance(row["step"], int) else None


def _number(text: str) -> float | int | None:
    if text == "":
        return None
    return int(text) if text.lstrip("-").isdecimal() else float(text)
