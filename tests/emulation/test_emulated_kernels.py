"""Every CUDA kernel, run on the CPU, against the reference: outputs, gradients, layouts, sizes, determinism."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.covering import pairs
from support.emulated_cases import (
    coupling_case,
    coupling_gradients,
    coupling_reference,
    cuts,
    directions,
    dtypes,
    flat,
    layouts,
    mix_case,
    net_channels,
    shapes,
    specs,
)
from support.emulator import Emulator, allocate, assert_only_written, laid_out
from support.helpers import assert_close, assert_kernel_close, tolerance
from torch import Tensor

from pyglow_fast import reference
from pyglow_fast.reference import CouplingSpec


def assert_matches(actual: Tensor, function: Callable[..., Tensor], *arguments: Tensor) -> None:
    """``actual`` is as good as the reference ``function`` in the same dtype, both held against float64."""
    assert_kernel_close(actual, function(*arguments), function(*(a.double() for a in arguments)))


@pairs(
    dtypes,
    shapes,
    pytest.mark.parametrize("subtract_first", [False, True], ids=["mix", "unmix"]),
    cuts,
)
def test_channel_mix(
    emulator: Emulator, shape: tuple[int, int, int, int], subtract_first: bool, dtype: torch.dtype
) -> None:
    x, matrix, offset = mix_case(flat(shape), dtype)
    u = emulator.channel_mix(x, matrix, offset, subtract_first)
    assert_only_written(u)
    assert_matches(u, reference.channel_unmix if subtract_first else reference.channel_mix, x, matrix, offset)


def mix_gradients(x: Tensor, matrix: Tensor, offset: Tensor, grad_u: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (x, matrix, offset)]
    return torch.autograd.grad(reference.channel_mix(*leaves), leaves, grad_u)


@pairs(
    dtypes,
    shapes,
    pytest.mark.parametrize("centred", [False, True]),
    cuts,
)
def test_channel_mix_backward(
    emulator: Emulator, shape: tuple[int, int, int, int], centred: bool, dtype: torch.dtype
) -> None:
    x, matrix, offset = mix_case(flat(shape), dtype)
    grad_u = torch.randn_like(x)
    center = torch.randn_like(offset) if centred else None
    actual = emulator.channel_mix_backward(x, grad_u, matrix, center)
    plain_x = x if center is None else x - center.view(-1, 1)
    exact_x = x.double() if center is None else x.double() - center.double().view(-1, 1)
    plain = mix_gradients(plain_x, matrix, offset, grad_u)
    exact = mix_gradients(exact_x, matrix.double(), offset.double(), grad_u.double())
    for got, same_dtype, expected in zip(actual, plain, exact, strict=True):
        assert_only_written(got)
        assert_kernel_close(got, same_dtype, expected)


@pairs(
    dtypes,
    shapes,
    specs,
    directions,
)
def test_coupling(
    emulator: Emulator, shape: tuple[int, int, int, int], spec: CouplingSpec, inverse: bool, dtype: torch.dtype
) -> None:
    x, net_out = coupling_case(flat(shape), spec, dtype)
    out, log_det = emulator.coupling(x, net_out, spec, inverse)
    assert_only_written(out)
    assert_only_written(log_det)
    assert_matches(out, lambda *args: coupling_reference(*args, spec, inverse)[0], x, net_out)
    assert_matches(log_det, lambda *args: coupling_reference(*args, spec, inverse)[1], x, net_out)


@pairs(
    dtypes,
    shapes,
    specs,
    directions,
)
def test_coupling_backward(
    emulator: Emulator, shape: tuple[int, int, int, int], spec: CouplingSpec, inverse: bool, dtype: torch.dtype
) -> None:
    x, net_out = coupling_case(flat(shape), spec, dtype)
    out, _ = coupling_reference(x, net_out, spec, inverse)
    grad_out, grad_log_det = torch.randn_like(x), torch.randn(x.shape[0], dtype=dtype)
    actual = emulator.coupling_backward(out, net_out, grad_out, grad_log_det, spec, inverse)
    assert actual.recovered is not None
    plain = coupling_gradients(x, net_out, grad_out, grad_log_det, spec, inverse)
    exact = coupling_gradients(*(t.double() for t in (x, net_out, grad_out, grad_log_det)), spec, inverse)
    for got, same_dtype, expected in zip(actual[1:], plain, exact, strict=True):
        assert_only_written(got)
        assert_kernel_close(got, same_dtype, expected)
    assert_only_written(actual.recovered)
    undone = coupling_reference(out, net_out, spec, not inverse)[0]
    assert_kernel_close(actual.recovered, undone, x.double())
    without = emulator.coupling_backward(out, net_out, grad_out, grad_log_det, spec, inverse, recover=False)
    assert without.recovered is None
    assert torch.equal(without.grad_in, actual.grad_in)
    assert torch.equal(without.grad_net_out, actual.grad_net_out)


# Layouts change addresses, not values: contiguous inputs and outputs are the yardstick. Only log_det is added up in
# another order.
LAYOUT_SHAPES = [(2, 12, 24), (1, 8, 160), (3, 7, 15), (2, 48, 35), (4, 16, 1), (1, 140, 12)]
layout_shapes = pytest.mark.parametrize("shape", LAYOUT_SHAPES, ids=lambda s: "x".join(map(str, s)))


@pairs(
    dtypes,
    layout_shapes,
    layouts,
    pytest.mark.parametrize("out_layout", ["contiguous", "same"]),
    cuts,
)
def test_mix_layouts(
    emulator: Emulator, shape: tuple[int, int, int], layout: str, out_layout: str, dtype: torch.dtype
) -> None:
    x, matrix, offset = mix_case(shape, dtype)
    grad_u = torch.randn_like(x)
    expected = [emulator.channel_mix(x, matrix, offset), *emulator.channel_mix_backward(x, grad_u, matrix)]
    emulator.out_layout = layout if out_layout == "same" else out_layout
    x, grad_u = laid_out(x, layout), laid_out(grad_u, layout)
    actual = [emulator.channel_mix(x, matrix, offset), *emulator.channel_mix_backward(x, grad_u, matrix)]
    for got, values in zip(actual, expected, strict=True):
        assert_only_written(got)
        assert torch.equal(got, values)


@pairs(
    dtypes,
    layout_shapes,
    layouts,
    pytest.mark.parametrize("out_layout", ["contiguous", "same"]),
)
def test_coupling_layouts(
    emulator: Emulator, shape: tuple[int, int, int], layout: str, out_layout: str, dtype: torch.dtype
) -> None:
    spec = CouplingSpec()
    x, net_out = coupling_case(shape, spec, dtype)
    grad_out, grad_log_det = torch.randn_like(x), torch.randn(shape[0], dtype=dtype)
    y, log_det = emulator.coupling(x, net_out, spec)
    expected = emulator.coupling_backward(y, net_out, grad_out, grad_log_det, spec)
    emulator.out_layout = layout if out_layout == "same" else out_layout
    x, net_out, grad_out = (laid_out(t, layout) for t in (x, net_out, grad_out))
    got_y, got_log_det = emulator.coupling(x, net_out, spec)
    assert_only_written(got_y)
    assert torch.equal(got_y, y)
    assert_close(got_log_det / shape[2], log_det / shape[2])
    actual = emulator.coupling_backward(laid_out(y, layout), net_out, grad_out, grad_log_det, spec)
    for got, values in zip(actual, expected, strict=True):
        assert got is not None
        assert values is not None
        assert_only_written(got)
        assert torch.equal(got, values)


@pytest.mark.parametrize("kept", [0, 1, 3, 8])
def test_any_split_of_the_channels(emulator: Emulator, kept: int) -> None:
    """The kept channels need not be half of them."""
    x, net_out = torch.randn(2, kept + 4, 12), torch.randn(2, 8, 12)
    spec = CouplingSpec()
    y, log_det = emulator.coupling(x, net_out, spec)
    expected, expected_log_det = reference.coupling(x, net_out, spec)
    assert_close(y, expected)
    assert_close(log_det, expected_log_det)
    grads = emulator.coupling_backward(y, net_out, x, log_det, spec)
    assert torch.equal(grads.grad_in[:, :kept], x[:, :kept])
    assert grads.recovered is not None
    assert_close(grads.recovered, x)


@layouts
def test_coupling_in_place(emulator: Emulator, layout: str) -> None:
    spec = CouplingSpec()
    x, net_out = coupling_case((2, 10, 33), spec, torch.float32)
    expected, _ = emulator.coupling(x, net_out, spec)
    held = laid_out(x, layout)
    emulator.coupling(held, net_out, spec, out=held)
    assert_only_written(held)
    assert torch.equal(held, expected)


@specs
@directions
def test_extreme_scales(emulator: Emulator, spec: CouplingSpec, inverse: bool) -> None:
    """Raw values in [-30, 30]: every element keeps its relative accuracy, however small or large its scale is."""
    x, net_out = (t.abs() + 0.1 for t in coupling_case((2, 6, 61), spec, torch.float32))
    half = 3
    if spec.coupling == "affine":
        net_out[:, half:] = torch.linspace(-30.0, 30.0, net_out[:, half:].numel()).view_as(net_out[:, half:])
    if inverse:
        net_out[:, :half] *= -1.0  # no cancellation between x and the shift
    out, log_det = emulator.coupling(x, net_out, spec, inverse)
    exact, exact_log_det = coupling_reference(x.double(), net_out.double(), spec, inverse)
    assert out.isfinite().all()
    relative = float(((out.double() - exact) / exact).abs().max())
    assert relative <= tolerance(dtype=torch.float32), f"relative error {relative:.1e}"
    assert_close(log_det / 183, exact_log_det / 183)


@dtypes
@pytest.mark.parametrize("shape", [(3, 12, 700), (2, 7, 333), (1, 70, 90)], ids=lambda s: "x".join(map(str, s)))
def test_any_order_of_threads_gives_the_same_bits(
    emulator: Emulator, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    spec = CouplingSpec()
    x, matrix, offset = mix_case(shape, dtype)
    net_out = torch.randn(shape[0], net_channels(shape[1], spec), shape[2], dtype=dtype)
    grad_log_det = torch.randn(shape[0], dtype=dtype)

    def run(seed: int) -> list[Tensor]:
        emulator.seed = seed
        u = emulator.channel_mix(x, matrix, offset)
        y, log_det = emulator.coupling(u, net_out, spec)
        grads = emulator.coupling_backward(y, net_out, x, grad_log_det, spec)
        mix_grads = emulator.channel_mix_backward(x, grads.grad_in, matrix, offset)
        return [u, y, log_det, *(g for g in grads if g is not None), *mix_grads]

    first = run(0)
    for seed in (0, 1, 2, 12345):
        for got, expected in zip(run(seed), first, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [(2600, 2, 1), (1, 1, 600_000), (2600, 1, 3)], ids=lambda s: "x".join(map(str, s)))
def test_more_work_than_blocks(emulator: Emulator, shape: tuple[int, int, int]) -> None:
    """Grids are limited, so blocks loop; the sums of many positions are split."""
    spec = CouplingSpec()
    x, matrix, offset = mix_case(shape, torch.float32)
    assert_matches(emulator.channel_mix(x, matrix, offset), reference.channel_mix, x, matrix, offset)
    net_out = torch.randn(shape[0], net_channels(shape[1], spec), shape[2])
    y, log_det = emulator.coupling(x, net_out, spec)
    assert_matches(y, lambda *args: reference.coupling(*args, spec)[0], x, net_out)
    assert_matches(log_det, lambda *args: reference.coupling(*args, spec)[1], x, net_out)
    grads = emulator.coupling_backward(y, net_out, x, log_det, spec)
    assert_only_written(grads.grad_net_out)
    grad_u = torch.randn_like(x)
    plain = mix_gradients(x, matrix, offset, grad_u)
    exact = mix_gradients(*(t.double() for t in (x, matrix, offset, grad_u)))
    for got, same_dtype, expected in zip(emulator.channel_mix_backward(x, grad_u, matrix), plain, exact, strict=True):
        assert_kernel_close(got, same_dtype, expected)


def test_more_tiles_than_blocks(emulator: Emulator) -> None:
    """A block that walks several tiles brings the weights of every chunk of channels, here two, for each of them."""
    x, matrix, offset = mix_case((1, 17, 2304 * 128 + 1), torch.float64)
    assert_matches(emulator.channel_mix(x, matrix, offset), reference.channel_mix, x, matrix, offset)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 309, 673), torch.float64), ((1, 1450, 8), torch.float32)], ids=["309", "1450"]
)
def test_many_channels(emulator: Emulator, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Partial sums of grad_M are capped at 16 MB, as the driver checks.

    Of 309 channels that is a split fewer than there are tiles, and more sums than one round of a grid adds up over the
    splits; of 1450 it is one split, which writes the result.
    """
    x, matrix, offset = mix_case(shape, dtype)
    grad_u = torch.randn_like(x)
    assert_matches(emulator.channel_mix(x, matrix, offset), reference.channel_mix, x, matrix, offset)
    plain = mix_gradients(x, matrix, offset, grad_u)
    exact = mix_gradients(*(t.double() for t in (x, matrix, offset, grad_u)))
    for got, same_dtype, expected in zip(emulator.channel_mix_backward(x, grad_u, matrix), plain, exact, strict=True):
        assert_kernel_close(got, same_dtype, expected)


def test_offsets_beyond_32_bits(emulator: Emulator) -> None:
    """The elements lie more than 2^31 apart: of such memory only the touched pages exist."""
    shape, spec = (2, 4, 6), CouplingSpec()
    far = 2**31 + 8
    x, matrix, offset = mix_case(shape, torch.float32)
    net_out = torch.randn(2, 4, 6)
    expected = emulator.channel_mix(x, matrix, offset)
    expected_y, _ = emulator.coupling(x, net_out, spec)
    try:
        memory = torch.empty(2 * far)
    except RuntimeError:
        pytest.skip("the system does not lend that much untouched memory")
    for strides in ((far, 6, 1), (1, far // 4, 4), (24, 1, far // 6 // 4 * 4)):
        held = memory.as_strided(shape, strides).copy_(x)
        assert torch.equal(emulator.channel_mix(held, matrix, offset), expected)
        emulator.coupling(held, net_out, spec, out=held)
        assert torch.equal(held, expected_y)


def test_the_checks_of_memory_reject(emulator: Emulator) -> None:
    """assert_only_written finds what a kernel left out and what it wrote beside its output."""
    x = allocate("strided", (1, 2, 3), torch.float32)
    with pytest.raises(AssertionError, match="not written"):
        assert_only_written(x)
    x.fill_(1.0)
    assert_only_written(x)
    assert x._base is not None
    x._base[0, 0, 1] = 1.0
    with pytest.raises(AssertionError, match="beside"):
        assert_only_written(x)
