"""The page of a run by command, at the end of the run and while it trains."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from support.commands import Command
from support.html_page import Page

from pyglow_fast.cli import main


def test_at_the_end(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    out = tmp_path / "page.html"
    assert main(["report", str(trained), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_bytes() == (trained / "report.html").read_bytes()
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_while_it_trains(tiny: list[str], tmp_path: Path) -> None:
    options = ["--max-steps", "1000000", "--log-every", "1", "--eval-every", "3", "--save-every", "2", "--keep", "1"]
    words = ["-m", "pyglow_fast", "train", "digits", "--out", str(tmp_path / "r"), "--quiet", *tiny, *options]
    process = Command([*words, "--sample-every", "5"], tmp_path)
    steps, out = [], tmp_path / "page.html"
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until and len(steps) < 20:
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
    assert steps[-1] > 0
    assert main(["report", str(tmp_path / "r"), "--out", str(out)]) == 0  # of a run that was killed


def test_a_report_that_is_damaged_is_no_error(run: Path, tmp_path: Path) -> None:
    (run / "report.json").write_text("{")
    assert main(["report", str(run), "--out", str(tmp_path / "x.html")]) == 0
    found = Page((tmp_path / "x.html").read_text(encoding="utf-8"))
    assert found.words["p"] == ["report.json cannot be read and is left out"]


@pytest.mark.parametrize(
    ("spoil", "out", "message"),
    [
        ("", "x.txt", "out: expected a name ending in .html, found 'x.txt'"),
        ("", "none/x.html", "out: expected a file in an existing folder, found 'none/x.html'"),
        ("", "run/report.html", "out: expected another file than those that a run keeps, found 'run/report.html'"),
        ("gone", "x.html", r"run: expected the folder of a run \(with config.toml\), found 'run' without one"),
        ("broken", "x.html", "run/config.toml: expected a configuration as TOML, found .*"),
        ("unknown", "x.html", "config: expected known keys, found speed"),
    ],
)
def test_refusals(
    run: Path,
    spoil: str,
    out: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(run.parent)
    if spoil == "gone":
        (run / "config.toml").unlink()
    elif spoil:
        (run / "config.toml").write_text("speed = 9\n" if spoil == "unknown" else "{ half")
    before = {path: path.stat().st_mtime_ns for path in run.parent.rglob("*")}
    assert main(["report", "run", "--out", out]) == 2
    assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)
    assert {path: path.stat().st_mtime_ns for path in run.parent.rglob("*")} == before
