"""The benchmark of the page, on the smallest model; its browser part where there is a browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import page
from bench.memory_models import Shape


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "SHAPE", Shape((3, 8, 8), n_levels=2, n_steps=2, hidden=4, batch=1))


def test_edits_are_measured_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(page.BARS, page.FROZEN, 1e6)
    moved = page.Row("drag", page.SCREEN, 2.0, 1.0, 3.0, 1.0, None)
    monkeypatch.setattr(page, "drags", lambda run, count: moved)
    # Of fewer than four rounds the 20 % quantile is extrapolated, and may be below 0 where one round was slow.
    out = tmp_path / "not there yet"
    assert page.main(["--rounds", "4", "--out", str(out), "--run", str(tmp_path / "runs" / "one")]) == 0
    found = json.loads((out / "page-cpu.json").read_text())
    assert (found["run"], found["rows"].pop()["milliseconds"]) == ("one", 2.0)
    assert [row["way"] for row in found["rows"]] == [page.FROZEN, page.LOADED, page.PLAIN]
    assert all(0 < row["low"] <= row["milliseconds"] <= row["high"] for row in found["rows"])
    assert min(row["ratio"] for row in found["rows"]) == 1.0
    assert found["shape"]["n_steps"] == 2
    assert "| edit | plain torch |" in capsys.readouterr().out


def test_a_bar_that_is_not_held_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(page.BARS, page.FROZEN, 1e-6)
    assert page.main(["--rounds", "2", "--out", str(tmp_path)]) == 1
    assert "slower than the bar: frozen" in capsys.readouterr().err


def test_another_result_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = page.Levels.decode
    monkeypatch.setattr(page.Levels, "decode", lambda self, latents: decode(self, latents) + 0.01)
    with pytest.raises(RuntimeError, match=r"an edit that is off by 0\.0"):
        page.edits(2)


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        page.main(["--rounds", "1"])
    assert "expected 2 rounds and 2 drags or more" in capsys.readouterr().err
