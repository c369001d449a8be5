"""The ops that the emulator computes."""

from __future__ import annotations

import pytest
from emulation import emulator
from kernels.kernel_cases import Kernels


@pytest.fixture
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(emulator.EmulatedOps(emulator.library(tmp_path_factory)))
