"""The kernels that do more in one pass, and the sums over values, against the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from support import covering
from support.covering import pairs
from support.helpers import assert_close, assert_kernel_close, memory_layouts
from support.kernel_cases import (
    DTYPES,
    SHAPES,
    SPECS,
    assert_bits_do_not_depend_on_threads,
    case_name,
    compare,
    coupling_inputs,
    log_det_magnitude,
    mix_inputs,
)
from torch import Tensor

from pyglow_fast import _backend, functional, ops, reference
from pyglow_fast.reference import CouplingSpec

pytestmark = pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")
ALL_OPS = ("coupling_mix", "coupling_mix_backward", "step_backward", "channel_moments")
ALL_OPS += ("gaussian_log_prob", "gaussian_log_prob_backward", "gaussian_sample")


@pytest.fixture(autouse=True)
def _on_device(device: torch.device) -> Iterator[None]:
    """What a test makes is made on the device."""
    with device:
        yield


def _step_inputs(shape: tuple[int, ...], spec: CouplingSpec, dtype: torch.dtype) -> list[Tensor]:
    device = torch.get_default_device()
    x, net_out = coupling_inputs(shape, spec, dtype, device)
    _, matrix, offset = mix_inputs(shape, dtype, device)
    return [x, net_out, matrix, offset]


@pairs(
    pytest.mark.parametrize("dtype", DTYPES, ids=case_name),
    pytest.mark.parametrize("shape", SHAPES, ids=case_name),
    pytest.mark.parametrize("spec", SPECS, ids=case_name),
    pytest.mark.parametrize("name", ["coupling_mix", "coupling_mix_inverse"]),
)
def test_coupling_mix_equals_reference(
    name: str, spec: CouplingSpec, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs = _step_inputs(shape, spec, dtype)
    compare(name, inputs, spec, magnitude=log_det_magnitude(inputs[1], spec))


@pytest.mark.parametrize("shape", SHAPES, ids=case_name)
@pytest.mark.parametrize("spec", SPECS, ids=case_name)
def test_inverse_pass_without_gradients(spec: CouplingSpec, shape: tuple[int, ...]) -> None:
    """With gradients off the inverse is one pass; with them on it is two: the same values."""
    inputs = _step_inputs(shape, spec, torch.float64)
    with torch.no_grad():
        fused = functional.coupling_mix_inverse(*inputs, spec)
    for actual, expected in zip(fused, reference.coupling_mix_inverse(*inputs, spec), strict=True):
        assert_close(actual, expected, condition=100.0)  # 1/s up to about 20


@pytest.mark.parametrize("shape", SHAPES, ids=case_name)
@pytest.mark.parametrize("spec", SPECS, ids=case_name)
def test_step_backward(spec: CouplingSpec, shape: tuple[int, ...]) -> None:
    """From y alone: the step's input, and what autograd through the reference gives for u and the net's output."""
    u, net_out, matrix, offset = _step_inputs(shape, spec, torch.float64)
    eye = torch.eye(shape[1], dtype=torch.float64)
    matrix = matrix / 4 + eye  # well conditioned: this is about the pass, not about inversion
    x = torch.randn(shape, dtype=torch.float64)
    u = reference.channel_mix(x, matrix, offset).requires_grad_()
    net_out.requires_grad_()
    y, log_det = reference.coupling(u, net_out, spec)
    grad_y, grad_log_det = torch.randn_like(y), torch.randn_like(log_det)
    outputs = [(y, grad_y)] + ([(log_det, grad_log_det)] if log_det.requires_grad else [])
    expected = torch.autograd.grad([o for o, _ in outputs], [u, net_out], [g for _, g in outputs])
    scale_map, order, _, *parameters = ops.coupling_arguments(spec, inverse=False)
    got_x, *got = ops.step_backward(
        y.detach(),
        net_out.detach(),
        grad_y,
        grad_log_det,
        torch.linalg.inv(matrix),
        offset,
        scale_map,
        order,
        *parameters,
    )
    assert_close(got_x, x, condition=100.0 * float(torch.linalg.cond(matrix)))
    for actual, exact in zip(got, expected, strict=True):
        assert_close(actual, exact, condition=100.0)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if math.prod(shape)], ids=case_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=case_name)
def test_channel_moments(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Float64 results whatever the dtype; a mean a million times the spread does not swallow it."""
    x = torch.randn(shape, dtype=torch.float64)
    for shift in (0.0, 1000.0):
        values = (x + shift).to(dtype)
        exact_mean, exact_m2 = reference.channel_moments(values)
        mean, m2 = functional.channel_moments(values)
        # float32: sums over a tile of deviations in float32, merged in float64: the mean too is off by roundings
        # of the spread alone. float64: the reference itself loses mean / sd.
        condition = 1.0 + shift if dtype == torch.float64 else 1.0
        for actual, exact in ((mean - shift, exact_mean - shift), (m2, exact_m2)):
            size = exact.abs().clamp(min=1.0)
            assert_close(actual / size, exact / size, condition, dtype)
    mean, m2 = functional.channel_moments(x[:0])
    assert not mean.any()
    assert not m2.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=case_name)
@pytest.mark.parametrize("shape", SHAPES, ids=case_name)
def test_gaussian(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = [torch.randn(shape).to(dtype) for _ in range(3)]
    magnitude = math.sqrt(max(1, math.prod(shape[1:]))) * 10.0  # the roundings of a sum of terms of about this size
    compare("gaussian_log_prob", values, magnitude=magnitude)
    compare("gaussian_sample", values)
    with torch.no_grad():
        sample = functional.gaussian_sample(*values)
    exact = reference.gaussian_sample(*(value.double() for value in values))
    assert_kernel_close(sample, reference.gaussian_sample(*values), exact)


def test_gaussian_broadcasts() -> None:
    """One mean and log_sd per channel, or per sample and channel, as top priors have; gradients are summed back."""
    z = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    for rows in (1, 3):
        compare("gaussian_log_prob", [z, torch.randn(rows, 4, 1, 1).double(), torch.randn(rows, 4, 1, 1).double()])


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[-1]], ids=case_name)
def test_layouts(spec: CouplingSpec) -> None:
    shape = (2, 6, 5, 9)
    x, net_out, matrix, offset = _step_inputs(shape, spec, torch.float64)
    codes = ops.coupling_arguments(spec, inverse=False)
    grad, grad_log_det = torch.randn_like(x), torch.randn(2).double()
    scale_map, order, _, *parameters = codes
    backward_codes = (scale_map, order, *parameters)

    def run(x: Tensor, net_out: Tensor, grad: Tensor, matrix: Tensor) -> list[Tensor]:
        return [
            *ops.coupling_mix(x, net_out, matrix, offset, *codes),
            *ops.coupling_mix_backward(x, net_out, grad, grad_log_det, matrix, *backward_codes, None),
            *ops.step_backward(x, net_out, grad, grad_log_det, matrix, offset, *backward_codes),
            *ops.channel_moments(x),
            ops.gaussian_log_prob(x, grad, grad),
            *ops.gaussian_log_prob_backward(x, grad, grad, grad_log_det),
            ops.gaussian_sample(x, grad, grad),
        ]

    expected = run(x, net_out, grad, matrix)
    by_columns = matrix.T.contiguous().T
    for name in memory_layouts(x):
        got = run(*(memory_layouts(value)[name] for value in (x, net_out, grad)), by_columns)
        for actual, exact in zip(got, expected, strict=True):
            assert_close(actual, exact)


@pytest.mark.alone
@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    x, net_out, matrix, offset = _step_inputs((40, 12, 32, 32), SPECS[0], torch.float32)
    codes, grad, grad_log_det = ops.coupling_arguments(SPECS[0], inverse=False), torch.randn_like(x), torch.randn(40)
    backward_codes = (*codes[:2], *codes[3:])

    def run(x: Tensor) -> list[Tensor]:
        return [
            *ops.coupling_mix(x, net_out, matrix, offset, *codes),
            *ops.coupling_mix_backward(x, net_out, grad, grad_log_det, matrix, *backward_codes, None),
            *ops.step_backward(x, net_out, grad, grad_log_det, matrix, offset, *backward_codes),
            *ops.channel_moments(x),
            ops.gaussian_log_prob(x, grad, grad),
            *ops.gaussian_log_prob_backward(x, grad, grad, grad_log_det),
            ops.gaussian_sample(x, grad, grad),
        ]

    assert_bits_do_not_depend_on_threads(run, x, threads)


def test_gradcheck() -> None:
    for spec in (SPECS[0], SPECS[1], SPECS[-1]):
        inputs = [value.requires_grad_() for value in _step_inputs((2, 4, 3, 2), spec, torch.float64)]
        for function in (functional.coupling_mix, functional.coupling_mix_inverse):
            assert torch.autograd.gradcheck(lambda *args, f=function, spec=spec: f(*args, spec), tuple(inputs))
    values = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(functional.gaussian_log_prob, tuple(values))


@pytest.mark.parametrize("indexed", [False, True])
def test_channels_last_net(indexed: bool) -> None:
    """A channels-last net's output beside a contiguous state gives the same; its gradient keeps the layout."""
    x, net_out, matrix, offset = _step_inputs((2, 12, 4, 8), SPECS[0], torch.float64)
    index = torch.randperm(12) if indexed else None
    codes = ops.coupling_arguments(SPECS[0], inverse=False)
    grad, grad_log_det = torch.randn_like(x), torch.randn(2).to(x)
    backward_codes = codes[:2] + codes[3:]
    matrix = matrix.diagonal().contiguous() if indexed else matrix
    last = net_out.to(memory_format=torch.channels_last)
    calls = [
        (ops.coupling, lambda net: (x, net, *codes), None),
        (ops.coupling_backward, lambda net: (x, net, grad, grad_log_det, *codes, True), 1),
        (ops.coupling_mix, lambda net: (x, net, matrix, offset, *codes, index), None),
        (
            ops.coupling_mix_backward,
            lambda net: (x, net, grad, grad_log_det, matrix, *backward_codes, None, index),
            1,
        ),
        (ops.step_backward, lambda net: (x, net, grad, grad_log_det, matrix, offset, *backward_codes, index), 2),
    ]
    for op, arguments, grad_net_out in calls:
        results = op(*arguments(last))
        for position, (got, expected) in enumerate(zip(results, op(*arguments(net_out)), strict=True)):
            assert_close(got, expected)
            of_net = position == grad_net_out
            assert got.dim() != 4 or got.is_contiguous(memory_format=torch.channels_last) == of_net
        torch.library.opcheck(op, arguments(last))


@pytest.mark.parametrize("dtype", DTYPES, ids=case_name)
def test_opcheck(dtype: torch.dtype) -> None:
    x, net_out, matrix, offset = _step_inputs((2, 6, 5, 3), SPECS[0], dtype)
    codes = ops.coupling_arguments(SPECS[0], inverse=False)
    backward_codes, log_det = (*codes[:2], *codes[3:]), torch.randn(2).to(x)
    layouts = (x, *memory_layouts(x).values(), x[:, :1].expand_as(x))
    # The other dtype is asked about itself, not about layouts once more.
    for layout in layouts if covering.full or dtype == torch.float32 else layouts[:1]:
        torch.library.opcheck(ops.coupling_mix, (layout, net_out, matrix, offset, *codes))
        torch.library.opcheck(ops.coupling_mix_backward, (layout, net_out, x, log_det, matrix, *backward_codes, None))
        torch.library.opcheck(ops.step_backward, (layout, net_out, x, log_det, matrix, offset, *backward_codes))
        torch.library.opcheck(ops.channel_moments, (layout,))
        torch.library.opcheck(ops.gaussian_log_prob, (layout, x, x))
        torch.library.opcheck(ops.gaussian_log_prob_backward, (layout, x, x, log_det))
        torch.library.opcheck(ops.gaussian_sample, (layout, x, x))


X, M, C, L = torch.zeros(2, 4, 3, 3), torch.eye(4), torch.zeros(4), torch.zeros(2)
CODES = ops.coupling_arguments(CouplingSpec(), inverse=False)
BACKWARDS = (*CODES[:2], *CODES[3:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.coupling_mix(X, X[:, :3], M, C, *CODES), "net_out: expected 2 times at most 4 channels"),
        (lambda: ops.coupling_mix(X, X, M[:3], C, *CODES), r"matrix: expected shape \[4, 4\], found \[3, 4\]"),
        (lambda: ops.coupling_mix_backward(X, X, X[:1], L, M, *BACKWARDS, None), "grad_out: expected shape"),
        (lambda: ops.coupling_mix_backward(X, X, X, C, M, *BACKWARDS, None), r"grad_log_det: expected shape \[2\]"),
        (lambda: ops.step_backward(X, X, X, L, M, C.double(), *BACKWARDS), "offset: expected dtype float32 like y"),
        (lambda: ops.channel_moments(X.half()), "x: expected dtype float32 or float64, found float16"),
        (lambda: ops.gaussian_log_prob(X, X[:1], X), r"mean: expected shape \[2, 4, 3, 3\], found \[1, 4, 3, 3\]"),
        (lambda: ops.gaussian_log_prob(X, X, X[:1]), r"log_sd: expected shape \[2, 4, 3, 3\], found \[1, 4, 3, 3\]"),
        (lambda: ops.gaussian_log_prob(X, X, X.double()), "log_sd: expected dtype float32 like z, found float64"),
        (lambda: ops.gaussian_sample(X[0, 0, 0], X, X), r"noise: expected shape \(N, C, \*spatial\)"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()
