"""The tables of measured figures in the pages are those of the rows in bench/results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.pages import page

from bench import page_tables
from bench.page_tables import Table


@pytest.mark.parametrize("make", page_tables.TABLES, ids=lambda make: make.__name__)
def test_the_page_has_the_table(make: Callable[[], Table]) -> None:
    table = make()
    text = page(table.page)
    assert table.rows
    assert page_tables.replaced(text, table) == text, "python -m bench.page_tables --write puts it there"


def test_a_table_takes_the_place_of_the_one_with_its_first_line() -> None:
    table = Table("x.md", ("", "ms"), [("a", 1.0), ("b", "")])
    assert table.text == "| | ms |\n|---|---|\n| a | 1.0 |\n| b | |"
    before, after = "# X\n\n| | s |\n|---|---|\n| a | 3 |\n\n", "\n\nmore\n"
    old = "| | ms |\n|---|---|\n| a | 2.0 |"
    assert page_tables.replaced(before + old + after, table) == before + table.text + after
    assert page_tables.replaced(before + old, table) == before + table.text  # at the end of a page


@pytest.mark.parametrize("text", ["| | s |\n|---|---|\n", "| | ms |\n\n| | ms |\n"])
def test_a_place_that_is_not_one_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"page: expected one table in x\.md that begins '\| \| ms \|', found [02]"):
        page_tables.replaced(text, Table("x.md", ("", "ms"), []))


@pytest.mark.parametrize(
    ("value", "written"), [(5.85, "5.8"), (19.94, "19.9"), (19.96, "20"), (99.94, "99.9"), (99.96, "100")]
)
def test_numbers(value: float, written: str) -> None:
    expected = page_tables.short(value) if value > 50 else page_tables.coarse(value)
    assert expected == written


def test_the_command_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.md").write_text("| | ms |\n| old |\n", encoding="utf-8")
    monkeypatch.setattr(page_tables, "ROOT", tmp_path)
    monkeypatch.setattr(page_tables, "TABLES", (lambda: Table("x.md", ("", "ms"), [("new", 1)]),))
    assert page_tables.main([]) == 0
    assert capsys.readouterr().out == "x.md\n\n| | ms |\n|---|---|\n| new | 1 |\n\n"
    assert page_tables.main(["--write"]) == 0
    assert (tmp_path / "x.md").read_text(encoding="utf-8") == "| | ms |\n|---|---|\n| new | 1 |\n"
