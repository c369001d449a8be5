"""Glow's own coupling net, which is a chain like those of test_net_chain_op.py: its cases, its leak, its folding."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from support.covering import pairs
from support.helpers import assert_close, assert_kernel_close
from support.kernel_cases import DTYPES, case_name
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast import _backend, functional, reference

pytestmark = pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")

# (N, C_in, H, W), hidden, C_out: H != W, planes shifted as a whole (up to 1024 pixels) and row by row, widths below,
# at and above a vector, one pixel, cuts of several samples and of some rows, a last cut that is smaller,
# two rows that are cut apart.
CASES = [
    ((2, 6, 8, 8), 16, 12),
    ((3, 2, 5, 7), 5, 3),
    ((1, 6, 40, 33), 8, 12),
    ((2, 2, 1, 1), 3, 4),
    ((5, 1, 1, 3), 4, 2),
    ((2, 3, 7, 1), 4, 2),
    ((40, 4, 4, 4), 600, 8),
    ((1, 1, 33, 40), 700, 2),
    ((3, 2, 32, 33), 300, 4),
    ((2, 2, 2, 300), 511, 3),
    ((0, 2, 4, 4), 4, 4),
]


def weights_for(shape: tuple[int, ...], hidden: int, out: int, dtype: torch.dtype) -> list[Tensor]:
    """x and weights that keep the variance, biases that are not zero."""
    channels = shape[1]
    sizes = [
        shape,
        (hidden, channels, 3, 3),
        (hidden,),
        (hidden + 1, hidden, 1, 1),
        (hidden + 1,),
        (out, hidden + 1, 3, 3),
        (out,),
    ]
    return [
        torch.randn(size).to(dtype) / math.sqrt(max(1, math.prod(size[1:]) if i else 1)) for i, size in enumerate(sizes)
    ]


def leaky(function: Callable[..., Tensor], leak: float) -> Callable[..., Tensor]:
    """With that leak; without one called as it always was."""
    return functools.partial(function, leak=leak) if leak else function


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [value.detach().to(dtype).requires_grad_() for value in inputs]
    out = function(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, leaves, grad)]


# Whether there is a log_gain, and the leak: none, the usual one, the largest.
OPTIONS = [(False, 0.0), (True, 0.0), (True, 0.1), (False, 1.0)]


@pairs(
    pytest.mark.parametrize(("gained", "leak"), OPTIONS),
    pytest.mark.parametrize("dtype", DTYPES, ids=case_name),
    pytest.mark.parametrize("case", CASES, ids=case_name),
)
def test_equals_the_convolutions(
    case: tuple[tuple[int, ...], int, int], dtype: torch.dtype, gained: bool, leak: float
) -> None:
    inputs = weights_for(*case, dtype)
    inputs += [0.3 * torch.randn(case[2], 1, 1).to(dtype)] if gained else []
    got = with_gradients(leaky(functional.coupling_net, leak), inputs, dtype)
    same = with_gradients(leaky(reference.coupling_net, leak), inputs, dtype)
    exact = with_gradients(leaky(reference.coupling_net, leak), inputs, torch.float64)
    for actual, in_torch, truth in zip(got, same, exact, strict=True):
        if dtype == torch.float64:
            assert_close(actual, truth, condition=10.0)  # sums over all pixels cancel
            continue
        # A hidden value within rounding of zero may fall on the other side of the relu.
        flips = 1e-4 * float(truth.detach().abs().max()) if truth.numel() else 0.0
        assert_kernel_close(actual, in_torch, truth, flips / torch.finfo(dtype).eps)
    with torch.no_grad():
        assert torch.equal(leaky(functional.coupling_net, leak)(*inputs), got[0])


def test_the_leak_is_written_out() -> None:
    """Against the formula, element by element: the reference itself could be wrong."""
    inputs = weights_for((2, 3, 5, 4), 8, 4, torch.float64)
    x, w1, b1, w2, b2, w3, b3 = inputs
    for leak in (0.0, 0.2, 1.0):
        hidden = torch.nn.functional.conv2d(x, w1, b1, padding=1)
        hidden = hidden.clamp(min=0) + leak * hidden.clamp(max=0)
        hidden = torch.nn.functional.conv2d(hidden, w2, b2)
        hidden = hidden.clamp(min=0) + leak * hidden.clamp(max=0)
        expected = torch.nn.functional.conv2d(hidden, w3, b3, padding=1)
        for function in (functional.coupling_net, reference.coupling_net):
            assert_close(function(*inputs, leak=leak), expected)


def test_hidden_values_of_zero_take_the_slope_below() -> None:
    """As torch's do: where a hidden value is zero, or leak times it underflows, the gradient is multiplied by leak."""
    inputs = weights_for((1, 2, 4, 4), 8, 4, torch.float32)
    for index in (1, 2, 4):
        inputs[index] = torch.zeros_like(inputs[index])
    inputs[2][4:], inputs[4][4:] = -1e-45, -1e-45  # the smallest there is
    got = with_gradients(leaky(functional.coupling_net, 0.25), inputs, torch.float32)
    expected = with_gradients(leaky(reference.coupling_net, 0.25), inputs, torch.float32)
    assert all(expected[index].abs().max() > 0 for index in (3, 5))  # of b1 and b2
    for actual, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def test_folded_net_is_the_net_layer_by_layer() -> None:
    """ActNorm after each hidden convolution, gain after the last: as one writes them down."""
    net = pgf.CouplingNet(2, 4, hidden=8, actnorm=True, cond_channels=3).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, cond = torch.randn(2, 2, 5, 4).double(), torch.randn(2, 3, 5, 4).double()
    hidden = net.norm1(net.conv1(torch.cat([x, cond], dim=1)))[0].relu()
    hidden = net.norm2(net.conv2(hidden))[0].relu()
    assert_close(net(x, cond), net.conv3(hidden) * (3.0 * net.log_gain).exp(), condition=10.0)


@pytest.mark.parametrize("leak", [-0.1, 1.5, math.nan, math.inf])
def test_bad_leak(leak: float) -> None:
    arguments = weights_for((2, 2, 4, 4), 8, 4, torch.float32)
    message = rf"leak: expected a slope from 0 to 1, found {leak}"
    for function in (functional.coupling_net, reference.coupling_net):
        with pytest.raises(ValueError, match=message):
            function(*arguments, leak=leak)
