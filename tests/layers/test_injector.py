"""AffineInjector, steps without a coupling, and states taken between steps. Laws are in contract/test_laws.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.gradients import perturbed
from support.helpers import assert_close
from torch import nn

import pyglow_fast as pgf
from pyglow_fast.reference import CouplingSpec

X, COND = torch.randn(2, 4, 3, 5, dtype=torch.float64), torch.randn(2, 3, 3, 5, dtype=torch.float64)


def moved(layer: nn.Module, spread: float = 0.1) -> nn.Module:
    """Initialised, and away from where it starts."""
    layer.double()
    layer.initialize(torch.randn(16, 4, 3, 5, dtype=torch.float64), torch.randn(16, 3, 3, 5, dtype=torch.float64))
    perturbed(layer, spread)
    return layer


@pytest.mark.parametrize("order", ["shift_scale", "scale_shift"])
def test_the_condition_alone_shifts_and_scales_every_channel(order: str) -> None:
    spec = CouplingSpec(bias=1.0, eps=0.1, order=order)
    layer = moved(pgf.AffineInjector(4, 3, 6, net_actnorm=True, spec=spec))
    shift, raw = layer.net(COND).chunk(2, dim=1)
    scale = torch.sigmoid(raw + 1.0) + 0.1
    z, log_det = layer(X, COND)
    assert_close(z, (X + shift) * scale if order == "shift_scale" else X * scale + shift)
    assert_close(log_det, scale.log().sum((1, 2, 3)))
    other = torch.randn_like(X)
    assert_close(layer(other, COND)[1], log_det)  # it knows nothing of x


def test_actnorms_of_the_net_start_from_the_condition() -> None:
    layer = pgf.AffineInjector(4, 3, 6, net_actnorm=True).double()
    layer(X, COND)
    hidden, _ = layer.net.norm1(layer.net.conv1(COND))
    assert float(hidden.mean((0, 2, 3)).detach().abs().max()) < 1e-12
    # Of the 1e-6 that is added to the standard deviation.
    assert float((hidden.var((0, 2, 3), correction=0) - 1.0).detach().abs().max()) < 1e-4


@pytest.mark.parametrize("memory", ["store", "checkpoint", "reversible"])
def test_a_condition_that_wants_no_gradient_changes_none(memory: str) -> None:
    """Then the gradient of what the injector reads is not computed; the others are what they were."""
    steps = [pgf.FlowStep(4, 6, cond_channels=3, net_actnorm=True, injector=True) for _ in range(3)]
    sequence = moved(pgf.ReversibleSequence(steps, memory))
    found = []
    for wanted in (True, False):
        z, log_det = sequence(X, COND.clone().requires_grad_(wanted))
        found.append(torch.autograd.grad(z.square().sum() + log_det.sum(), list(sequence.parameters())))
    for with_condition, without in zip(*found, strict=True):
        assert_close(without, with_condition, 10.0)


@pytest.mark.parametrize("at", [(4,), (2, 1), (1, 1), (-1,), (7,), 1, (0.5,)])
def test_steps_that_there_are_not(at: Any) -> None:
    with pytest.raises(ValueError, match=r"at: expected (ascending numbers of steps in 0\.\.3|a sequence of ints)"):
        pgf.ReversibleSequence([pgf.FlowStep(4, 6) for _ in range(5)]).intermediates(X, None, at)
