"""Monotone rational-quadratic splines: values, log-slopes and gradients, in every form, memory and direction."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernels.kernel_cases import DTYPES, HALVES, Kernels, dtypes, option
from support.covering import pairs
from support.helpers import assert_close, assert_equal, laid_out
from support.sparse_memory import SparseMemory
from torch import Tensor

from pyglow_fast import functional, reference
from pyglow_fast._core import backend
from pyglow_fast.functional import ops
from pyglow_fast.reference import SPLINE_FORMS, TAILS, SplineSpec

# No multiple of a vector, more elements than a tile, none, single ones, images, volumes.
SHAPES = [(37, 3), (5, 4, 6, 7), (2, 3, 1500), (0, 3), (1, 1), (2, 3, 2, 3, 5), (300, 2, 2)]
RAW_LAYOUTS = ("side by side", "number by number", "channels first", "every second")
forms, tails = option("form", SPLINE_FORMS), option("tails", TAILS)


def raw_of(kernels: Kernels, x: Tensor, count: int, layout: str, scale: float = 1.0) -> Tensor:
    """Numbers of each element of x in memory of that order."""
    if layout == "side by side":
        return scale * kernels.randn((*x.shape, count), x.dtype)
    if layout == "number by number":
        return (scale * kernels.randn((count, *x.shape), x.dtype)).movedim(0, -1)
    if layout == "channels first":  # of a net for images: (N, C P, *spatial), channel by channel
        n, c, *spatial = x.shape
        return (scale * kernels.randn((n, c * count, *spatial), x.dtype)).unflatten(1, (c, count)).movedim(2, -1)
    return (scale * kernels.randn((*x.shape, 2 * count), x.dtype))[..., ::2]


def values_of(kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype, spec: SplineSpec) -> Tensor:
    """Values in and beyond the interval, its ends among them; with no tails in it alone."""
    low, high = spec.interval
    x = kernels.randn(shape, dtype)
    x = x.sigmoid() if spec.tails == "none" else 0.7 * spec.bound * x
    if x.numel() > 2:
        x.view(-1)[0], x.view(-1)[1] = low, high
    return x


@pairs(
    dtypes,
    option("shape", SHAPES),
    option("layout", ["contiguous", "channels_last", "strided"]),
    option("raw_layout", RAW_LAYOUTS),
    forms,
    tails,
    option("bins", [2, 8, 10, 33]),
    option("inverse", [False, True]),
    option("from_output", [False, True]),
)
def test_against_the_reference(
    kernels: Kernels,
    shape: tuple[int, ...],
    layout: str,
    raw_layout: str,
    form: str,
    tails: str,
    bins: int,
    inverse: bool,
    from_output: bool,
    dtype: torch.dtype,
) -> None:
    """Values, log-slopes and gradients of both directions, from the input and from the output."""
    spec = SplineSpec(2.5, tails, form, gain=0.8, min_width=0.004, derivative_offset=0.3)
    x = laid_out(values_of(kernels, shape, dtype, spec), layout)
    raw = raw_of(kernels, x, 3 * bins + spec.extra, raw_layout, scale=0.5)  # slopes of 1/20 at least
    arguments = ops.spline_arguments(spec, inverse)
    kernels.check("spline", x, raw, *arguments)
    grad_y, grad_log_slope = kernels.randn(shape, dtype, layout), kernels.randn(shape, dtype)
    kernels.check("spline_backward", x, raw, grad_y, grad_log_slope, *arguments, from_output, True)


@option("dtype", HALVES)
@option("inverse", [False, True])
@option("raw_layout", RAW_LAYOUTS)
def test_numbers_of_16_bits(kernels: Kernels, raw_layout: str, inverse: bool, dtype: torch.dtype) -> None:
    """They count as float32 does; their gradients are rounded once."""
    x, arguments = kernels.randn((50, 3), torch.float32), ops.spline_arguments(SplineSpec(), inverse)
    raw = raw_of(kernels, x, 23, raw_layout).to(dtype)
    grads = kernels.randn(x.shape, x.dtype), kernels.randn(x.shape, x.dtype)
    assert_equal(*(kernels("spline", x, r, *arguments) for r in (raw, raw.float())))
    narrow, wide = (kernels("spline_backward", x, r, *grads, *arguments, False, True) for r in (raw, raw.float()))
    assert narrow[1].dtype == dtype
    assert torch.equal(narrow[1], wide[1].to(dtype))
    assert torch.equal(narrow[0], wide[0])


@forms
@tails
def test_there_and_back(kernels: Kernels, form: str, tails: str) -> None:
    """The inverse gives x again, and the negative log-slope, also at every knot and at the interval's ends."""
    spec = SplineSpec(tails=tails, form=form)
    raw = kernels.randn((40, 24 + spec.extra), torch.float64)
    low, high = spec.interval
    share = spec.min_width + (1.0 - 8 * spec.min_width) * raw[:, :8].softmax(-1)
    knots = (low + (high - low) * share.cumsum(-1)).clamp(low, high)
    x = torch.cat([knots, torch.full_like(knots[:, :1], low), torch.full_like(knots[:, :1], high)], 1)
    if tails != "none":
        beyond = x.new_tensor([low, high]).nextafter(2.0 * x.new_tensor([low, high])).expand(40, 2)
        x = torch.cat([x, beyond, 5.0 * beyond], 1)
    numbers = raw[:, None].expand(40, x.shape[1], -1)
    y, log_slope = kernels("spline", x, numbers, *ops.spline_arguments(spec, False))
    back, negative = kernels("spline", y, numbers, *ops.spline_arguments(spec, True))
    # An error of y is one of x by 1 / slope, of which the least here is about 1e-2 and its log-slope's slope 1e2.
    assert_close(back, x, condition=1000.0)
    assert_close(negative, -log_slope, condition=20000.0)
    if tails != "none":
        assert torch.equal(y[:, 10:], x[:, 10:])
        assert not log_slope[:, 10:].any()


@forms
@option("inverse", [False, True])
@option("tails", ["linear", "circular"])
def test_far_numbers(kernels: Kernels, form: str, inverse: bool, tails: str) -> None:
    """Of +-1e4 bins are as narrow as the least width allows, or have none, and values stay finite and monotone."""
    spec = SplineSpec(tails=tails, form=form)
    x = torch.linspace(-3.5, 3.5, 501, dtype=torch.float64, device=kernels.device)[None].repeat(8, 1)
    raw = 1e4 * kernels.randn((8, 24 + spec.extra), torch.float64)
    y, log_slope = kernels("spline", x, raw[:, None].expand(8, 501, -1), *ops.spline_arguments(spec, inverse))
    assert bool(y.isfinite().all())
    assert bool(log_slope.isfinite().all())
    assert bool((y.diff(dim=1) >= 0.0).all())


@forms
def test_the_inverse_is_stable(kernels: Kernels, form: str) -> None:
    """What it finds is the exact x of a y that is a few roundings away, also where a bin goes from flat to steep."""
    spec = SplineSpec(form=form)
    y, raw = 2.0 * kernels.randn((3000, 1), torch.float32), kernels.randn((3000, 1, 23), torch.float32)
    raw[..., 16:] *= 6.0
    x, _ = kernels("spline", y, raw, *ops.spline_arguments(spec, True))
    exact, log_slope = reference.spline(x.double(), raw.double(), spec)
    # A rounding of y, of a knot's y, and as many of x and a knot's x, which the slope makes larger.
    roundings = 4.0 * torch.finfo(torch.float32).eps * spec.bound * (1.0 + log_slope.exp())
    assert bool(((exact - y).abs() <= roundings).all())


@option("inverse", [False, True])
@option("bad", [math.nan, math.inf, -math.inf])
def test_bad_numbers_show(kernels: Kernels, bad: float, inverse: bool) -> None:
    """NaN or inf in any number of an element, or in its value, shows in it and in no other, and in its gradients."""
    count = 23
    x = kernels.randn((count + 3, 1), torch.float32)
    raw = kernels.randn((count + 3, 1, count), torch.float32)
    raw[torch.arange(count), 0, torch.arange(count)] = bad
    x[count] = bad
    x[0] = 100.0  # beyond the interval, where the numbers count for nothing
    arguments = ops.spline_arguments(SplineSpec(), inverse)
    y, log_slope = kernels("spline", x, raw, *arguments)
    assert (~log_slope[:count].isfinite()).all()
    assert (~y.isfinite()).flatten().tolist() == [True] * (count + 1) + [False] * 2
    grads = kernels("spline_backward", x, raw, x.new_ones(x.shape), x.new_ones(x.shape), *arguments, False, False)
    assert (~grads[0][:count].isfinite()).all()
    assert grads[0][-2:].isfinite().all()


def test_no_tails_give_nan_beyond(kernels: Kernels) -> None:
    x = torch.tensor([-1e-6, 0.0, 0.5, 1.0, 1.0 + 1e-6], device=kernels.device)[:, None]
    raw = kernels.randn((5, 1, 25), torch.float32)
    y, _ = kernels("spline", x, raw, *ops.spline_arguments(SplineSpec(tails="none"), False))
    assert y.isnan().flatten().tolist() == [True, False, False, False, True]


@pytest.mark.skipif(backend.extension() is None, reason=f"no extension: {backend.reason()}")
@option("dim", ["sample", "channel", "position"])
def test_numbers_beyond_32_bits(dim: str) -> None:
    """Elements, or the numbers of one, that are 2^31 elements apart."""
    near = torch.linspace(-1.0, 1.0, 2 * 5 * 3).sin().reshape(2, 5, 3)
    raw, x = SparseMemory(torch.float32).far(near, dim).movedim(1, -1), near[:, 0]
    arguments = ops.spline_arguments(SplineSpec(), False)
    assert_close(ops.spline(x, raw, *arguments), ops.spline(x, near.movedim(1, -1), *arguments), condition=2.0)
    found, exact = (ops.spline_backward(x, r, x, x, *arguments, False, False) for r in (raw, near.movedim(1, -1)))
    assert_close(found, exact, condition=2.0)


# ---- The function ----


@option("inverse", [False, True])
@forms
@tails
def test_gradients_by_differences(form: str, tails: str, inverse: bool, device: torch.device) -> None:
    kernels = Kernels(None, str(device))
    spec = SplineSpec(tails=tails, form=form)
    x = values_of(kernels, (6, 2), torch.float64, spec)[1:].clamp(spec.interval[0] + 0.01, spec.interval[1] - 0.01)
    raw = kernels.randn((5, 2, 15 + spec.extra), torch.float64)
    options: dict[str, Any] = {"tails": tails, "form": form, "inverse": inverse}
    leaves = (x.requires_grad_(), raw.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, raw: functional.spline(x, raw, **options), leaves, eps=1e-7, atol=1e-6)


def test_numbers_of_zero_are_the_identity(device: torch.device) -> None:
    """With the offset at which softplus and the least derivative make 1."""
    x = torch.linspace(-4.0, 4.0, 99, dtype=torch.float64, device=device)
    offset = math.log(math.expm1(1.0 - 1e-3))
    y, log_slope = functional.spline(x, x.new_zeros(99, 23), derivative_offset=offset)
    assert_close([y, log_slope], [x, torch.zeros_like(x)], condition=16.0)


def test_second_derivatives_are_refused(device: torch.device) -> None:
    if not ops.run_on(torch.empty(1, device=device)):
        pytest.skip("no extension")
    leaf = torch.zeros(3, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        functional.spline(leaf, torch.ones(3, 23, device=device))[0].sum(), leaf, create_graph=True
    )
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


GOOD = (torch.zeros(3, 2), torch.zeros(3, 2, 23))


@pytest.mark.parametrize(
    ("options", "raw", "message"),
    [
        ({"tails": "flat"}, GOOD[1], r"tails: expected one of \('linear', 'circular', 'none'\), found 'flat'"),
        ({"form": "hard"}, GOOD[1], "form: expected one of"),
        ({"bound": 0.0}, GOOD[1], "bound: expected a positive number, found 0.0"),
        ({"slope": 1.0}, GOOD[1], "slope: expected a number between 0 and 1, found 1.0"),
        ({"min_width": 0.2}, GOOD[1], "min_width: expected 0 to 1 / 8 with 8 bins, found 0.2"),
        (
            {},
            torch.zeros(3, 2, 24),
            r"raw: .* of 3 K-1 .* found 24 \(that of 8 bins with tails 'circular'\)",
        ),
        ({}, torch.zeros(3, 2, 2), "raw: expected a last dimension of 3 K-1 .*K from 2 to 64, found 2"),
        ({}, torch.zeros(3, 23), r"raw: expected shape \(3, 2, P\), found shape \(3, 23\)"),
    ],
)
def test_refused(options: dict[str, Any], raw: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        functional.spline(GOOD[0], raw, **options)


@pytest.mark.parametrize("beyond", [-0.1, 1.5])
def test_values_beyond_are_refused_where_there_are_no_tails(beyond: float) -> None:
    x = torch.tensor([0.5, beyond])
    with pytest.raises(ValueError, match=f"x: expected values from 0 to 1 with tails 'none', found {beyond}"):
        functional.spline(x, torch.zeros(2, 25), tails="none")


@option("dtype", DTYPES)
def test_any_shape(dtype: torch.dtype, device: torch.device) -> None:
    """A scalar, a vector, and numbers that many elements share."""
    raw = torch.linspace(-1.0, 1.0, 23, dtype=dtype, device=device)
    x = torch.linspace(-3.5, 3.5, 24, dtype=dtype, device=device)
    expected = reference.spline(x, raw.expand(24, 23))
    assert_close(list(functional.spline(x, raw.expand(24, 23))), list(expected), condition=100.0)
    for shape in ((), (24,), (2, 3, 4), (2, 3, 2, 2)):
        one = x[: math.prod(shape)].reshape(shape)
        y, log_slope = functional.spline(one, raw.expand(*shape, 23))
        assert y.shape == log_slope.shape == one.shape
        assert_close(y.flatten(), expected[0][: one.numel()], condition=100.0)
