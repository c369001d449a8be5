"""The tiny trained run, in the current folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.tiny_run import made


@pytest.fixture
def tiny(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny run and its images that a test may change, the current folder."""
    place = Path(shutil.copytree(made(tmp_path_factory), tmp_path / "place"))
    monkeypatch.chdir(place)
    return place
