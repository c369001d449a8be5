"""`bench srflow`: every way to train the same model gives the same loss and gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import srflow

SIZES = {"side": 16, "n-steps": 2, "n-levels": 2, "batch": 2, "hidden": 6, "features": 3, "rounds": 1}
SMALL = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("more", [[], ["--encoder"]])
def test_every_row_is_of_the_same_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    path = tmp_path / "rows.json"
    assert srflow.main([*SMALL, *more, "--out", str(path)]) == 0
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    names = [row["name"] for row in rows]
    assert names == [line[:26].strip() for line in capsys.readouterr().out.splitlines()[1:]]
    assert len(names) == 7
    for row in rows:
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5)
        assert row["gradient"] == pytest.approx(rows[0]["gradient"], rel=1e-4)
        assert row["memory"] > row["gradients"] > 0
        assert row["seconds"] > 0
