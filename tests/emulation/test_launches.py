"""What the ops of pyglow::cuda launch: how many kernels, how many blocks."""

from __future__ import annotations

import math

import pytest
import torch
from emulation.emulator import EmulatedOps
from kernels.kernel_cases import Case, Kernels, codes
from support.helpers import assert_equal

from bench.cases import SHAPES
from pyglow_fast.functional import ops
from pyglow_fast.reference import CouplingSpec

pytestmark = pytest.mark.full
MULTIPROCESSORS = 132  # of an H100
# Second stages: what they read is a few numbers for each block of the first.
SECOND_STAGES = {"sample_sums_kernel", "finish_kernel", "reduce_kernel"}
FORWARD, BACKWARD = codes(CouplingSpec(), inverse=False), codes(CouplingSpec())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_kernels_occupy_a_large_gpu(kernels: Kernels, shape: tuple[int, ...]) -> None:
    """More blocks than half of the multiprocessors, of two warps at least, or no thread has more than 16 bytes.

    Where more than half have a block, cutting each in two would leave one multiprocessor with both.
    """
    kernels.home.only_recorded = True
    case = Case(kernels, shape, torch.float32, CouplingSpec())
    images = torch.empty(shape[0], shape[1] // 4, *(2 * size for size in shape[2:]))
    squeezed = ("channel_mix", (images, *case.maps[0][:2], False, ops.SQUEEZE_CODES["input"]))
    for op, arguments in (*case.calls(), squeezed):
        kernels(op, *arguments)
        launches = [launch for launch in kernels.home.launches() if launch.kernel not in SECOND_STAGES]
        assert launches
        for launch in launches:
            spread = launch.blocks > MULTIPROCESSORS // 2 and launch.threads >= 64
            transformed = math.prod(shape) // (2 if launch.kernel.startswith("coupling") else 1)
            assert spread or launch.blocks * launch.threads * 4 >= transformed, f"{op}: {launch}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", [(16, 96, 64), (3, 140, 20), (5, 12, 33)], ids=lambda s: "x".join(map(str, s)))
def test_the_cut_does_not_change_the_bits(kernels: Kernels, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Products are added up in one order, however many blocks share the output channels; log_det is, in double,
    added up in another.
    """
    emulator: EmulatedOps = kernels.home
    x, matrix = torch.randn(shape, dtype=dtype), torch.randn(shape[1], shape[1], dtype=dtype) / shape[1] ** 0.5
    offset = torch.randn(shape[1], dtype=dtype)
    net_out, grad, grad_log_det = torch.randn_like(x), torch.randn_like(x), torch.randn(shape[0], dtype=dtype)
    results, grids = [], []
    for emulator.multiprocessors in (1, MULTIPROCESSORS):
        out, log_det = emulator.coupling_mix(x, net_out, matrix, offset, *FORWARD)
        grids.append(emulator.launches()[0].blocks)
        grads = emulator.coupling_mix_backward(x, net_out, grad, grad_log_det, matrix, *BACKWARD, None)
        step = emulator.step_backward(x, net_out, grad, grad_log_det, matrix, offset, *BACKWARD)
        results.append((emulator.channel_mix(x, matrix, offset, False, 0), out, *grads[:2], *step, log_det))
    assert grids[0] < grids[1]
    assert_equal(*(result[:-1] for result in results))
    size = shape[1] * shape[2] * torch.finfo(dtype).eps
    assert torch.allclose(results[0][-1], results[1][-1], rtol=0.0, atol=size)
