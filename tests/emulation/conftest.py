"""The emulated kernels, built once for the session."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.emulator import Emulator
from support.toolchain import CUDA_SOURCES, EMULATION, build


@pytest.fixture(scope="session")
def _library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("emulated") / "libemulated.so"
    return build(target, [*CUDA_SOURCES, *sorted(EMULATION.glob("driver*.cpp"))], "-O1", "-shared")


@pytest.fixture
def emulator(_library: Path) -> Emulator:
    return Emulator(_library)
