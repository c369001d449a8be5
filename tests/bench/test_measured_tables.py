"""The tables of measured figures in the pages are those of the rows in bench/results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.pages import page

from bench import doc_table, measured_tables, memory_tables
from bench.doc_table import Table, coarse, made, short
from bench.memory_rows import DEPTH, Row


@pytest.mark.parametrize("make", measured_tables.TABLES, ids=lambda make: make.__name__)
def test_the_page_has_the_table(make: Callable[[], Table]) -> None:
    table = make()
    text = page(table.page)
    assert table.text.count("\n") > 2
    assert measured_tables.replaced(text, table) == text, "python -m bench.measured_tables --write puts it there"


def test_a_table_takes_the_place_of_the_one_with_its_first_line() -> None:
    table = made("x.md", ("", "ms"), [("a", 1.0), ("b", "")])
    assert table.text == "| | ms |\n|---|---|\n| a | 1.0 |\n| b | |"
    before, after = "# X\n\n| | s |\n|---|---|\n| a | 3 |\n\n", "\n\nmore\n"
    old = "| | ms |\n|---|---|\n| a | 2.0 |"
    assert measured_tables.replaced(before + old + after, table) == before + table.text + after
    assert measured_tables.replaced(before + old, table) == before + table.text  # at the end of a page


@pytest.mark.parametrize("text", ["| | s |\n|---|---|\n", "| | ms |\n\n| | ms |\n"])
def test_a_place_that_is_not_one_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"page: expected one table in x\.md that begins '\| \| ms \|', found [02]"):
        measured_tables.replaced(text, made("x.md", ("", "ms"), []))


def test_what_is_said_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later file's row takes the place of an earlier build's, whose own are marked; peers are the same in both."""
    monkeypatch.setattr(doc_table, "RESULTS", tmp_path)
    names = ("reversible", "plain", "FrEIA")
    rows = [dataclasses.asdict(Row("depth", name, DEPTH, counted=name == "FrEIA", tensor_bytes=5e6)) for name in names]
    (tmp_path / memory_tables.EARLIER).write_text(json.dumps({"rows": rows}), encoding="utf-8")
    (tmp_path / "memory-cpu.json").write_text(json.dumps({"rows": rows[:1]}), encoding="utf-8")
    found = memory_tables.memory_rows()
    assert [memory_tables.megabytes(found["depth", name, DEPTH]) for name in names] == [
        "5.0",
        "5.0 (earlier)",
        "5.0 (counted)",
    ]
    assert memory_tables.megabytes(None) == ""


@pytest.mark.parametrize(
    ("value", "written"), [(5.85, "5.8"), (19.94, "19.9"), (19.96, "20"), (99.94, "99.9"), (99.96, "100")]
)
def test_numbers(value: float, written: str) -> None:
    expected = short(value) if value > 50 else coarse(value)
    assert expected == written


def test_the_command_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.md").write_text("| | ms |\n| old |\n", encoding="utf-8")
    monkeypatch.setattr(measured_tables, "ROOT", tmp_path)
    monkeypatch.setattr(measured_tables, "tables", lambda: [made("x.md", ("", "ms"), [("new", 1)])])
    assert measured_tables.main([]) == 0
    assert capsys.readouterr().out == "x.md\n\n| | ms |\n|---|---|\n| new | 1 |\n\n"
    assert measured_tables.main(["--write"]) == 0
    assert (tmp_path / "x.md").read_text(encoding="utf-8") == "| | ms |\n|---|---|\n| new | 1 |\n"
