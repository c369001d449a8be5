"""The picture of scored images: what stands beside their marks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from pyglow_fast import GlowConfig
from pyglow_fast.studio import FileScore, OpenRun, parse_image, scored
from pyglow_fast.train import TrainConfig, start


def test_many_marks_have_numbers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image has its name, some have number and name, of which there is no room for many."""
    config = TrainConfig(model=GlowConfig((1, 8, 8), n_levels=1, n_steps=1, hidden=4), max_steps=1)
    start(config, str(tmp_path / "run")).execute(quiet=True)
    opened = OpenRun.open(str(tmp_path / "run"), device="cpu")
    found: list[Mapping[str, float]] = []

    def noted(sets: object, title: str, marks: Mapping[str, float], text: Mapping[str, str]) -> bytes:
        found.append(marks)
        return b""

    monkeypatch.setattr(scored, "histogram_png", noted)
    score = FileScore(opened.pick(parse_image("7")), 2.0, 0.5)
    for count in (1, 2, scored.NAMED, scored.NAMED + 1):
        scored.made_picture(opened, [score] * count)
    one, two, some, many = map(list, found)
    assert (one, two) == (["held-out image 7"], ["1 held-out image 7", "2 held-out image 7"])
    assert some[-1] == f"{scored.NAMED} held-out image 7"
    assert many == [str(i + 1) for i in range(scored.NAMED + 1)]
