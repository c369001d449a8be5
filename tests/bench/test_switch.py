"""The benchmark of accelerated models, on the smallest of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import switch
from bench.memory_models import Shape


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(switch.CONFIGS, "a", Shape((3, 16, 16), n_levels=2, n_steps=4, hidden=16, batch=8))


@pytest.mark.parametrize("library", switch.LIBRARIES)
def test_variants_are_measured(library: str) -> None:
    rows = switch.measure(library, "a", 2)
    assert [row.variant for row in rows] == list(switch.VARIANTS)
    assert rows[0].train_ratio == rows[0].memory_ratio == 1.0
    assert all(row.train_seconds > 0 and row.log_prob_seconds > 0 and row.activation_bytes > 0 for row in rows)
    by_name = {row.variant: row.activation_bytes for row in rows}
    assert by_name["reversible"] < by_name["store"]
    assert f"| {library} | reversible |" in switch.show(rows)


def test_a_part_is_written(tmp_path: Path) -> None:
    part = tmp_path / "rows.json"
    assert switch.main(["--libraries", "FrEIA", "--rounds", "2", "--part", str(part)]) == 0
    assert len(json.loads(part.read_text())) == len(switch.VARIANTS)


def test_another_loss_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switch, "accelerate", lambda model, memory: model[0].global_offset.data.add_(1.0))
    with pytest.raises(RuntimeError, match=r"FrEIA accelerated: a loss of .*, where FrEIA gives"):
        switch.variants("FrEIA", switch.CONFIGS["a"])


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        switch.main(["--libraries", "zuko"])
    assert "expected 2 rounds or more and libraries among" in capsys.readouterr().err
