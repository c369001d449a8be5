"""What the ops of pyglow::cuda launch: how many kernels, how many blocks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.emulator import EmulatedOps, Launch

from bench.cases import SHAPES
from pyglow_fast import ops
from pyglow_fast.reference import CouplingSpec

pytestmark = pytest.mark.full
MULTIPROCESSORS = 132  # of an H100
# Second stages: what they read is a few numbers for each block of the first.
SECOND_STAGES = {"sample_sums_kernel", "finish_kernel", "reduce_kernel"}
FORWARD = ops.coupling_arguments(CouplingSpec(), inverse=False)
BACKWARD = (*FORWARD[:2], *FORWARD[3:])


def launches_of_ops(emulator: EmulatedOps, shape: tuple[int, ...]) -> dict[str, list[Launch]]:
    """What each op launches by its name, float32 and contiguous, for a state (N, C, H, W); nothing runs."""
    n, c, p = shape[0], shape[1], math.prod(shape[2:])
    x = torch.empty(n, c, p)
    images = torch.empty(n, c // 4, *(2 * size for size in shape[2:]))
    matrix, offset, log_det = torch.empty(c, c), torch.empty(c), torch.empty(n)
    index = torch.arange(c)
    calls = {
        "channel_mix": lambda: emulator.channel_mix(x, matrix, offset),
        "channel_mix of squeeze(x)": lambda: emulator.channel_mix(images, matrix, offset, False, 1),
        "channel_mix_backward": lambda: emulator.channel_mix_backward(x, x, matrix),
        "coupling": lambda: emulator.coupling(x, x, *FORWARD),
        "coupling_backward": lambda: emulator.coupling_backward(x, x, x, log_det, *FORWARD, True),
        "coupling_mix": lambda: emulator.coupling_mix(x, x, matrix, offset, *FORWARD),
        "coupling_mix_backward": lambda: emulator.coupling_mix_backward(x, x, x, log_det, matrix, *BACKWARD, None),
        "step_backward": lambda: emulator.step_backward(x, x, x, log_det, matrix, offset, *BACKWARD),
        "gather": lambda: emulator.coupling_mix(x, x, offset, offset, *FORWARD, index),
        "gather_backward": lambda: emulator.coupling_mix_backward(x, x, x, log_det, offset, *BACKWARD, None, index),
        "step_gather_backward": lambda: emulator.step_backward(x, x, x, log_det, offset, offset, *BACKWARD, index),
        "gaussian_log_prob": lambda: emulator.gaussian_log_prob(x, x, x),
        "gaussian_log_prob_backward": lambda: emulator.gaussian_log_prob_backward(x, x, x, log_det),
        "gaussian_sample": lambda: emulator.gaussian_sample(x, x, x),
    }
    launches = {}
    emulator.only_recorded = True
    for name, call in calls.items():
        call()
        launches[name] = emulator.launches()
    emulator.only_recorded = False
    return launches


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
