"""What the ops of pyglow::cuda launch: how many kernels, how many blocks."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest
import torch
from support.emulator import EmulatedOps, Launch
from support.launch_cases import BACKWARD, FORWARD, launches_of_ops

from bench.cases import SHAPES

pytestmark = pytest.mark.full
MULTIPROCESSORS = 132  # of an H100
# Second stages: what they read is a few numbers for each block of the first.
SECOND_STAGES = {"sample_sums_kernel", "finish_kernel", "reduce_kernel", "merge_kernel"}


@pytest.fixture
def emulator(_library: Path) -> EmulatedOps:
    return EmulatedOps(_library)


def test_launches_are_those_of_the_last_call(emulator: EmulatedOps) -> None:
    """Kernel, template arguments, grid, block and shared memory, also of kernels that have no symbol to link to."""
    x, matrix, offset = torch.randn(1, 12, 4), torch.eye(12), torch.zeros(12)
    emulator.channel_mix(x, matrix, offset)
    (mix,) = emulator.launches()
    assert (mix.kernel, mix.arguments.split(", ")[0], mix.blocks) == ("fused_kernel", "float", 1)
    assert mix.arguments.endswith(", true")
    assert mix.dynamic_bytes > 0
    emulator.coupling(x, torch.randn(1, 12, 4), *FORWARD)
    assert emulator.launches() == [
        Launch("coupling_kernel", "float, Kind<(ScaleMap)1, (Order)0, false>, true", 1, (32, 1), 0)
    ]


def test_launches_without_running(emulator: EmulatedOps) -> None:
    """Only recorded: the same launches, and no output is written."""
    x, net_out = torch.randn(3, 12, 700), torch.randn(3, 12, 700)
    emulator.coupling(x, net_out, *FORWARD)
    launches = emulator.launches()
    emulator.only_recorded = True
    y, log_det = emulator.coupling(x, net_out, *FORWARD)
    assert emulator.launches() == launches
    assert y.isnan().all()
    assert log_det.isnan().all()


def test_arguments_of_launches(emulator: EmulatedOps) -> None:
    """As a kernel finds them: a structure by value, then what follows at its own alignment."""
    x, log_sd = torch.randn(3, 12, 700), torch.randn(3, 12, 700)
    emulator.gaussian_log_prob(x, x, log_sd)
    first, second = (emulator.parameters(at) for at in range(2))
    assert struct.unpack_from("<4q", first) == (x.data_ptr(), 12 * 700, 700, 1)
    samples, parts, start = struct.unpack_from("<qqd", second, 8)
    assert (samples, parts) == (3, emulator.launches()[0].blocks // 3)
    assert start == pytest.approx(-0.5 * math.log(2 * math.pi) * 12 * 700)


def test_sums_per_sample_have_one_second_stage(emulator: EmulatedOps) -> None:
    """Whatever leaves a sum for each part of a sample has the same kernel add them, a block for each sample."""
    x, net_out = torch.randn(3, 12, 700), torch.randn(3, 12, 700)
    scale, index = torch.ones(12), torch.arange(12)
    for first, call in {
        "coupling_kernel": lambda: emulator.coupling(x, net_out, *FORWARD),
        "gather_kernel": lambda: emulator.coupling_mix(x, net_out, scale, scale, *FORWARD, index),
        "log_prob_kernel": lambda: emulator.gaussian_log_prob(x, x, x),
    }.items():
        call()
        stages = emulator.launches()
        assert [stage.kernel for stage in stages] == [first, "sample_sums_kernel"]
        assert stages[1].blocks == 3


def test_nothing_to_sum_is_one_launch(emulator: EmulatedOps) -> None:
    """Without positions the second stage alone sets log_det to zero."""
    x, matrix, offset = torch.empty(3, 4, 0), torch.eye(4), torch.zeros(4)
    _, log_det = emulator.coupling_mix(x, x, matrix, offset, *FORWARD)
    (launch,) = emulator.launches()
    assert (launch.kernel, launch.blocks) == ("sample_sums_kernel", 3)
    assert torch.equal(log_det, torch.zeros(3))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_kernels_occupy_a_large_gpu(emulator: EmulatedOps, shape: tuple[int, ...]) -> None:
    """More blocks than half of the multiprocessors, of two warps at least, or no thread has more than 16 bytes.

    Where more than half have a block, cutting each in two would leave one multiprocessor with both.
    """
    for op, launches in launches_of_ops(emulator, shape).items():
        for launch in launches:
            if launch.kernel in SECOND_STAGES:
                continue
            threads = math.prod(launch.threads)
            spread = launch.blocks > MULTIPROCESSORS // 2 and threads >= 64
            transformed = math.prod(shape) // (2 if launch.kernel.startswith("coupling") else 1)
            assert spread or launch.blocks * threads * 4 >= transformed, f"{op}: {launch}"


def test_small_products_are_split(emulator: EmulatedOps) -> None:
    """16 samples of 96 channels by 8 by 8: a block for each multiprocessor, where eight channels a thread give 16."""
    shape = (16, 96, 8, 8)
    for op, launches in launches_of_ops(emulator, shape).items():
        for launch in launches:
            if launch.kernel in ("fused_kernel", "sums_kernel"):
                assert launch.blocks >= MULTIPROCESSORS, op
                assert math.prod(launch.threads) >= 64, op
    emulator.multiprocessors = 1
    (wide,) = launches_of_ops(emulator, shape)["channel_mix"]
    assert (wide.blocks, wide.threads) == (16, (16, 12))


def test_products_that_occupy_most_multiprocessors_stay(emulator: EmulatedOps) -> None:
    """8 x 48 x 32 x 32 gives 128 blocks whose threads have eight output channels each."""
    (launch,) = launches_of_ops(emulator, (8, 48, 32, 32))["channel_mix"]
    assert (launch.blocks, launch.threads) == (128, (16, 6))
    assert launch.arguments.endswith(", 8, true")


def test_narrow_tiles_are_not_mostly_empty(emulator: EmulatedOps) -> None:
    """16 positions are one tile of four 16-byte columns, whose 96 output channels three blocks share."""
    (launch,) = launches_of_ops(emulator, (1, 96, 4, 4))["channel_mix"]
    assert (launch.blocks, launch.threads) == (3, (4, 16))


def test_one_split_of_the_sums_stays_one(emulator: EmulatedOps) -> None:
    """Where one split gives the gradient of the matrix, none is cut that would need a second stage."""
    launches = launches_of_ops(emulator, (2, 4, 8, 8))["channel_mix_backward"]
    assert [launch.kernel for launch in launches] == ["fused_kernel", "sums_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", [(16, 96, 64), (3, 140, 20), (5, 12, 33)], ids=lambda s: "x".join(map(str, s)))
def test_the_cut_does_not_change_the_bits(
    emulator: EmulatedOps, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Products are added up in one order, however many blocks share the output channels; log_det is, in double,
    added up in another.
    """
    x, matrix = torch.randn(shape, dtype=dtype), torch.randn(shape[1], shape[1], dtype=dtype) / shape[1] ** 0.5
    offset = torch.randn(shape[1], dtype=dtype)
    net_out, grad, grad_log_det = torch.randn_like(x), torch.randn_like(x), torch.randn(shape[0], dtype=dtype)
    results, grids = [], []
    for emulator.multiprocessors in (1, MULTIPROCESSORS):
        out, log_det = emulator.coupling_mix(x, net_out, matrix, offset, *FORWARD)
        grids.append(emulator.launches()[0].blocks)
        grads = emulator.coupling_mix_backward(x, net_out, grad, grad_log_det, matrix, *BACKWARD, None)
        step = emulator.step_backward(x, net_out, grad, grad_log_det, matrix, offset, *BACKWARD)
        results.append((emulator.channel_mix(x, matrix, offset), out, *grads[:2], *step, log_det))
    assert grids[0] < grids[1]
    for wide, narrow in zip(*(result[:-1] for result in results), strict=True):
        assert torch.equal(wide, narrow)
    size = shape[1] * shape[2] * torch.finfo(dtype).eps
    assert torch.allclose(results[0][-1], results[1][-1], rtol=0.0, atol=size)


def test_samples_within_tiles_need_no_second_stage(emulator: EmulatedOps) -> None:
    """Tiles of 64 positions that are a sample each leave no log_det to be added up between them."""
    emulator.multiprocessors = 1
    (launch,) = launches_of_ops(emulator, (16, 96, 8, 8))["coupling_mix"]
    assert launch.kernel == "fused_kernel"
    launches = launches_of_ops(emulator, (16, 96, 8, 9))["coupling_mix"]
    assert [launch.kernel for launch in launches] == ["fused_kernel", "finish_kernel"]
