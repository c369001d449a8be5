"""Small runs to look at."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.latent_runs import made


@pytest.fixture(scope="session")
def latent_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs. Not to be changed."""
    return made(tmp_path_factory)


@pytest.fixture
def emoji_run(latent_runs: Path, tmp_path: Path) -> Path:
    """A copy of the run on emoji, discs in three tones and squares, nothing of it kept yet."""
    whole = latent_runs / "emoji run"
    return Path(shutil.copytree(whole, tmp_path / "emoji run", ignore=shutil.ignore_patterns("cache")))


@pytest.fixture(scope="session")
def digits_run(latent_runs: Path) -> Path:
    """A class-conditional run on the digits."""
    return latent_runs / "digits"
