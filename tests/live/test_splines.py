"""Splines in float64 against nflows, normflows and zuko: values, log-slopes and gradients, both ways."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from live.peers import load
from torch import Tensor

from pyglow_fast import functional

nflows = load("nflows.transforms.splines.rational_quadratic")
normflows = load("normflows.utils.splines")
zuko = load("zuko.transforms")
Spline = Callable[..., tuple[Tensor, Tensor]]
BINS, BOUND = 8, 3.0


def by_nflows(x: Tensor, raw: Tensor, inverse: bool, tails: str) -> tuple[Tensor, Tensor]:
    widths, heights, derivatives = raw[..., :BINS], raw[..., BINS : 2 * BINS], raw[..., 2 * BINS :]
    if tails == "none":
        found: tuple[Tensor, Tensor] = nflows.rational_quadratic_spline(x, widths, heights, derivatives, inverse)
        return found
    spline = nflows.unconstrained_rational_quadratic_spline
    found = spline(x, widths, heights, derivatives, inverse, tails=tails, tail_bound=BOUND)
    return found


def by_normflows(x: Tensor, raw: Tensor, inverse: bool, tails: str) -> tuple[Tensor, Tensor]:
    derivatives = raw[..., 2 * BINS :]  # a circle's last one is passed and overwritten
    derivatives = torch.cat([derivatives, derivatives[..., :1]], -1) if tails == "circular" else derivatives
    spline = normflows.unconstrained_rational_quadratic_spline
    arguments = (x, raw[..., :BINS], raw[..., BINS : 2 * BINS], derivatives, inverse)
    found: tuple[Tensor, Tensor] = spline(*arguments, tails=tails, tail_bound=BOUND)
    return found


def by_zuko(x: Tensor, raw: Tensor, inverse: bool, tails: str) -> tuple[Tensor, Tensor]:
    parts = raw[..., :BINS], raw[..., BINS : 2 * BINS], raw[..., 2 * BINS :]
    spline = zuko.MonotonicRQSTransform(*parts, bound=BOUND)
    found: tuple[Tensor, Tensor] = (spline.inv if inverse else spline).call_and_ladj(x)
    return found


CASES = {
    "nflows": (by_nflows, "linear", "softmax"),
    "nflows without tails": (by_nflows, "none", "softmax"),
    "normflows": (by_normflows, "linear", "softmax"),
    "normflows on a circle": (by_normflows, "circular", "softmax"),
    "zuko": (by_zuko, "linear", "softclip"),
}


def results(spline: Spline, x: Tensor, raw: Tensor) -> list[Tensor]:
    leaves = x.detach().requires_grad_(), raw.detach().requires_grad_()
    y, log_slope = spline(*leaves)
    weights = torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view_as(x)
    return [y, log_slope, *torch.autograd.grad((y * weights).sum() + (log_slope * weights.flip(0)).sum(), leaves)]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equal(case: str, inverse: bool) -> None:
    """Within 1e-11 of the largest value, or of 1."""
    peer, tails, form = CASES[case]
    x = 1.5 * torch.randn(2000, dtype=torch.float64)
    x = x.sigmoid() if tails == "none" else x
    raw = torch.randn(2000, 3 * BINS + {"linear": -1, "circular": 0, "none": 1}[tails], dtype=torch.float64)
    options: dict[str, Any] = {"bound": BOUND, "tails": tails, "form": form, "inverse": inverse}
    ours = results(partial(functional.spline, **options), x, raw)
    theirs = results(partial(peer, inverse=inverse, tails=tails), x, raw)
    for name, found, expected in zip(("y", "log_slope", "x's", "raw's"), ours, theirs, strict=True):
        error = (found - expected).abs().max() / expected.abs().max().clamp(min=1.0)
        assert error < 1e-11, f"{name}: {error:.1e}"


@pytest.mark.parametrize("case", ["nflows", "normflows", "zuko"])
def test_equal_at_ends_and_knots(case: str) -> None:
    """At knots, at and beyond +-B, also with numbers of 1e4: within 1e-11, or what roundings of a knot make."""
    peer, tails, form = CASES[case]
    raw = torch.randn(50, 1, 3 * BINS - 1, dtype=torch.float64)
    raw[:10] *= 1e4
    shares = 1e-3 + (1 - BINS * 1e-3) * raw[..., :BINS].softmax(-1)
    knots = -BOUND + 2 * BOUND * shares.cumsum(-1)[:, 0, :-1]
    ends = knots.new_tensor([-BOUND, BOUND, -BOUND - 1e-9, BOUND + 1e-9, -40.0, 40.0]).expand(50, 6)
    x = torch.cat([knots, ends], 1)
    numbers = raw.expand(50, x.shape[1], -1)
    ours = functional.spline(x, numbers, bound=BOUND, form=form)
    ulps = 8 * torch.finfo(torch.float64).eps * BOUND
    below, theirs, above = (peer(x + moved, numbers, inverse=False, tails=tails) for moved in (-ulps, 0.0, ulps))
    assert all(bool(found.isfinite().all()) for found in ours)
    for found, expected, *beside in zip(ours, theirs, below, above, strict=True):
        allowed = 1e-11 + sum((expected - other).abs().nan_to_num(torch.inf) for other in beside)
        well = raw[:, :, 0].abs() < 100.0
        assert bool(((found - expected).abs() <= allowed).all())
        assert float(torch.where(well, allowed, 0.0)[:, : BINS - 1].max()) < 1e-9
