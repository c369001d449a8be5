"""Who computes the ops: the extension on each device that there is, and with ``--full`` the emulator for CUDA's."""

from __future__ import annotations

import pytest
import torch
from emulation import emulator
from emulation.emulator import EmulatedOps
from kernels.kernel_cases import Kernels

from pyglow_fast._core import backend
from pyglow_fast.functional import ops

HOMES = [
    "cpu",
    *([pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else []),
    pytest.param("emulated", marks=pytest.mark.full),
]


@pytest.fixture(params=HOMES)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """The ops, whoever computes them."""
    if request.param == "emulated":
        library = emulator.library(request.getfixturevalue("tmp_path_factory"))
        return Kernels(EmulatedOps(library))
    if backend.extension() is None:
        pytest.skip(f"no extension: {backend.reason()}")
    return Kernels(ops, request.param)
