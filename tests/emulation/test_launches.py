"""What the ops of pyglow::cuda launch: how many kernels, how many blocks."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest
import torch
from support.case_launches import AllKernels
from support.emulator import Emulator, Launch
from support.fused_emulator import FusedEmulator
from support.gather_emulator import Gather

from pyglow_fast.reference import CouplingSpec

SPEC = CouplingSpec()


@pytest.fixture
def emulator(_library: Path) -> AllKernels:
    return AllKernels(_library)


def test_launches_are_those_of_the_last_call(emulator: Emulator) -> None:
    """Kernel, template arguments, grid, block and shared memory, also of kernels that have no symbol to link to."""
    x, matrix, offset = torch.randn(1, 12, 4), torch.eye(12), torch.zeros(12)
    assert emulator.launches() == []
    emulator.channel_mix(x, matrix, offset)
    (mix,) = emulator.launches()
    assert (mix.kernel, mix.arguments.split(", ")[0], mix.blocks) == ("fused_kernel", "float", 1)
    assert mix.arguments.endswith(", true")
    assert mix.dynamic_bytes > 0
    emulator.coupling(x, torch.randn(1, 12, 4), SPEC)
    assert emulator.launches() == [
        Launch("coupling_kernel", "float, Kind<(ScaleMap)1, (Order)0, false>, true", 1, (32, 1), 0)
    ]


def test_launches_without_running(emulator: Emulator) -> None:
    """Only recorded: the same launches, and no output is written."""
    x, net_out = torch.randn(3, 12, 700), torch.randn(3, 12, 700)
    emulator.coupling(x, net_out, SPEC)
    launches = emulator.launches()
    emulator.only_recorded = True
    y, log_det = emulator.coupling(x, net_out, SPEC)
    assert emulator.launches() == launches
    assert y.isnan().all()
    assert log_det.isnan().all()


def test_arguments_of_launches(emulator: AllKernels) -> None:
    """As a kernel finds them: a structure by value, then what follows at its own alignment."""
    x, log_sd = torch.randn(3, 12, 700), torch.randn(3, 12, 700)
    emulator.gaussian_log_prob(x, x, log_sd)
    first, second = (emulator.parameters(at) for at in range(2))
    assert struct.unpack_from("<4q", first) == (x.data_ptr(), 12 * 700, 700, 1)
    samples, parts, start = struct.unpack_from("<qqd", second, 8)
    assert (samples, parts) == (3, emulator.launches()[0].blocks // 3)
    assert start == pytest.approx(-0.5 * math.log(2 * math.pi) * 12 * 700)


def test_sums_per_sample_have_one_second_stage(emulator: AllKernels) -> None:
    """Whatever leaves a sum for each part of a sample has the same kernel add them, a block for each sample."""
    x, net_out = torch.randn(3, 12, 700), torch.randn(3, 12, 700)
    gather = Gather(torch.ones(12), torch.arange(12))
    for first, call in {
        "coupling_kernel": lambda: emulator.coupling(x, net_out, SPEC),
        "gather_kernel": lambda: emulator.gather(x, gather, net_out),
        "log_prob_kernel": lambda: emulator.gaussian_log_prob(x, x, x),
    }.items():
        call()
        stages = emulator.launches()
        assert [stage.kernel for stage in stages] == [first, "sample_sums_kernel"]
        assert stages[1].blocks == 3


def test_nothing_to_sum_is_one_launch(emulator: FusedEmulator) -> None:
    """Without positions the second stage alone sets log_det to zero."""
    x, matrix, offset = torch.empty(3, 4, 0), torch.eye(4), torch.zeros(4)
    _, log_det = emulator.coupling_mix(x, x, matrix, offset, SPEC)
    (launch,) = emulator.launches()
    assert (launch.kernel, launch.blocks) == ("sample_sums_kernel", 3)
    assert torch.equal(log_det, torch.zeros(3))
