"""Couplings, alone and in one pass with a channel map: all scale maps and orders, nets' outputs in any form."""

from __future__ import annotations

import math

import pytest
import torch
from kernels.kernel_cases import (
    DTYPES,
    HALVES,
    MAPS,
    Case,
    Kernels,
    codes,
    dtypes,
    gathers,
    laid_out,
    layouts,
    maps,
    option,
    orders,
    shapes,
)
from support.covering import pairs
from torch import Tensor, float32, float64

from pyglow_fast.functional import ops
from pyglow_fast.reference import ORDERS, CouplingSpec

AFFINE = [spec._replace(order=order) for spec in MAPS if spec.coupling == "affine" for order in ORDERS]
# Of the net's output beside a state that is contiguous, and of both.
net_layouts = option("net_layout", ["same", "contiguous", "channels_last", "channels_last_slice"])
directions = option("inverse", [False, True])


@pairs(
    dtypes,
    shapes,
    maps,
    orders,
    layouts,
    net_layouts,
    gathers,
    option("added", [None, "contiguous", "same", "channels_last", "offset", "ragged_samples"]),
)
def test_every_pass(
    kernels: Kernels,
    shape: tuple[int, ...],
    spec: CouplingSpec,
    order: str,
    layout: str,
    net_layout: str,
    gathers: bool,
    added: str | None,
    dtype: torch.dtype,
) -> None:
    """A coupling by itself, from whose output alone come the gradients and the input again, and with a channel map.

    Those back are from the input of the pass forward, and from the output of a step.
    """
    spec = spec._replace(order=order)
    case = Case(kernels, shape, dtype, spec).in_layout(layout)
    if net_layout != "same":
        case = case.replaced(net_out=laid_out(case.net_out, net_layout))
    if added != "same":
        case = case.replaced(added=None if added is None else laid_out(case.added, added))
    if layout == "batch_innermost" and shape[0]:  # as a sum's gradient comes, one number that repeats
        case = case.replaced(grad_log_det=case.grad_log_det[:1].expand(shape[0]))
    case.check(case.coupling_calls(case.maps[int(gathers) :][:1]))
    inputs = (case.x, case.net_out, case.grad, case.grad_log_det, *codes(spec, gathers))
    grads, alone = (kernels("coupling_backward", *inputs, want) for want in (True, False))
    assert all(map(torch.equal, alone[:2], grads[:2]))
    assert alone[2].numel() == 0


# (N, C, H, W): C2 of 2, 5, 6, 10, 48, 76 and 130; one tile and several, ragged ones, samples within a tile and across
# two; several chunks of channels and several groups of them.
NET_SHAPES = [(3, 4, 4, 5), (1, 12, 20, 55), (5, 20, 6, 6), (1, 96, 8, 8), (2, 152, 3, 4), (1, 260, 2, 4)]
NET_SHAPES += [(2, 10, 9, 7)]
NETS = [(float32, float32), (float64, float64), *((float32, half) for half in HALVES)]


@pairs(option("shape", NET_SHAPES), option("net", NETS), maps, orders, option("kept", [None, 0, 1, 2, 3]))
def test_channels_last_nets(
    kernels: Kernels,
    shape: tuple[int, ...],
    net: tuple[torch.dtype, torch.dtype],
    spec: CouplingSpec,
    order: str,
    kept: int | None,
) -> None:
    """Beside a contiguous state; the halves begin and end anywhere."""
    dtype, net_dtype = net
    case = Case(kernels, shape, dtype, spec._replace(order=order))
    net_out = case.net_out
    if kept is not None and shape[1] < 50:  # other halves than those of the channels
        net_out = kernels.net_out((shape[0], 2 * (shape[1] - kept), *shape[2:]), spec, dtype)
    for layout in ("channels_last", "channels_last_slice"):
        given = case.replaced(net_out=laid_out(net_out.to(net_dtype), layout), added=laid_out(case.added, layout))
        given.check(given.coupling_calls(case.maps))


@pairs(option("half", HALVES), maps, orders, option("shape", [(2, 6, 5, 7), (1, 12, 40, 33), (2, 4, 20)]), layouts)
def test_16_bit_nets(
    kernels: Kernels, shape: tuple[int, ...], spec: CouplingSpec, order: str, layout: str, half: torch.dtype
) -> None:
    """A net's output enters as the float32 numbers that it is, and its gradient is rounded once: to the bit."""
    case = Case(kernels, shape, float32, spec._replace(order=order)).in_layout(layout)
    low = laid_out(case.net_out.to(half), layout)
    given = (case.replaced(net_out=net_out) for net_out in (low, laid_out(low.float(), layout)))
    narrow, wide = (each.of(each.coupling_calls(case.maps)) for each in given)
    assert half in {value.dtype for value in narrow}
    for got, expected in zip(narrow, wide, strict=True):
        assert torch.equal(got, expected.to(got.dtype))


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_every_16_bit_number(kernels: Kernels, half: torch.dtype) -> None:
    """All 65536 of them, NaN and infinities too, and floats of every exponent, ties among them, as torch has them."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(half)
    finite = numbers[numbers.isfinite()].float().sort().values
    ties = (finite[1:].double() + finite[:-1].double()).div(2).float()  # halfway between neighbours
    bits = torch.randint(-(2**31), 2**31, (20_000,), dtype=torch.int64).to(torch.int32).view(float32)
    wide = torch.cat(
        [ties, -ties, ties.nextafter(2 * ties), bits, torch.tensor([65504.0, 65519.9, 65520.0, 1e-8, 3e38])]
    )
    wide = wide[~wide.isnan()]
    additive = codes(CouplingSpec("additive"), False)
    for skipped in (0, 1):  # in vectors and one by one
        shift = numbers[skipped:].clone().reshape(1, 1, -1).to(kernels.device)
        out, _ = kernels("coupling", torch.zeros(shift.shape).to(shift.device), shift, *additive)
        assert torch.equal(out.nan_to_num(7.25), shift.float().nan_to_num(7.25))
        assert torch.equal(out.isnan(), shift.isnan())
        grad = wide[: wide.numel() // 4 * 4 - skipped].reshape(1, 1, -1).to(kernels.device)
        net_out = torch.zeros(grad.shape, dtype=half, device=kernels.device)
        found = kernels("coupling_backward", grad, net_out, grad, grad.new_zeros(1), *additive, False)[1]
        assert torch.equal(found.view(torch.int16), grad.to(half).view(torch.int16))


# ---- Precision ----


@pytest.mark.parametrize("spec", AFFINE, ids=str)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_value_loses_more_than_roundings(
    kernels: Kernels, spec: CouplingSpec, inverse: bool, dtype: torch.dtype
) -> None:
    """Of raw scales in [-60, 60], where s spans 50 orders of magnitude, each result has its own relative accuracy.

    Each raw scale has a sample of its own, so that its log s is seen. With positive numbers and no shift no difference
    cancels. exp(-2 |x|) of the tanh map loses the roundings of 2 |x|, 80 here.
    """
    raw = torch.linspace(-60.0, 60.0, 601, dtype=float64).to(kernels.device, dtype)
    net_out = torch.stack([torch.zeros_like(raw), raw], dim=1)[..., None]
    ones = torch.ones_like(net_out[:, :1])
    out, log_det = kernels("coupling", ones, net_out, *codes(spec, inverse))
    way = -1.0 if inverse else 1.0
    grads = kernels("coupling_backward", out, net_out, ones, way * ones[:, 0, 0], *codes(spec, inverse), True)
    log_scale, slope = exact_log_scale(raw.cpu().double(), spec)
    scale = (way * log_scale).exp()
    expected = {
        "out": (out, scale),
        "grad_in": (grads[0], scale),
        "grad_raw": (grads[1][:, 1:], slope * (way * scale + way * way) if not inverse else None),
        "recovered": (grads[2], torch.ones_like(scale)),
    }
    relative = 128 * torch.finfo(dtype).eps
    for name, (found, exact) in expected.items():
        if exact is None:
            continue
        error = (found.flatten().cpu().double() - exact).abs() / exact.abs().clamp(min=torch.finfo(dtype).tiny)
        assert float(error.max()) <= relative, f"{name}: {float(error.max()):.1e} at {raw[int(error.argmax())]}"
    lost = (log_det.cpu().double() - way * log_scale).abs()
    # log(s) of a sum with eps: where s is near 1 its rounding is all that there is.
    floor = torch.finfo(dtype).eps * (1.0 if spec.eps or spec.factor != 1.0 else 1e-20)
    assert bool((lost <= relative * log_scale.abs() + 4.0 * floor).all())


def exact_log_scale(raw: Tensor, spec: CouplingSpec) -> tuple[Tensor, Tensor]:
    """log s and its derivative in float64, by formulas in which nothing cancels."""
    if spec.scale_map == "sigmoid":
        z = raw + spec.bias
        scale = spec.factor * z.sigmoid() + spec.eps
        log_scale = scale.log() if spec.eps else math.log(spec.factor) + torch.nn.functional.logsigmoid(z)
        return log_scale, spec.factor * z.sigmoid() * (-z).sigmoid() / scale
    if spec.scale_map == "exp":
        return raw, torch.ones_like(raw)
    if spec.scale_map == "tanh":
        return spec.clamp * (raw / spec.clamp).tanh(), (raw / spec.clamp).cosh() ** -2
    return spec.clamp * 0.636 * raw.atan(), spec.clamp * 0.636 / (1.0 + raw.square())


@dtypes
def test_log_scale_survives_underflow(kernels: Kernels, dtype: torch.dtype) -> None:
    """sigmoid(-800) is zero in either dtype, its logarithm is -800."""
    net_out = torch.tensor([[[0.0], [-800.0]]], dtype=dtype, device=kernels.device)
    x = net_out.new_ones(1, 1, 1)
    for factor in (1.0, 2.0):
        spec = codes(CouplingSpec(bias=0.0, factor=factor), False)
        out, log_det = kernels("coupling", x, net_out, *spec)
        assert log_det.item() == torch.tensor(math.log(factor) - 800.0, dtype=dtype).item()
        grad = kernels("coupling_backward", out, net_out, 0.0 * x, x[:, 0, 0], *spec, False)[1]
        assert grad.flatten().tolist() == [0.0, 1.0]


@directions
def test_overflowing_scale_shows(kernels: Kernels, inverse: bool) -> None:
    """exp(100) is inf in float32: refused by the extension on the CPU, and an infinite log-det elsewhere."""
    x, net_out = torch.ones(3, 2, 4, device=kernels.device), torch.zeros(3, 2, 4, device=kernels.device)
    net_out[1, 1, 2] = 100.0
    spec = codes(CouplingSpec(scale_map="exp"), inverse)
    if kernels.home is ops and kernels.device.type == "cpu":
        for name, rest in (("coupling", ()), ("coupling_mix", (torch.eye(2), torch.zeros(2)))):
            with pytest.raises(ValueError, match=r"net_out: expected raw scales whose exp is finite.*sample 1"):
                kernels(name, x, net_out, *rest, *spec)
    else:
        assert kernels("coupling", x, net_out, *spec)[1].isinf().tolist() == [False, True, False]


def test_nan_comes_through(kernels: Kernels) -> None:
    """At the ragged end of a sample, too."""
    net_out = torch.zeros(2, 4, 37, device=kernels.device)
    net_out[1, 3, 36] = math.nan
    for name, rest in (("coupling", ()), ("coupling_mix", (torch.eye(4).to(net_out), torch.zeros(4).to(net_out)))):
        out, log_det = kernels(name, torch.zeros_like(net_out), net_out, *rest, *codes(CouplingSpec(), False))
        assert out[1, 3, 36].isnan()
        assert log_det.isnan().tolist() == [False, True]
