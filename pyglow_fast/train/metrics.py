"""metrics.csv: one row at every log or evaluation step, appended as the run goes."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

from pyglow_fast.train.files import write_text

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
)
Row = dict[str, float | int | None]


def _text(value: float | int | None) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


class MetricsLog:
    """Appends rows to a CSV file; a resumed run first drops the rows after its checkpoint, to write them again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, last_step: int | None = None) -> None:
        """Write the header (``last_step`` None), or keep the rows up to ``last_step``."""
        former = [] if last_step is None else read_metrics(self.path)
        rows = [row for row in former if last_step is not None and int(row["step"] or 0) <= last_step]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([_text(row[name]) for name in COLUMNS] for row in rows)
        write_text(self.path, buffer.getvalue())

    def add(self, row: Row) -> None:
        """Append one row; names that are missing stay empty."""
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerow([_text(row.get(name)) for name in COLUMNS])
        # One write of one whole line: a reader sees a row or none.
        with open(self.path, "ab", buffering=0) as file:
            file.write(buffer.getvalue().encode())


def read_metrics(path: Path) -> list[Row]:
    """The rows of metrics.csv; an empty cell is None, a line cut off by a crash is left out."""
    if not path.is_file() or not os.path.getsize(path):
        return []
    rows: list[Row] = []
    with open(path, newline="", encoding="utf-8") as file:
        for record in csv.DictReader(file):
            if None in record.values():
                continue
            rows.append({name: _number(record[name]) for name in COLUMNS})
    return rows


def _number(text: str) -> float | int | None:
    if text == "":
        return None
    return int(text) if text.lstrip("-").isdecimal() else float(text)
