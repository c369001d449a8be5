"""Raw scales over the whole range [-30, 30], where s spans 26 orders of magnitude: no value loses more than torch does.

An error next to large values would hide one next to small values, so the comparison is made per range of the raw scale:
s, and with it the values and the gradients, varies by less than exp(5) within one.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.covering import pairs
from support.helpers import assert_kernel_close, tolerance
from support.kernel_cases import DTYPES, SHAPES, SPECS, case_name, coupling_inputs, log_det_magnitude, mix_inputs
from torch import Tensor

from pyglow_fast import _backend, functional, reference
from pyglow_fast.reference import CouplingSpec

pytestmark = pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")
AFFINE = [spec for spec in SPECS if spec.coupling == "affine"]
RANGES = [(float(low), low + 5.0) for low in range(-30, 30, 5)]
# With more samples where there are few values: of a handful torch may by luck lose nothing, and then it is no measure.
FILLED = [(shape[0] * max(1, 4000 // math.prod(shape)), *shape[1:]) for shape in SHAPES if math.prod(shape)]


def _inputs(shape: tuple[int, ...], spec: CouplingSpec, device: torch.device) -> list[Tensor]:
    """x, and a net's output whose raw scales cover [-30, 30] evenly."""
    x, net_out = coupling_inputs(shape, spec, torch.float32, device)
    shift, raw = net_out.chunk(2, dim=1)
    return [x, torch.cat([shift, 60.0 * torch.rand_like(raw) - 30.0], dim=1)]


def _run(library: object, name: str, inputs: list[Tensor], spec: CouplingSpec, dtype: torch.dtype) -> list[Tensor]:
    """Of the transformed channels: the output, the gradients of input, shift and raw, and a bound of that of log s.

    Then log_det.
    """
    leaves = [value.detach().to(dtype).requires_grad_() for value in inputs]
    out, log_det = getattr(library, name)(*leaves, spec)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(value.shape, generator=generator).to(value) for value in (out, log_det)]
    grad_x, grad_net_out = torch.autograd.grad((out, log_det), leaves, grads)
    transformed = leaves[1].shape[1] // 2
    value, grad_value = out[:, -transformed:].detach(), grads[0][:, -transformed:]
    shift, per_sample = leaves[1][:, :transformed].detach(), [-1, *[1] * (out.dim() - 1)]
    grad_log_scale = grad_value.abs() * (value.abs() + shift.abs()) + grads[1].abs().reshape(per_sample)
    return [value, grad_x[:, -transformed:], *grad_net_out.chunk(2, dim=1), grad_log_scale, log_det]


def _cancelling(name: str, spec: CouplingSpec, raw: Tensor, grad_log_scale: Tensor) -> Tensor | None:
    """The terms of the gradient of raw, where it is a difference that cancels.

    The kernels form the gradient of log s from the output, which has the shift still in it in the inverse of
    "shift_scale" and in "scale_shift".
    """
    if (name == "coupling_inverse") == (spec.order == "scale_shift"):
        return None
    leaf = raw.double().requires_grad_()
    (slope,) = torch.autograd.grad(reference.scale_and_log(leaf, spec)[1].sum(), leaf)
    return grad_log_scale * slope


def assert_close_by_range(
    got: list[Tensor], plain: list[Tensor], exact: list[Tensor], raw: Tensor, cancels: Tensor | None = None
) -> None:
    """:func:`helpers.assert_kernel_close` on the values of each range of raw.

    ``cancels``: the size of the terms of the last of them, if it is a difference that cancels.
    """
    for low, high in RANGES:
        inside = (raw >= low) & (raw < high)
        if not inside.any():
            continue
        for index, (actual, in_torch, truth) in enumerate(zip(got, plain, exact, strict=True)):
            last = cancels is not None and index == len(exact) - 1
            magnitude = float(cancels[inside].max()) if cancels is not None and last else 0.0
            assert_kernel_close(actual[inside], in_torch[inside], truth[inside], magnitude)


@pairs(
    pytest.mark.parametrize("shape", FILLED, ids=case_name),
    pytest.mark.parametrize("spec", AFFINE, ids=case_name),
    pytest.mark.parametrize("name", ["coupling", "coupling_inverse"]),
)
def test_error_is_at_most_twice_that_of_torch(
    name: str, spec: CouplingSpec, shape: tuple[int, ...], device: torch.device
) -> None:
    inputs = _inputs(shape, spec, device)
    raw = inputs[1].chunk(2, dim=1)[1]
    got = _run(functional, name, inputs, spec, torch.float32)
    plain = _run(reference, name, inputs, spec, torch.float32)
    exact = _run(reference, name, inputs, spec, torch.float64)
    assert all(value.isfinite().all() for value in exact)
    assert_close_by_range(got[:4], plain[:4], exact[:4], raw, _cancelling(name, spec, raw, exact[4]))
    assert_kernel_close(got[-1], plain[-1], exact[-1], log_det_magnitude(inputs[1], spec))


@pytest.mark.parametrize("spec", AFFINE, ids=case_name)
@pytest.mark.parametrize("name", ["coupling_mix", "coupling_mix_inverse"])
def test_fused_with_the_mixing(name: str, spec: CouplingSpec, device: torch.device) -> None:
    """One pass, without gradients: the mixing adds up values of all sizes, so they are compared all together."""
    for shape in FILLED:
        x, net_out = _inputs(shape, spec, device)
        _, matrix, offset = mix_inputs(shape, torch.float32, device)
        inputs = [x, net_out, matrix, torch.zeros_like(offset)]
        with torch.no_grad():
            got = getattr(functional, name)(*inputs, spec)
            plain = getattr(reference, name)(*inputs, spec)
            exact = getattr(reference, name)(*(value.double() for value in inputs), spec)
        assert_kernel_close(got[0], plain[0], exact[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=case_name)
@pytest.mark.parametrize("name", ["coupling", "coupling_inverse"])
def test_slope_of_tanh_in_the_tails(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """1 - tanh^2 cancels, to zero from |raw| = 9 clamp on in float32; the gradient of raw keeps its relative accuracy.

    As long as the dtype has such small numbers, and with nothing on the way that overflows.
    """
    spec = CouplingSpec(scale_map="tanh", clamp=1.5)
    raw = torch.linspace(-100.0, 100.0, 401, dtype=dtype, device=device)
    net_out = torch.stack([torch.zeros_like(raw), raw])[None].requires_grad_()
    _, log_det = getattr(functional, name)(torch.zeros_like(net_out[:, :1]), net_out, spec)
    (gradient,) = torch.autograd.grad(log_det.sum(), net_out)
    slope = gradient[0, 1] if name == "coupling" else -gradient[0, 1]
    x = raw.double() / spec.clamp
    relative = tolerance(condition=2.0 * float(x.abs().max()), dtype=dtype)  # exp(-2 |x|) loses the roundings of 2 |x|
    torch.testing.assert_close(slope.double(), x.cosh() ** -2, rtol=relative, atol=torch.finfo(dtype).tiny)


def test_an_error_at_small_values_is_found() -> None:
    """A thousandth of a value near exp(-28) passes beside values near exp(28), and not in its own range."""
    raw = torch.linspace(-29.9, 29.9, 64)
    exact = raw.double().exp()
    plain = exact.float()
    wrong = torch.where(raw < -25.0, 1.001 * plain, plain)
    assert_kernel_close(wrong, plain, exact)
    assert_close_by_range([plain], [plain], [exact], raw)
    with pytest.raises(AssertionError):
        assert_close_by_range([wrong], [plain], [exact], raw)


@pytest.mark.parametrize("shape", [(2, 12, 33, 40), (2, 48, 16, 12), (4, 130, 3, 5)], ids=case_name)
def test_offset_costs_no_precision(shape: tuple[int, ...], device: torch.device) -> None:
    """The offset is added to the finished sum: in front of it every rounding would be one of the offset's size."""
    x, matrix, offset = mix_inputs(shape, torch.float32, device)
    exact = reference.channel_mix(x.double(), matrix.double(), offset.double())
    error, plain = (
        float((library.channel_mix(x, matrix, offset).double() - exact).square().mean().sqrt())
        for library in (functional, reference)
    )
    assert error <= 2.0 * plain, f"root mean square error {error:.2e}, plain torch {plain:.2e}"
