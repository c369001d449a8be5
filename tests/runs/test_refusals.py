"""What cannot work raises an error that says so; nothing of it gives a wrong gradient instead."""

from __future__ import annotations

import pytest
import torch
from support.chain_cases import chain
from support.gradients import Memory, batch, gradients, objective, perturbed
from support.user_steps import Scale, mixed
from torch import Tensor, nn

import pyglow_fast as pgf

MODES = [Memory("checkpoint"), Memory("reversible", 2), Memory("reversible", None)]


@pytest.mark.parametrize("fused", [True, False], ids=["steps", "modules"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_an_output_changed_before_the_backward(mode: Memory, fused: bool) -> None:
    """Refused, but where nothing needs it again: where states are kept it makes no difference."""
    sequence, x = chain(3) if fused else mixed(), batch()
    mode.apply(sequence)
    inputs = [x.requires_grad_(), *sequence.parameters()]
    z, log_det = sequence(x)
    expected = torch.autograd.grad(z.sum() + log_det.sum(), inputs)
    z, log_det = sequence(x)
    value = z.sum() + log_det.sum()
    with torch.no_grad():
        z.add_(1.0)
    if mode.mode == "checkpoint":
        torch.testing.assert_close(torch.autograd.grad(value, inputs), expected, rtol=0, atol=0)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(value, inputs)


class Closure(nn.Module):
    """A net that uses a tensor which is not its own."""

    def __init__(self, foreign: Tensor) -> None:
        super().__init__()
        self.conv, self.foreign = nn.Conv2d(2, 4, 1), [foreign]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.foreign[0]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("leaf", [True, False])
def test_a_net_that_closes_over_a_foreign_tensor(mode: Memory, leaf: bool) -> None:
    foreign = torch.randn(4, 1, 1, dtype=torch.float64, requires_grad=True)
    net = Closure(foreign if leaf else foreign.exp())
    for steps in ([pgf.FlowStep(4, net=net)], [Scale(), pgf.FlowStep(4, net=net)]):
        sequence = pgf.ReversibleSequence(steps).double().eval()
        mode.apply(sequence)
        value = objective(sequence(batch()))
        with pytest.raises(ValueError, match=r"net: expected no tensors that require a gradient but its parameters"):
            value.backward()
        foreign.requires_grad_(False) if leaf else None
        if leaf:
            objective(sequence(batch())).backward()
            foreign.requires_grad_(True)


@pytest.mark.parametrize("mode", [Memory("store"), *MODES], ids=str)
def test_a_foreign_tensor_in_a_frozen_run_keeps_its_gradient(mode: Memory) -> None:
    """Nothing of the run wants one, so that it is stored."""
    foreign = torch.ones((), dtype=torch.float64, requires_grad=True)
    sequence = pgf.ReversibleSequence([pgf.FlowStep(4, net=Closure(foreign))]).double().eval().requires_grad_(False)
    mode.apply(sequence)
    objective(sequence(batch())).backward()
    assert foreign.grad is not None
    assert bool(foreign.grad != 0)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_a_net_that_changes_as_it_runs(mode: Memory, fused: bool) -> None:
    """Spectral normalisation improves its estimate with every run in training: a second run is not the same."""
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 4, 1)), nn.Tanh())
    sequence = perturbed(pgf.ReversibleSequence([pgf.FlowStep(4, net=net), pgf.FlowStep(4, 5)])).double()
    if not fused:
        sequence = pgf.ReversibleSequence([*sequence, Scale()]).double()
    mode.apply(sequence)
    x = batch()
    sequence(x)
    value = objective(sequence(x))
    with pytest.raises(ValueError, match=r"net: expected buffers that a run leaves as they are .*_u"):
        value.backward()
    sequence.eval()
    Memory("store").apply(sequence)
    expected = gradients(sequence, x)
    mode.apply(sequence)
    torch.testing.assert_close(gradients(sequence, x), expected, rtol=1e-5, atol=1e-8)
