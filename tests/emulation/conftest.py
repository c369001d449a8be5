"""The emulated kernels, built once for all workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from emulation import emulator


@pytest.fixture(scope="session")
def _library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulator.library(tmp_path_factory)
