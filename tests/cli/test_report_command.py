"""The page of a run by command, at the end of the run and while it trains."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from support.commands import Command
from support.html_page import Page

from pyglow_fast.cli import main


@pytest.mark.full
def test_while_it_trains(tiny: list[str], tmp_path: Path) -> None:
    options = ["--max-steps", "1000000", "--log-every", "1", "--eval-every", "3", "--save-every", "2", "--keep", "1"]
    words = ["-m", "pyglow_fast", "train", "digits", "--out", str(tmp_path / "r"), "--quiet", *tiny, *options]
    process = Command([*words, "--sample-every", "5"], tmp_path)
    steps, out = [], tmp_path / "page.html"
    try:
        until = time.monotonic() + 600
        while time.monotonic() < until and len(set(steps)) < 5:
            if (tmp_path / "r" / "config.toml").is_file():
                assert main(["report", str(tmp_path / "r"), "--out", str(out)]) == 0
                page = Page(out.read_text(encoding="utf-8"))
                found = re.fullmatch(r"at step (\d+) of 1000000", page.words["td"][1])
                assert found is not None, page.words["td"]
                steps.append(int(found.group(1)))
                assert "p" not in page.words
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    assert steps == sorted(steps)
    assert len(set(steps)) >= 5
    assert main(["report", str(tmp_path / "r"), "--out", str(out)]) == 0  # of a run that was killed


def test_a_report_that_is_damaged_is_no_error(run: Path, tmp_path: Path) -> None:
    (run / "report.json").write_text("{")
    assert main(["report", str(run), "--out", str(tmp_path / "x.html")]) == 0
    found = Page((tmp_path / "x.html").read_text(encoding="utf-8"))
    assert found.words["p"] == ["report.json cannot be read and is left out"]
