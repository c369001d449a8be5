"""The coupling net as matrix products, against the convolutions that it is."""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable

import pytest
import torch
from support.covering import pairs
from support.helpers import assert_close, assert_kernel_close, memory_layouts
from support.kernel_cases import DTYPES, assert_bits_do_not_depend_on_threads, case_name
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast import _backend, functional, ops, reference

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
        # A hidden value within rounding of zero may fall on the other side of the relu.
        flips = 0.0 if dtype == torch.float64 else 1e-4 * float(truth.detach().abs().max()) if truth.numel() else 0.0
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


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[7]], ids=case_name)
def test_layouts(case: tuple[tuple[int, ...], int, int]) -> None:
    inputs = weights_for(*case, torch.float64)
    expected = functional.coupling_net(*inputs)
    for name, layout in memory_layouts(inputs[0]).items():
        assert torch.equal(functional.coupling_net(layout, *inputs[1:]), expected), name
    turned = [value.to(memory_format=torch.channels_last) if value.dim() == 4 else value for value in inputs]
    last = functional.coupling_net(*turned)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, expected)
    half = torch.cat([turned[0], turned[0]], dim=1).to(memory_format=torch.channels_last)[:, : inputs[0].shape[1]]
    assert torch.equal(functional.coupling_net(half, *turned[1:]), expected)


@pytest.mark.parametrize("leak", [0.0, 0.3])
def test_gradcheck(leak: float) -> None:
    for case in (((2, 2, 3, 4), 3, 2), ((1, 1, 34, 33), 2, 1)):
        inputs = [value.requires_grad_() for value in weights_for(*case, torch.float64)]
        assert torch.autograd.gradcheck(leaky(functional.coupling_net, leak), tuple(inputs), fast_mode=True)


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


def test_second_derivatives_are_refused() -> None:
    for leak in (0.0, 0.1):
        inputs = [value.requires_grad_() for value in weights_for((1, 2, 3, 3), 4, 2, torch.float64)]
        out = leaky(functional.coupling_net, leak)(*inputs)
        (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            grad.sum().backward()
        assert torch.autograd.gradgradcheck(leaky(reference.coupling_net, leak), tuple(inputs), fast_mode=True)


def test_frozen_weights_and_input() -> None:
    inputs = weights_for((2, 2, 4, 4), 8, 4, torch.float64)
    x = inputs[0].clone().requires_grad_()
    expected = with_gradients(reference.coupling_net, inputs, torch.float64)
    grad = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    assert_close(torch.autograd.grad(functional.coupling_net(x, *inputs[1:]), x, grad)[0], expected[1])
    weights = [value.clone().requires_grad_() for value in inputs[1:]]
    for actual, exact in zip(
        torch.autograd.grad(functional.coupling_net(inputs[0], *weights), weights, grad), expected[2:], strict=True
    ):
        assert_close(actual, exact)


@pytest.mark.parametrize("leak", [0.0, 0.1])
def test_nan_and_inf_come_through(leak: float) -> None:
    inputs = weights_for((2, 2, 6, 6), 8, 4, torch.float32)
    net, plain = leaky(functional.coupling_net, leak), leaky(reference.coupling_net, leak)
    for value in (math.nan, math.inf):
        spoiled = inputs[0].clone()
        spoiled[1, 0, 2, 3] = value
        got, expected = (function(spoiled, *inputs[1:]) for function in (net, plain))
        assert torch.equal(got[0], net(*inputs)[0])
        assert not got[1].isfinite().all()
        assert torch.equal(got[1].isfinite(), expected[1].isfinite())


def test_two_threads_do_not_share_a_workspace() -> None:
    cases = [weights_for(*CASES[6], torch.float64), weights_for(*CASES[8], torch.float64)]
    expected = [functional.coupling_net(*inputs) for inputs in cases]
    results: list[list[Tensor]] = [[], []]

    def work(index: int) -> None:
        results[index] = [functional.coupling_net(*cases[index]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in (0, 1):
        assert all(torch.equal(result, expected[index]) for result in results[index])


@pytest.mark.alone
@pytest.mark.parametrize("case", [CASES[6], CASES[8]], ids=case_name)
def test_bits_do_not_depend_on_threads(case: tuple[tuple[int, ...], int, int]) -> None:
    """Several cuts, whose gradients of the weights are added up, and products of which each thread has a part."""
    x, *weights = weights_for(*case, torch.float32)
    assert_bits_do_not_depend_on_threads(
        lambda x: with_gradients(functional.coupling_net, [x, *weights], torch.float32), x, threads=2
    )


def test_autocast_leaves_it_to_the_library() -> None:
    inputs = weights_for((2, 2, 4, 4), 8, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.coupling_net(*inputs).dtype == torch.bfloat16
        half = functional.coupling_net(*inputs, leak=0.5)
        assert ops.coupling_net(*inputs, None, False)[0].dtype == torch.float32  # asked for by name: in its own dtype
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), functional.coupling_net(*inputs, leak=0.5), rtol=0.05, atol=0.05)
    assert (half.float() - functional.coupling_net(*inputs)).abs().max() > 0.1


def test_opcheck() -> None:
    inputs = weights_for((2, 2, 4, 5), 8, 4, torch.float32)
    h1, h2 = ops.coupling_net(*inputs, None, True)[1:]
    grad = torch.randn(2, 4, 4, 5)
    x, w1, _, w2, _, w3, _ = inputs
    layouts = (x, x.to(memory_format=torch.channels_last))
    for layout, gain in itertools.product(layouts, (None, torch.randn(4, 1, 1))):
        for rest in ((True,), (False,), (True, 0.1)):
            torch.library.opcheck(ops.coupling_net, (layout, *inputs[1:], gain, *rest))
            kept = (grad, layout, h1, h2, w1, w2, w3, inputs[6], gain, *rest)
            torch.library.opcheck(ops.coupling_net_backward, kept)


def test_compiled_and_exported() -> None:
    inputs = weights_for((2, 2, 4, 5), 8, 4, torch.float64)
    compiled = torch.compile(functional.coupling_net, fullgraph=True, backend="aot_eager")
    for leak in (0.0, 0.1):
        got = with_gradients(functools.partial(compiled, leak=leak), inputs, torch.float64)
        plain = with_gradients(leaky(reference.coupling_net, leak), inputs, torch.float64)
        for actual, expected in zip(got, plain, strict=True):
            assert_close(actual, expected, condition=10.0)

    class Net(torch.nn.Module):
        def forward(self, *values: Tensor) -> Tensor:
            return functional.coupling_net(*values, leak=0.1)

    with torch.no_grad():
        program = torch.export.export(Net(), tuple(inputs))
    assert "pyglow_fast.coupling_net" in str(program.graph)
    assert torch.equal(program.module()(*inputs), functional.coupling_net(*inputs, leak=0.1))


def test_folded_net_is_the_net_layer_by_layer() -> None:
    """ActNorm after each hidden convolution, gain after the last: as one writes them down."""
    net = pgf.CouplingNet(2, 4, hidden=8, actnorm=True, cond_channels=3).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, cond = torch.randn(2, 2, 5, 4).double(), torch.randn(2, 3, 5, 4).double()
    hidden = net.norm1(net.conv1(torch.cat([x, cond], dim=1)))[0].relu()
    hidden = net.norm2(net.conv2(hidden))[0].relu()
    assert_close(net(x, cond), net.conv3(hidden) * (3.0 * net.log_gain).exp(), condition=10.0)


ARGS = weights_for((2, 2, 4, 4), 8, 4, torch.float32)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 2, 4), r"x: expected CPU images \(N, C, H, W\), found"),
        (0, torch.zeros(2, 2, 4, 4).half(), "x: expected dtype float32 or float64, found float16"),
        (1, torch.zeros(8, 3, 3, 3), r"w1: expected shape \[8, 2, 3, 3\], found \[8, 3, 3, 3\]"),
        (2, torch.zeros(7), r"b1: expected shape \[8\], found \[7\]"),
        (3, torch.zeros(9, 8, 3, 3), r"w2: expected shape \[9, 8, 1, 1\], found"),
        (5, torch.zeros(4, 9, 3, 3).double(), "w3: expected dtype float32 like x, found float64"),
        (6, torch.zeros(4, 1), r"b3: expected shape \[4\], found \[4, 1\]"),
    ],
)
def test_bad_input(position: int, value: Tensor, message: str) -> None:
    arguments = list(ARGS)
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        ops.coupling_net(*arguments, None, True)


def test_bad_gain() -> None:
    with pytest.raises(ValueError, match=r"log_gain: expected 4 elements, found \[3\]"):
        ops.coupling_net(*ARGS, torch.zeros(3), True)
    with pytest.raises(ValueError, match="log_gain: expected dtype float32 like x, found float64"):
        ops.coupling_net(*ARGS, torch.zeros(4).double(), True)
    x, w1, _, w2, _, w3, _ = ARGS
    h1, h2 = ops.coupling_net(*ARGS, None, True)[1:]
    with pytest.raises(ValueError, match="b3: expected a bias beside log_gain, found none"):
        ops.coupling_net_backward(torch.zeros(2, 4, 4, 4), x, h1, h2, w1, w2, w3, None, torch.zeros(4), True)


@pytest.mark.parametrize("leak", [-0.1, 1.5, math.nan, math.inf])
def test_bad_leak(leak: float) -> None:
    message = rf"leak: expected a slope from 0 to 1, found {leak}"
    for function in (functional.coupling_net, reference.coupling_net):
        with pytest.raises(ValueError, match=message):
            function(*ARGS, leak=leak)
    x, w1, _, w2, _, w3, _ = ARGS
    h1, h2 = ops.coupling_net(*ARGS, None, True)[1:]
    with pytest.raises(ValueError, match=message):
        ops.coupling_net(*ARGS, None, True, leak)
    with pytest.raises(ValueError, match=message):
        ops.coupling_net_backward(torch.zeros(2, 4, 4, 4), x, h1, h2, w1, w2, w3, None, None, True, leak)


def test_bad_backward_input() -> None:
    x, w1, _, w2, _, w3, _ = ARGS
    h1, h2 = ops.coupling_net(*ARGS, None, True)[1:]
    with pytest.raises(ValueError, match=r"grad_out: expected shape \[2, 4, 4, 4\], found \[2, 4, 4, 3\]"):
        ops.coupling_net_backward(torch.zeros(2, 4, 4, 3), x, h1, h2, w1, w2, w3, None, None, True)
    with pytest.raises(ValueError, match=r"h1: expected shape \[256\], found \[288\]"):
        ops.coupling_net_backward(torch.zeros(2, 4, 4, 4), x, h2, h2, w1, w2, w3, None, None, True)
    with pytest.raises(ValueError, match=r"h2: expected shape \[288\], found \[256\]"):
        ops.coupling_net_backward(torch.zeros(2, 4, 4, 4), x, h1, h1, w1, w2, w3, None, None, True)
    with pytest.raises(ValueError, match="h1: expected dtype float32 like x, found float64"):
        ops.coupling_net_backward(torch.zeros(2, 4, 4, 4), x, h1.double(), h2, w1, w2, w3, None, None, True)


@pytest.mark.parametrize("empty", range(4))
def test_layers_without_channels_are_refused(empty: int) -> None:
    """A product over nothing writes nothing: what it would have written was memory as it was found."""
    sizes = [2, 3, 5, 4]
    sizes[empty] = 0
    inside, hidden1, hidden2, outside = sizes
    weights = [torch.zeros(shape) for shape in ((hidden1, inside, 3, 3), hidden1, (hidden2, hidden1, 1, 1), hidden2)]
    weights += [torch.zeros(outside, hidden2, 3, 3), torch.zeros(outside)]
    with pytest.raises(ValueError, match="w1, w2, w3: expected at least one channel each way, found"):
        ops.coupling_net(torch.zeros(1, inside, 4, 4), *weights, None, False)
