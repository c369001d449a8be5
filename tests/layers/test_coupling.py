"""Coupling, of halves of the channels and of checkerboards, and the injector: what nets see, formulas and starts.

Laws are in contract/test_laws.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.bijections import softplus_scale
from support.covering import pairs
from support.gradients import perturbed
from support.helpers import assert_close, assert_equal
from support.plain_glow import checkerboard, masked_coupling
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast.reference import COUPLINGS, ORDERS, SCALE_MAPS, CouplingSpec

SHAPES = [(3, 4, 6), (1, 6, 5), (2, 8), (2, 4, 3, 2)]


class Given(nn.Module):
    """A net that returns what it is told to, and remembers what it was given."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out, self.seen = out, []

    def forward(self, *inputs: Tensor) -> Tensor:
        self.seen.append(inputs)
        return self.out


@pairs(
    pytest.mark.parametrize("parity", [0, 1]),
    pytest.mark.parametrize("shape", SHAPES, ids=str),
    pytest.mark.parametrize("order", ORDERS),
    pytest.mark.parametrize("coupling", COUPLINGS),
    pytest.mark.parametrize("scale_map", [*SCALE_MAPS, softplus_scale], ids=lambda f: getattr(f, "__name__", f)),
)
def test_is_the_masked_formula(
    scale_map: str, coupling: str, order: str, shape: tuple[int, ...], parity: int, device: torch.device
) -> None:
    """Values, log-det, the inverse, and gradients; the kept positions to the bit, whatever the net says of them."""
    outputs = shape[0] * (2 if coupling == "affine" else 1)
    x = torch.randn(2, *shape, dtype=torch.float64, device=device, requires_grad=True)
    out = torch.randn(2, outputs, *shape[1:], dtype=torch.float64, device=device, requires_grad=True)
    layer = pgf.Coupling(Given(out), coupling, scale_map, 1.5, 0.25, 0.75, order, mask="checkerboard", parity=parity)
    z, log_det = layer(x)
    spec = CouplingSpec(coupling, scale_map, 1.5, 0.25, 0.75, order)
    plain, plain_log_det = masked_coupling(x, out, spec, parity)
    assert_close(z, plain)
    assert_close(log_det, plain_log_det, condition=6.0)
    kept = checkerboard(x, parity).expand_as(x) == 1
    assert torch.equal(z[kept], x[kept])
    assert_close(layer.inverse(z.detach())[0], x, condition=10.0)
    layer.net.out = out.detach().masked_fill(checkerboard(x, parity) == 1, float("nan"))
    assert all(map(torch.equal, layer(x), (z, log_det)))
    weight = torch.randn_like(x)
    losses = [(weight * a).sum() + b.square().sum() for a, b in ((z, log_det), (plain, plain_log_det))]
    assert_close(*(torch.autograd.grad(loss, (x, out), retain_graph=True) for loss in losses), condition=100.0)


@pytest.mark.parametrize("mask", ["channels", "checkerboard"])
@pytest.mark.parametrize("parity", [0, 1])
def test_the_net_sees_what_is_kept_and_the_condition_as_it_is(mask: str, parity: int) -> None:
    x, cond = torch.randn(2, 4, 4, 5), torch.randn(2, 7, 4, 5)
    kept = x[:, :2] if mask == "channels" else checkerboard(x, parity) * x
    net = Given(torch.zeros(2, 2 * kept.shape[1], 4, 5))
    layer = pgf.Coupling(net, mask=mask, parity=parity if mask == "checkerboard" else 0)
    layer(x)
    z, _ = layer(x, cond)
    layer.inverse(z, cond)
    assert [len(inputs) for inputs in net.seen] == [1, 2, 2]
    assert all(torch.equal(inputs[0], kept) for inputs in net.seen)
    assert all(torch.equal(inputs[1], cond) for inputs in net.seen[1:])


@pairs(
    pytest.mark.parametrize("actnorm", [False, True]),
    pytest.mark.parametrize("coupling", ["affine", "additive"]),
    pytest.mark.parametrize(
        ("scale_map", "at_zero"), [("sigmoid", torch.tensor(2.0).sigmoid()), ("exp", 1.0), ("tanh", 1.0), ("atan", 1.0)]
    ),
)
def test_fresh_is_the_identity_up_to_its_constant_scale(
    coupling: str, scale_map: str, at_zero: float, actnorm: bool
) -> None:
    net = pgf.CouplingNet(2, 4 if coupling == "affine" else 2, 8, actnorm=actnorm)
    x = torch.randn(3, 4, 2, 5)
    layer = pgf.Coupling(net, coupling, scale_map)
    z, log_det = layer(x)
    assert not net.log_gain.any()
    scale = torch.as_tensor(1.0 if coupling == "additive" else at_zero)
    assert torch.equal(z[:, :2], x[:, :2])
    assert_close(z[:, 2:], x[:, 2:] * scale)
    assert_close(log_det, (20.0 * scale.log()).expand(3), condition=20.0)


@pytest.mark.parametrize("mask", ["channels", "checkerboard"])
def test_hidden_actnorms_are_initialised_from_what_the_net_sees(mask: str) -> None:
    """By the first forward or by ``initialize``, and by no inverse."""

    def build() -> pgf.Coupling:
        width = 2 if mask == "channels" else 4
        net = pgf.CouplingNet(width, 2 * width, 5, actnorm=True, cond_channels=1)
        return pgf.Coupling(net, mask=mask, parity=int(mask == "checkerboard"))

    layer, twin, third = build(), build(), build()
    for other in (twin, third):
        other.load_state_dict(layer.state_dict())
    x, cond = 2.0 * torch.randn(4, 4, 4, 3) + 1.0, torch.randn(4, 1, 4, 3)
    layer.inverse(x, cond)
    assert not layer.net.is_initialized
    z, _ = layer(x, cond)
    twin.net.initialize(x[:, :2] if mask == "channels" else checkerboard(x, 1) * x, cond)
    assert torch.equal(third.initialize(x, cond), z)
    for other in (twin, third):
        assert_equal(layer.state_dict(), other.state_dict())


# ---- The injector, and states taken between steps ----

X, COND = torch.randn(2, 4, 3, 5, dtype=torch.float64), torch.randn(2, 3, 3, 5, dtype=torch.float64)


def moved(layer: nn.Module) -> Any:
    """Initialised, and away from where it starts."""
    layer.double()
    layer.initialize(torch.randn(16, 4, 3, 5, dtype=torch.float64), torch.randn(16, 3, 3, 5, dtype=torch.float64))
    return perturbed(layer)


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
    assert_close(*found, condition=10.0)


@pytest.mark.parametrize("at", [(4,), (2, 1), (1, 1), (-1,), (7,), 1, (0.5,)])
def test_steps_that_there_are_not(at: Any) -> None:
    with pytest.raises(ValueError, match=r"at: expected (ascending numbers of steps in 0\.\.3|a sequence of ints)"):
        pgf.ReversibleSequence([pgf.FlowStep(4, 6) for _ in range(5)]).intermediates(X, None, at)
