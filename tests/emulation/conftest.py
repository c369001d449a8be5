"""The emulated kernels, built once for all workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.emulator import Emulator
from support.machine import made_once
from support.toolchain import CUDA_SOURCES, EMULATION, build


@pytest.fixture(scope="session")
def _library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = [*CUDA_SOURCES, *sorted(EMULATION.glob("driver*.cpp"))]
    name = "libemulated.so"
    return made_once(tmp_path_factory, "emulated", lambda to: build(to / name, sources, "-O1", "-shared")) / name


@pytest.fixture
def multiprocessors() -> int:
    """Those that small grids are cut for; tests choose others by ``emulated_cases.cuts``."""
    return 132


@pytest.fixture
def emulator(_library: Path, multiprocessors: int) -> Emulator:
    emulator = Emulator(_library)
    emulator.multiprocessors = multiprocessors
    return emulator
