"""Small runs to look at."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.latent_runs import train, write_emoji


@pytest.fixture(scope="session")
def emoji_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Discs in three tones, and squares."""
    root = tmp_path_factory.mktemp("images") / "emoji"
    write_emoji(root)
    return root


@pytest.fixture(scope="session")
def emoji_trained(emoji_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two levels on them. Not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "emoji"
    train(f"emoji:{emoji_images}", out, "--size", "16", "--n-levels", "2", "--max-steps", "8", "--save-every", "4")
    return out


@pytest.fixture
def emoji_run(emoji_trained: Path, tmp_path: Path) -> Path:
    """A copy of it, nothing of it kept yet."""
    return Path(shutil.copytree(emoji_trained, tmp_path / "emoji run", ignore=shutil.ignore_patterns("cache")))


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional run of two levels on the digits."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    train("digits", out, "--n-levels", "2", "--class-conditional")
    return out
