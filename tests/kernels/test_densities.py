"""The normal distribution; and the halves of checkerboards, which are moves of values."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import pytest
import torch
from kernels.kernel_cases import Kernels, dtypes, laid_out, layouts, option, shapes
from support.covering import pairs
from support.helpers import assert_close
from torch import Tensor, float32, float64

from pyglow_fast import functional, reference

# Dimensions along which mean and log_sd are one number that is never written out, 2 for all of a position's: none, all,
# per channel, per sample, per sample and channel, per position.
REPEATS = [(), (0, 1, 2), (0, 2), (1, 2), (2,), (0, 1)]


@pairs(dtypes, shapes, layouts, option("other_layout", ["contiguous", "same"]), option("repeats", REPEATS))
def test_normal_distribution(
    kernels: Kernels,
    shape: tuple[int, ...],
    layout: str,
    other_layout: str,
    repeats: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    """The log density of a sample, its gradients, and samples."""
    other = layout if other_layout == "same" else other_layout
    z = kernels.randn(shape, dtype, layout)
    sizes = [1 if min(axis, 2) in repeats else size for axis, size in enumerate(shape)]
    mean, log_sd = (kernels.randn(sizes, dtype, other).expand(shape) for _ in range(2))
    # The exponential, the same for many terms, is off by 1.5 units and squared; difference, product, square and sum add
    # half a unit each, those in front of the square twice.
    kernels.check("gaussian_log_prob", z, mean, log_sd, roundings=8.0)
    weight = kernels.randn(shape[:1], dtype)
    weight = weight[:1].expand(shape[0]) if layout == "batch_innermost" and shape[0] else weight
    kernels.check("gaussian_log_prob_backward", z, mean, log_sd, weight)
    kernels.check("gaussian_sample", z, mean, log_sd)


@dtypes
def test_extreme_scales(kernels: Kernels, dtype: torch.dtype) -> None:
    """A tiny sd makes a far value as unlikely as the formula says."""
    log_sd = torch.linspace(-40.0, 80.0, 61, dtype=dtype).reshape(61, 1).to(kernels.device)
    noise = torch.linspace(-3.0, 3.0, 61, dtype=dtype).reshape(61, 1).to(kernels.device)
    z, mean = noise * log_sd.exp(), torch.zeros_like(log_sd)
    (sample,) = kernels("gaussian_sample", noise, mean, log_sd)
    relative = 256 * torch.finfo(dtype).eps  # exp loses the roundings of its exponent, 80
    assert bool(((sample - z).abs() <= relative * z.abs()).all())
    (log_prob,) = kernels("gaussian_log_prob", z, mean, log_sd)
    exact = -0.5 * noise.double().square() - log_sd.double() - 0.5 * math.log(2.0 * math.pi)
    assert_close(log_prob.double(), exact[:, 0], condition=4.0, dtype=dtype)
    grads = kernels("gaussian_log_prob_backward", z, mean, log_sd, torch.ones_like(log_sd[:, 0]))
    by_hand = (-noise.double() / log_sd.double().exp(), noise.double() / log_sd.double().exp())
    for found, expected in zip(grads, (*by_hand, noise.double().square() - 1.0), strict=True):
        floor = 4.0 * torch.finfo(dtype).eps if found is grads[2] else 0.0
        assert bool(((found.double() - expected).abs() <= relative * expected.abs() + 16 * floor).all())


def test_nan_comes_through(kernels: Kernels) -> None:
    z = torch.zeros(2, 3, 37, device=kernels.device)
    z[1, 2, 36] = math.nan
    zeros = torch.zeros_like(z)
    assert kernels("gaussian_log_prob", z, zeros, zeros)[0].isnan().tolist() == [False, True]
    assert kernels("gaussian_sample", z, zeros, zeros)[0].isnan().nonzero().tolist() == [[1, 2, 36]]


# ---- Checkerboards ----

BOARDS = [(2, 3, 4, 6), (1, 2, 2, 5), (3, 1, 6, 1), (2, 2, 8), (2, 2, 4, 3, 5), (1, 1, 2, 1, 4)]
BOARDS += [(2, 1, 4, 37), (1, 2, 2, 3, 18)]  # rows of several vectors, and what is left of one
BOARDS += [(0, 2, 4, 3), (2, 3, 0, 3), (2, 3, 4, 0)]  # nothing at all


def by_index(x: Tensor, parity: int) -> Tensor:
    """The first half, position by position."""
    n, channels, rows, *rest = x.shape
    half = x.new_empty(n, channels, rows // 2, *rest)
    for index in product(*(range(size) for size in half.shape[2:])):
        row = 2 * index[0]
        row += (row + sum(index[1:])) % 2 != parity
        half[:, :, *index] = x[:, :, row, *index[1:]]
    return half


def same_bits(one: Tensor, other: Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return one.shape == other.shape and torch.equal(one.contiguous().view(integer), other.contiguous().view(integer))


@pairs(
    option("board", BOARDS),
    option("dtype", [float32, float64, torch.bfloat16]),
    option("parity", [0, 1]),
    option("layout", ["contiguous", "channels_last", "strided", "channels_inside"]),
    option("home", [functional, reference]),
)
def test_checkerboards(
    board: tuple[int, ...], dtype: torch.dtype, parity: int, layout: str, home: object, device: torch.device
) -> None:
    """Every value goes to its place, and back, to the bit: also those that are not finite."""
    x = torch.randn(board).to(device, dtype)
    if x.numel() > 4:
        x.view(-1)[:3] = torch.tensor([math.nan, math.inf, -0.0])
    split, merge = home.checkerboard_split, home.checkerboard_merge  # type: ignore[attr-defined]
    first, second = by_index(x, parity), by_index(x, 1 - parity)
    halves = split(laid_out(x, layout), parity)
    assert same_bits(halves, torch.cat([first, second], dim=1))
    assert same_bits(split(laid_out(x, layout), parity, both=False), first)
    assert same_bits(merge(laid_out(halves, layout), parity), x)
    masked = merge(laid_out(first, layout), parity, both=False)
    assert same_bits(split(masked, parity), torch.cat([first, torch.zeros_like(second)], dim=1))


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("shape", [(2, 2, 4, 3), (1, 2, 6), (2, 2, 2, 3, 2)], ids=str)
def test_derivatives_of_checkerboards(shape: tuple[int, ...], both: bool, device: torch.device) -> None:
    """Of first and second order."""
    x = torch.randn(shape, dtype=float64, device=device, requires_grad=True)
    for function in (functional.checkerboard_split, functional.checkerboard_merge):
        move = partial(function, parity=1, both=both)
        assert torch.autograd.gradcheck(move, x, fast_mode=True)
        assert torch.autograd.gradgradcheck(move, x, fast_mode=True)
