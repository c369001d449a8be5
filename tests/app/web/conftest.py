"""Small runs that the page looks at."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support import machine, web


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``digits`` and ``colour``, for reading; the folder above is where commands about them run."""
    made = machine.made_once(tmp_path_factory, "web-runs", web.make_runs)
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(made / "runs", folder / "runs")  # what is measured is kept in the folder of a run
    return folder / "runs"
