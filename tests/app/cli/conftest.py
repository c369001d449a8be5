"""One small trained run that all tests of the commands look at, and a copy of it for those that change something."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pyglow_fast.app.cli import main


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Options of the smallest model there is, and of a run that does not look at much."""
    model = ["--n-levels", "1", "--n-steps", "2", "--hidden", "4"]
    return [*model, "--device", "cpu", "--eval-images", "32", "--sample-count", "4"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """A class-conditional run on the digits, 20 steps long. Not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    command = ["train", "digits", "--out", str(out), "--quiet", "--max-steps", "20", "--class-conditional", *tiny]
    command += ["--scale-map", "sigmoid"]  # as the formats have it that ``convert`` writes
    assert main(command) == 0
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(trained, tmp_path / "run"))
