"""FlowStep: the folded step is its layers one after the other, and is initialised in their order."""

from __future__ import annotations

import copy

import pytest
import torch
from support.covering import pairs
from support.helpers import assert_close
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast.functional import CouplingSpec
from pyglow_fast.layers.flow_step import PERMUTATIONS


def trained(step: nn.Module, x: Tensor, cond: Tensor | None = None) -> nn.Module:
    step.to(x.dtype)(x, cond)
    with torch.no_grad():
        for parameter in step.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return step


def in_order(step: pgf.FlowStep, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """ActNorm, permutation, coupling, each by itself."""
    x, first = step.actnorm(x)
    x, second = step.permutation(x)
    x, third = step.coupling(x, cond)
    return x, first + second + third


@pairs(
    pytest.mark.parametrize("permutation", PERMUTATIONS),
    pytest.mark.parametrize("coupling", ["affine", "additive"]),
    pytest.mark.parametrize("mask", ["channels", "checkerboard"]),
)
def test_is_its_layers_in_order(permutation: str, coupling: str, mask: str) -> None:
    x = 2.0 * torch.randn(16, 4, 4, 5, dtype=torch.float64) + 1.0
    step = trained(pgf.FlowStep(4, 6, coupling, permutation, mask=mask), x)
    z, log_det = step(x)
    expected, expected_log_det = in_order(step, x)
    assert_close(z, expected, condition=100.0)
    assert_close(log_det, expected_log_det, condition=100.0)


@pytest.mark.parametrize("first", PERMUTATIONS)
@pytest.mark.parametrize("second", PERMUTATIONS)
def test_a_run_is_its_steps_in_order(first: str, second: str) -> None:
    """Folded in one batch, where maps of steps without a coupling are part of the next step's."""
    x = 2.0 * torch.randn(16, 4, 4, 5, dtype=torch.float64) + 1.0
    kinds = [("affine", first), ("none", first), ("none", second), ("affine", first), ("none", second), ("none", first)]
    run = pgf.ReversibleSequence([pgf.FlowStep(4, 6, coupling, kind) for coupling, kind in kinds]).double()
    trained(run, x)
    expected, total = x, x.new_zeros(16)
    for step in run:
        expected, log_det = step(expected)
        total = total + log_det
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            z, log_det = run(x)
            assert_close(z, expected, condition=100.0)
            assert_close(log_det, total, condition=1000.0)
            assert_close(run.inverse(expected)[0], x, condition=1000.0)


def test_initialises_in_order() -> None:
    x, cond = 2.0 * torch.randn(8, 4, 3, 5, dtype=torch.float64) + 1.0, torch.randn(8, 1, 3, 5, dtype=torch.float64)
    step = pgf.FlowStep(4, 6, net_actnorm=True, cond_channels=1).double()
    one_by_one = copy.deepcopy(step)
    in_order(one_by_one, x, cond)
    by_call = copy.deepcopy(step)
    z = by_call.initialize(x, cond)
    step(x, cond)
    for name, value in one_by_one.state_dict().items():
        assert_close(step.state_dict()[name].double(), value.double(), condition=10.0)
        assert_close(by_call.state_dict()[name].double(), value.double(), condition=10.0)
    assert_close(z, step(x, cond)[0])
    assert not z.requires_grad
    assert step.actnorm.is_initialized
    assert step.coupling.net.is_initialized


def test_fresh_step_keeps_the_moments() -> None:
    # ActNorm to mean 0 and variance 1, a rotation, and a coupling that only scales its half by sigmoid(2).
    x = 5.0 * torch.randn(64, 4, 4, 4, dtype=torch.float64) - 3.0
    z, _ = pgf.FlowStep(4, 6).double()(x)
    scale = torch.tensor([1.0, 1.0, torch.tensor(2.0).sigmoid(), torch.tensor(2.0).sigmoid()], dtype=torch.float64)
    whitened = z.transpose(0, 1).flatten(1) / scale[:, None]
    assert_close(whitened.mean(1), torch.zeros(4).double(), condition=10.0)
    assert float(whitened.detach().square().mean()) == pytest.approx(1.0, abs=1e-5)  # std / (std + 1e-6)


KEYWORDS = {"scale_map": "tanh", "scale_bias": 1.5, "scale_eps": 0.1, "scale_clamp": 1.25, "order": "scale_shift"}


@pytest.mark.parametrize("coupling", ["affine", "additive"])
def test_the_older_keywords_are_the_fields_of_a_spec(coupling: str) -> None:
    spec = CouplingSpec(coupling, "tanh", bias=1.5, eps=0.1, clamp=1.25, order="scale_shift")
    torch.manual_seed(0)
    step = pgf.FlowStep(4, 5, coupling=spec, precision="fp32", border=True)
    torch.manual_seed(0)
    older = pgf.FlowStep(4, 5, coupling, precision="fp32", border=True, **KEYWORDS)
    assert step.coupling.spec == older.coupling.spec == spec
    assert step.coupling.precision == older.coupling.precision == "fp32"
    assert list(step.state_dict()) == list(older.state_dict())
    x = torch.randn(3, 4, 2, 2)
    for got, expected in zip(step(x), older(x), strict=True):
        assert torch.equal(got, expected)
