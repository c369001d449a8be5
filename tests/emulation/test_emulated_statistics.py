"""The CUDA kernels of the statistics, run on the CPU, against the reference: values, layouts, sizes, determinism."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.covering import pairs
from support.emulator import LAYOUTS, assert_only_written, laid_out
from support.helpers import assert_close, assert_kernel_close
from support.sparse_memory import SparseMemory
from support.statistics_emulator import StatisticsEmulator
from torch import Tensor

from pyglow_fast import reference

DTYPES = [torch.float32, torch.float64]
# (N, C, P): no multiple of a vector or a block unless said.
SHAPES = [
    (2, 2, 15),
    (3, 5, 24),  # whole vectors
    (1, 12, 160),  # whole vectors, several parts
    (2, 12, 143),
    (5, 17, 1),
    (7, 32, 2),
    (2, 200, 6),
    (3, 8, 4100),  # whole vectors, several splits and parts
    (40, 3, 333),
    (300, 1, 3),
    (1, 1, 1),
    (0, 6, 15),
    (2, 6, 0),
    (2, 0, 6),
]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture
def emulator(_library: Path) -> StatisticsEmulator:
    return StatisticsEmulator(_library)


def assert_moments(actual: tuple[Tensor, Tensor], x: Tensor, condition: float = 1.0, shift: float = 0.0) -> None:
    """As good as sums in the dtype of x - shift can be, against float64, relative to the size of each channel's."""
    for got, exact, taken_off in zip(actual, reference.channel_moments(x), (shift, 0.0), strict=True):
        assert_only_written(got)
        got, exact = got - taken_off, exact - taken_off
        size = exact.abs().clamp(min=1.0)
        assert_close(got / size, exact / size, condition, x.dtype)


@pairs(
    dtypes,
    shapes,
    pytest.mark.parametrize("shift", [0.0, 1000.0]),
)
def test_channel_moments(
    emulator: StatisticsEmulator, shape: tuple[int, int, int], shift: float, dtype: torch.dtype
) -> None:
    """A mean a thousand times the spread does not swallow it."""
    x = (torch.randn(shape, dtype=torch.float64) + shift).to(dtype)
    # In float64 it is the reference that loses mean / sd.
    assert_moments(emulator.channel_moments(x), x, 1.0 + shift if dtype == torch.float64 else 1.0, shift)


def test_moments_of_very_different_parts(emulator: StatisticsEmulator) -> None:
    """Samples far from each other, a constant channel, and a far outlier first: no pivot could serve them all."""
    x = torch.randn(6, 3, 2000) + 1e4 * torch.arange(6.0).view(6, 1, 1)
    x[:, 1] = 0.1
    x[0, 2, 0] = -1e6
    mean, m2 = emulator.channel_moments(x)
    assert_moments((mean, m2), x)
    assert abs(float(m2[1])) < 1e-12
    y = x.clone()
    y[3, 0, 7] = torch.nan
    mean, m2 = emulator.channel_moments(y)
    assert mean.isnan().tolist() == m2.isnan().tolist() == [True, False, False]


@pairs(
    dtypes,
    pytest.mark.parametrize("shape", [(2, 12, 24), (1, 8, 4160), (3, 7, 15), (4, 16, 1), (1, 140, 12)], ids=str),
    layouts,
)
def test_moments_layouts(
    emulator: StatisticsEmulator, shape: tuple[int, int, int], layout: str, dtype: torch.dtype
) -> None:
    x = torch.randn(shape, dtype=dtype) + 3.0
    assert_moments(emulator.channel_moments(laid_out(x, layout)), x)


def normal_case(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for _ in range(3)]


def assert_log_prob(actual: Tensor, values: list[Tensor]) -> None:
    assert_only_written(actual)
    exact = reference.gaussian_log_prob(*(v.double() for v in values))
    # The roundings of a sum of terms of about this size add up like a random walk.
    magnitude = math.sqrt(max(1, math.prod(values[0].shape[1:]))) * 10.0
    assert_kernel_close(actual, reference.gaussian_log_prob(*values), exact, magnitude)


def log_prob_gradients(values: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [v.detach().requires_grad_() for v in values]
    return torch.autograd.grad(reference.gaussian_log_prob(*leaves), leaves, grad)


def assert_gaussian(emulator: StatisticsEmulator, values: list[Tensor]) -> list[Tensor]:
    """All three ops on values as they lie in memory; returns what they gave."""
    grad = torch.randn(values[0].shape[0], dtype=values[0].dtype)
    log_prob = emulator.gaussian_log_prob(*values)
    assert_log_prob(log_prob, values)
    grads = emulator.gaussian_log_prob_backward(*values, grad)
    plain = log_prob_gradients(values, grad)
    exact = log_prob_gradients([v.double() for v in values], grad.double())
    for got, same_dtype, expected in zip(grads, plain, exact, strict=True):
        assert_only_written(got)
        assert_kernel_close(got, same_dtype, expected)
    z = emulator.gaussian_sample(*values)
    assert_only_written(z)
    exact_z = reference.gaussian_sample(*(v.double() for v in values))
    assert_kernel_close(z, reference.gaussian_sample(*values), exact_z)
    return [log_prob, *grads, z]


@dtypes
@shapes
def test_gaussian(emulator: StatisticsEmulator, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert_gaussian(emulator, normal_case(shape, dtype))


@pairs(
    dtypes,
    pytest.mark.parametrize("shape", [(2, 12, 24), (3, 7, 15), (4, 16, 1), (2, 6, 1300)], ids=str),
    pytest.mark.parametrize("z_layout", ["contiguous", "channels_last"]),
    pytest.mark.parametrize("given", ["scalar", "channel", "sample", "sample_channel", "position"]),
)
def test_strides_of_zero(
    emulator: StatisticsEmulator, shape: tuple[int, int, int], z_layout: str, given: str, dtype: torch.dtype
) -> None:
    """One mean and log_sd for all, or along some dimensions, expanded and never written out."""
    n, c, p = shape
    sizes = {
        "scalar": (1, 1, 1),
        "channel": (1, c, 1),
        "sample": (n, 1, 1),
        "sample_channel": (n, c, 1),
        "position": (1, 1, p),
    }
    mean, log_sd = (torch.randn(sizes[given], dtype=dtype).expand(shape) for _ in range(2))
    emulator.out_layout = z_layout
    assert_gaussian(emulator, [laid_out(torch.randn(shape, dtype=dtype), z_layout), mean, log_sd])


@pairs(
    dtypes,
    pytest.mark.parametrize("shape", [(2, 12, 24), (1, 8, 160), (3, 7, 15), (4, 16, 1)], ids=str),
    layouts,
    pytest.mark.parametrize("others", ["contiguous", "same"]),
)
def test_gaussian_layouts(
    emulator: StatisticsEmulator, shape: tuple[int, int, int], layout: str, others: str, dtype: torch.dtype
) -> None:
    z, mean, log_sd = normal_case(shape, dtype)
    other_layout = layout if others == "same" else others
    values = [laid_out(z, layout), laid_out(mean, other_layout), laid_out(log_sd, other_layout)]
    emulator.out_layout = other_layout
    assert_gaussian(emulator, values)


@dtypes
def test_extreme_scales(emulator: StatisticsEmulator, dtype: torch.dtype) -> None:
    """A tiny sd makes a far value as unlikely as the reference says; none becomes NaN where the reference is not."""
    log_sd = torch.linspace(-40.0, 80.0, 60, dtype=dtype).view(1, 3, 20)
    z = torch.linspace(-3.0, 3.0, 60, dtype=dtype).view(1, 3, 20) * log_sd.exp()
    assert_gaussian(emulator, [z, torch.zeros_like(z), log_sd])


@dtypes
@pytest.mark.parametrize("shape", [(3, 12, 700), (2, 7, 3333), (1, 3, 20_000)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_any_order_of_threads_gives_the_same_bits(
    emulator: StatisticsEmulator, shape: tuple[int, int, int], layout: str, dtype: torch.dtype
) -> None:
    values = [laid_out(v, layout) for v in normal_case(shape, dtype)]

    def run(seed: int) -> list[Tensor]:
        emulator.seed = seed
        grad = torch.linspace(1.0, 2.0, shape[0], dtype=dtype)
        return [
            *emulator.channel_moments(values[0]),
            emulator.gaussian_log_prob(*values),
            *emulator.gaussian_log_prob_backward(*values, grad),
            emulator.gaussian_sample(*values),
        ]

    first = run(0)
    for seed in (1, 2, 12345):
        for got, expected in zip(run(seed), first, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [(2600, 2, 1), (1, 1, 600_000), (2, 2600, 3)], ids=str)
def test_more_work_than_blocks(emulator: StatisticsEmulator, shape: tuple[int, int, int]) -> None:
    """Grids are limited, so blocks loop; the sums of many positions are split."""
    values = normal_case(shape, torch.float32)
    assert_gaussian(emulator, values)
    assert_moments(emulator.channel_moments(values[0]), values[0])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_channels(emulator: StatisticsEmulator, layout: str) -> None:
    """Partial moments are capped at 16 MB, as the driver checks."""
    x = laid_out(torch.randn(9, 90_000, 2), layout)
    assert_moments(emulator.channel_moments(x), x)


@pytest.mark.parametrize("dim", ["sample", "channel", "position"])
def test_offsets_beyond_32_bits(emulator: StatisticsEmulator, dim: str) -> None:
    """The elements lie more than 2^31 apart, of what is read and of what is written."""
    memory = SparseMemory(torch.float32)
    values, grad = normal_case((3, 4, 6), torch.float32), torch.randn(3)
    far = [memory.far(v, dim) for v in values]
    assert_moments(emulator.channel_moments(far[0]), values[0])
    assert_log_prob(emulator.gaussian_log_prob(*far), values)
    expected = [*emulator.gaussian_log_prob_backward(*values, grad), emulator.gaussian_sample(*values)]
    emulator.room = lambda x: memory.far(torch.full_like(x, torch.nan), dim)
    actual = [*emulator.gaussian_log_prob_backward(*far, grad), emulator.gaussian_sample(*far)]
    for got, exact in zip(actual, expected, strict=True):
        assert torch.equal(got, exact)
