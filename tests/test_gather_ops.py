"""The channel mixing by a permutation: the kernels against the reference, and the reference against a product."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from support import covering
from support.covering import pairs
from support.helpers import assert_close, memory_layouts
from support.kernel_cases import (
    DTYPES,
    SHAPES,
    SPECS,
    assert_bits_do_not_depend_on_threads,
    case_name,
    compare,
    coupling_inputs,
    log_det_magnitude,
)
from torch import Tensor

from pyglow_fast import _backend, functional, ops, reference
from pyglow_fast.reference import CouplingSpec

compiled = pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")
SPEC = SPECS[0]
CODES = ops.coupling_arguments(SPEC, inverse=False)
BACKWARDS = (*CODES[:2], *CODES[3:])


@pytest.fixture(autouse=True)
def _on_device(device: torch.device) -> Iterator[None]:
    """What a test makes is made on the device."""
    with device:
        yield


def gather_inputs(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Scales of both signs, an offset far from zero, and a permutation."""
    scale = torch.randn(channels).exp() * torch.randn(channels).sign()
    return scale.to(dtype), (3.0 + torch.randn(channels)).to(dtype), torch.randperm(channels)


def product_of(scale: Tensor, index: Tensor) -> Tensor:
    """The matrix with scale_i at [i, index_i]."""
    return torch.eye(len(scale), dtype=scale.dtype)[index] * scale.unsqueeze(1)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if math.prod(shape)], ids=case_name)
def test_the_reference_is_a_product(shape: tuple[int, ...]) -> None:
    """One number of each row of the product is not zero, so they are equal to the bit where nothing is added."""
    x = torch.randn(shape, dtype=torch.float64)
    scale, offset, index = gather_inputs(shape[1], torch.float64)
    matrix, zeros = product_of(scale, index), torch.zeros_like(offset)
    assert torch.equal(
        reference.channel_mix(x, scale, zeros, index=index), reference.channel_mix(x, matrix, zeros) + 0.0
    )
    assert_close(reference.channel_mix(x, scale, offset, index=index), reference.channel_mix(x, matrix, offset))
    assert_close(reference.channel_unmix(x, scale, offset, index=index), reference.channel_unmix(x, matrix, offset))
    inverse, back = reference.invert_gather(scale, index)
    assert_close(product_of(inverse, back), torch.linalg.inv(matrix))
    transposed = reference.transpose_map(scale, index)
    assert transposed[1] is not None
    assert torch.equal(product_of(transposed[0], transposed[1]), matrix.T)


def test_folding_is_a_product() -> None:
    _, bias, _ = gather_inputs(6, torch.float64)
    log_scale, bias = torch.randn(3, 6, dtype=torch.float64), bias.expand(3, 6)
    index = torch.stack([torch.randperm(6) for _ in range(3)])
    scale, offset = reference.gather_actnorm(index, log_scale, bias)
    matrix, expected = reference.fold_actnorm(torch.eye(6, dtype=torch.float64)[index], log_scale, bias)
    for k in range(3):
        assert torch.equal(product_of(scale[k], index[k]), matrix[k])
    assert_close(offset, expected)


@compiled
@pairs(
    pytest.mark.parametrize("dtype", DTYPES, ids=case_name),
    pytest.mark.parametrize("shape", SHAPES, ids=case_name),
    pytest.mark.parametrize("name", ["channel_mix", "channel_unmix"]),
)
def test_gather_equals_reference(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scale, offset, index = gather_inputs(shape[1], dtype)
    compare(name, [torch.randn(shape).to(dtype), scale, offset], False, index)


@compiled
@pairs(
    pytest.mark.parametrize("dtype", DTYPES, ids=case_name),
    pytest.mark.parametrize("shape", SHAPES, ids=case_name),
    pytest.mark.parametrize("spec", SPECS, ids=case_name),
    pytest.mark.parametrize("name", ["coupling_mix", "coupling_mix_inverse"]),
)
def test_gather_of_a_coupling_equals_reference(
    name: str, spec: CouplingSpec, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, net_out = coupling_inputs(shape, spec, dtype, torch.get_default_device())
    scale, offset, index = gather_inputs(shape[1], dtype)
    inputs = [x, net_out, scale, offset]
    compare(name, inputs, spec, index, magnitude=log_det_magnitude(net_out, spec))
    with torch.no_grad():  # the inverse as one pass
        fused = getattr(functional, name)(*(value.double() for value in inputs), spec, index)
    exact = getattr(reference, name)(*(value.double() for value in inputs), spec, index)
    assert_close(fused[0], exact[0], condition=100.0)  # 1/s up to about 20


@compiled
@pytest.mark.parametrize("shape", SHAPES, ids=case_name)
@pytest.mark.parametrize("spec", SPECS, ids=case_name)
def test_step_backward(spec: CouplingSpec, shape: tuple[int, ...]) -> None:
    """From y alone: what the pass with a matrix gives."""
    y, net_out = coupling_inputs(shape, spec, torch.float64, torch.get_default_device())
    scale, offset, index = gather_inputs(shape[1], torch.float64)
    grad, grad_log_det = torch.randn_like(y), torch.randn(shape[0], dtype=torch.float64)
    scale_map, order, _, *parameters = ops.coupling_arguments(spec, inverse=False)
    codes = (scale_map, order, *parameters)
    found = ops.step_backward(y, net_out, grad, grad_log_det, scale, offset, *codes, index)
    expected = ops.step_backward(y, net_out, grad, grad_log_det, product_of(scale, index), offset, *codes)
    for actual, exact in zip(found, expected, strict=True):
        assert_close(actual, exact, condition=100.0)


@compiled
def test_what_the_net_adds_to_the_gradient() -> None:
    """It belongs to the first channels, whichever these come from."""
    x, net_out = coupling_inputs((2, 7, 5, 9), SPEC, torch.float64, torch.get_default_device())
    scale, offset, index = gather_inputs(7, torch.float64)
    grad, added, log_det = torch.randn_like(x), torch.randn_like(x[:, :3]), torch.randn(2, dtype=torch.float64)
    whole = torch.cat([grad[:, :3] + added, grad[:, 3:]], dim=1)
    inputs = (x, net_out, whole, log_det, scale, *BACKWARDS)
    expected = ops.coupling_mix_backward(*inputs, None, index)
    for actual, exact in zip(
        ops.coupling_mix_backward(x, net_out, grad, log_det, scale, *BACKWARDS, added, index), expected, strict=True
    ):
        assert_close(actual, exact)
    for actual, exact in zip(
        ops.channel_mix_backward(x, grad, scale, offset, added, False, index),
        ops.channel_mix_backward(x, whole, scale, offset, None, False, index),
        strict=True,
    ):
        assert_close(actual, exact)


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=case_name)
@pytest.mark.parametrize("last", [False, True])
def test_squeezed(dtype: torch.dtype, last: bool) -> None:
    """Images are squeezed as they are read, and unsqueezed as they are written."""
    x = torch.randn(2, 3, 6, 10).to(dtype)
    x = x.to(memory_format=torch.channels_last) if last else x
    scale, offset, index = gather_inputs(12, dtype)
    compare("channel_mix", [x, scale, offset], True, index)
    compare("channel_unmix", [reference.squeeze(x), scale, offset], True, index)


@compiled
@pytest.mark.parametrize("net", [torch.bfloat16, torch.float16], ids=case_name)
def test_16_bit_nets(net: torch.dtype) -> None:
    x, net_out = coupling_inputs((2, 6, 5, 9), SPEC, torch.float32, torch.get_default_device())
    net_out = net_out.to(net)
    scale, offset, index = gather_inputs(6, torch.float32)
    grad, log_det = torch.randn_like(x), torch.randn(2)
    for call in (
        lambda net_out: ops.coupling_mix(x, net_out, scale, offset, *CODES, index),
        lambda net_out: ops.coupling_mix_backward(x, net_out, grad, log_det, scale, *BACKWARDS, None, index),
        lambda net_out: ops.step_backward(x, net_out, grad, log_det, scale, offset, *BACKWARDS, index),
    ):
        for narrow, wide in zip(call(net_out), call(net_out.float()), strict=True):
            assert torch.equal(narrow, wide.to(narrow.dtype))


@compiled
@pytest.mark.parametrize("shape", [(2, 6, 5, 9), (2, 6, 3, 2, 5), (1, 40, 33, 32)], ids=case_name)
def test_layouts(shape: tuple[int, ...]) -> None:
    """Strides change nothing but speed, and in which order sums over positions are formed."""
    x, net_out = coupling_inputs(shape, SPEC, torch.float64, torch.get_default_device())
    scale, offset, index = gather_inputs(shape[1], torch.float64)
    grad, log_det = torch.randn_like(x), torch.randn(shape[0], dtype=torch.float64)

    def run(x: Tensor, net_out: Tensor, grad: Tensor) -> list[Tensor]:
        return [
            ops.channel_mix(x, scale, offset, False, 0, index),
            *ops.channel_mix_backward(x, grad, scale, offset, None, False, index),
            *ops.coupling_mix(x, net_out, scale, offset, *CODES, index),
            *ops.coupling_mix_backward(x, net_out, grad, log_det, scale, *BACKWARDS, None, index),
            *ops.step_backward(x, net_out, grad, log_det, scale, offset, *BACKWARDS, index),
        ]

    expected = run(x, net_out, grad)
    for name in memory_layouts(x):
        got = run(*(memory_layouts(value)[name] for value in (x, net_out, grad)))
        for actual, exact in zip(got, expected, strict=True):
            assert_close(actual, exact)


@compiled
@pytest.mark.alone
@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    x, net_out = coupling_inputs((40, 12, 32, 32), SPEC, torch.float32, torch.get_default_device())
    scale, offset, index = gather_inputs(12, torch.float32)
    grad, log_det = torch.randn_like(x), torch.randn(40)

    def run(x: Tensor) -> list[Tensor]:
        return [
            ops.channel_mix(x, scale, offset, True, 0, index),
            *ops.channel_mix_backward(x, grad, scale, offset, None, False, index),
            *ops.coupling_mix(x, net_out, scale, offset, *CODES, index),
            *ops.coupling_mix_backward(x, net_out, grad, log_det, scale, *BACKWARDS, None, index),
            *ops.step_backward(x, net_out, grad, log_det, scale, offset, *BACKWARDS, index),
        ]

    assert_bits_do_not_depend_on_threads(run, x, threads)


def test_gradcheck() -> None:
    scale, offset, index = (
        value.requires_grad_(value.is_floating_point()) for value in gather_inputs(4, torch.float64)
    )
    for spec in (SPECS[0], SPECS[1], SPECS[-1]):
        x, net_out = coupling_inputs((2, 4, 3, 2), spec, torch.float64, torch.get_default_device())
        inputs = (x.requires_grad_(), net_out.requires_grad_(), scale, offset)
        for function in (functional.coupling_mix, functional.coupling_mix_inverse):
            assert torch.autograd.gradcheck(lambda *args, f=function, spec=spec: f(*args, spec, index), inputs)
        for mix in (functional.channel_mix, functional.channel_unmix):
            assert torch.autograd.gradcheck(lambda *args, f=mix: f(*args, index=index), (x, scale, offset))
            assert torch.autograd.gradcheck(lambda *args, f=mix: f(*args, False, index), (x, scale.detach(), offset))


def test_gradient_of_x_alone() -> None:
    """With fixed scales and offset it is a gather by the inverse permutation."""
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    scale, offset, index = gather_inputs(5, torch.float64)
    assert torch.autograd.gradcheck(lambda x: functional.channel_mix(x, scale, offset, index=index), (x,))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_channel(value: float) -> None:
    """A product spreads it over all channels."""
    x = torch.zeros(1, 4, 37)
    x[0, 3, 36] = value
    mixed = functional.channel_mix(x, torch.ones(4), torch.zeros(4), index=torch.tensor([1, 3, 0, 2]))
    assert not mixed[0, 1, 36].isfinite()
    assert int(mixed.isfinite().sum()) == mixed.numel() - 1


X, S, C, L = torch.zeros(2, 4, 3, 3), torch.ones(4), torch.zeros(4), torch.zeros(2)
INDEX = torch.tensor([2, 0, 3, 1])


@compiled
@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([0, 1, 2, 4]), "index: expected a permutation of 0 to 3, found 4 at place 3"),
        (torch.tensor([0, -1, 2, 3]), "index: expected a permutation of 0 to 3, found -1 at place 1"),
        (torch.tensor([0, 1, 1, 3]), "index: expected a permutation of 0 to 3, found 1 at place 2"),
        (INDEX[:3], r"index: expected shape \[4\], found \[3\]"),
        (INDEX.int(), "index: expected dtype int64, found Int"),
    ],
)
def test_bad_index(index: Tensor, message: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: ops.channel_mix(X, S, C, False, 0, index),
        lambda: ops.channel_mix_backward(X, X, S, None, None, False, index),
        lambda: ops.coupling_mix(X, X, S, C, *CODES, index),
        lambda: ops.coupling_mix_backward(X, X, X, L, S, *BACKWARDS, None, index),
        lambda: ops.step_backward(X, X, X, L, S, C, *BACKWARDS, index),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("index", [[0, 1, 2, 4], [0, -1, 2, 3], [0, 1, 1, 3]])
def test_bad_index_of_the_reference(index: list[int]) -> None:
    for function in (reference.channel_mix, reference.channel_unmix):
        with pytest.raises(ValueError, match="index: expected a permutation of 0 to 3"):
            function(X, S, C, index=torch.tensor(index))
    with pytest.raises(ValueError, match=r"index: expected shape \(4,\), int64"):
        reference.channel_mix(X, S, C, index=INDEX[:3])


@compiled
def test_a_matrix_is_no_gather() -> None:
    with pytest.raises(ValueError, match=r"matrix: expected shape \[4\], found \[4, 4\]"):
        ops.channel_mix(X, torch.eye(4), C, False, 0, INDEX)
    with pytest.raises(ValueError, match=r"matrix: expected shape \[4, 4\], found \[4\]"):
        ops.channel_mix(X, S, C, False, 0)


def test_a_scale_of_zero_has_no_inverse() -> None:
    with pytest.raises(ValueError, match="scale: expected scales that are not zero, found a zero"):
        functional.invert_gather(torch.tensor([1.0, 0.0]), torch.tensor([1, 0]))


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=case_name)
def test_opcheck(dtype: torch.dtype) -> None:
    x, net_out = coupling_inputs((2, 6, 5, 3), SPEC, dtype, torch.get_default_device())
    scale, offset, index = gather_inputs(6, dtype)
    log_det = torch.randn(2).to(x)
    layouts = (x, *memory_layouts(x).values(), x[:, :1].expand_as(x))
    for layout in layouts if covering.full or dtype == torch.float32 else layouts[:1]:
        torch.library.opcheck(ops.channel_mix, (layout, scale, offset, False, 0, index))
        torch.library.opcheck(ops.channel_mix_backward, (layout, x, scale, offset, None, False, index))
        torch.library.opcheck(ops.coupling_mix, (layout, net_out, scale, offset, *CODES, index))
        arguments = (layout, net_out, x, log_det, scale, *BACKWARDS, None, index)
        torch.library.opcheck(ops.coupling_mix_backward, arguments)
        torch.library.opcheck(ops.step_backward, (layout, net_out, x, log_det, scale, offset, *BACKWARDS, index))
