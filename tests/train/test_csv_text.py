"""The text of CSV files: cells of each type, read back by csv."""

from __future__ import annotations

import csv
import io
import math

import pytest

from pyglow_fast.train.csv_text import csv_text


def test_cells() -> None:
    rows = [("name", "n"), ('a "b", c', 1_000_000), (None, -1234.5678), ("", math.nan), ("=x", -math.inf), ("-1", -1)]
    text = csv_text(rows)
    assert text == 'name,n\n"a ""b"", c",1000000\n,-1234.57\n,nan\n\'=x,-inf\n\'-1,-1\n'
    assert list(csv.reader(io.StringIO(text)))[1] == ['a "b", c', "1000000"]


@pytest.mark.parametrize(("digits", "shown"), [(1, "-0.3"), (6, "-0.333333"), (9, "-0.333333333")])
def test_digits(digits: int, shown: str) -> None:
    """Of floats alone, and a number's sign is no formula."""
    assert csv_text([(-1 / 3, -12345)], digits) == f"{shown},-12345\n"


def test_a_line_end_within_a_text_is_written_out() -> None:
    assert csv_text([["a\nb\udcff", "@c"]]) == "a\\nb\\udcff,'@c\n"
