"""Steps are joined, and nets run by their weights, only where that changes nothing: hooks and methods have a say."""

from __future__ import annotations

import pytest
import torch
from support.covering import pairs
from support.gradients import Memory, both_ways, objective, perturbed
from torch import Tensor, nn

import pyglow_fast as pgf
from bench.memory_meter import peak_tensor_bytes
from pyglow_fast.layers import CouplingNet

MODES = [Memory("store"), Memory("checkpoint"), Memory("reversible")]


class Doubles:
    """What makes a layer give twice as much."""

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = super().forward(x, cond)  # type: ignore[misc]
        return 2.0 * z, log_det + z[0].numel() * torch.tensor(2.0).log()

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = super().inverse(0.5 * z, cond)  # type: ignore[misc]
        return x, log_det - z[0].numel() * torch.tensor(2.0).log()


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("part", ["step", "coupling"])
def test_overridden_methods(part: str, mode: Memory) -> None:
    plain = pgf.FlowStep(4, 5)
    nn.init.normal_(plain.coupling.net.conv3.weight, std=0.2)
    kind = pgf.FlowStep if part == "coupling" else type("Doubled", (Doubles, pgf.FlowStep), {})
    step = kind(4, 5)
    if part == "coupling":
        step.coupling = type("Doubled", (Doubles, pgf.Coupling), {})(step.coupling.net)
    step.load_state_dict(plain.state_dict())
    sequence = pgf.ReversibleSequence([step, pgf.FlowStep(4, 5)]).double()
    sequence.initialize(torch.randn(4, 4, 6, 6, dtype=torch.float64))
    mode.apply(sequence)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    plain.double().load_state_dict(step.state_dict())
    assert torch.allclose(step(x)[0], 2.0 * plain(x)[0], rtol=1e-10, atol=1e-10)
    z, log_det = x, 0.0
    for one in sequence:
        z, step_log_det = one(z)
        log_det = log_det + step_log_det
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got, got_log_det = sequence(x)
            assert torch.allclose(got, z, rtol=1e-10, atol=1e-10)
            assert torch.allclose(got_log_det, log_det, rtol=1e-10, atol=1e-10)
            assert torch.allclose(sequence.inverse(got)[0], x, rtol=1e-8, atol=1e-8)


@pytest.mark.full
@pytest.mark.parametrize("wants", [False, True])
@pytest.mark.parametrize("user", [False, True])
def test_a_condition_costs_no_memory_by_depth(user: bool, wants: bool) -> None:
    def peak(depth: int) -> tuple[int, int]:
        steps: list[nn.Module] = [pgf.FlowStep(12, 8, cond_channels=12) for _ in range(depth)]
        sequence = pgf.ReversibleSequence([*steps, pgf.InvConv(12)] if user else steps, anchor_every=4, tolerance=1e-3)
        x, cond = torch.randn(2, 12, 32, 32), torch.randn(2, 12, 32, 32)
        sequence.initialize(x, cond)
        for parameter in sequence.parameters():
            parameter.grad = torch.zeros_like(parameter)
        value = objective(sequence(x, cond.requires_grad_(wants)))
        return peak_tensor_bytes(value.backward), sum(parameter.nbytes for parameter in sequence.parameters())

    (less, few), (more, many) = peak(8), peak(32)
    # What is added to others exists twice: the gradients of a part, here of all steps. A condition is a state as well.
    state = 4 * 2 * 12 * 32 * 32
    assert more - less <= many - few + state


def sequence_of(coupling: str = "affine") -> pgf.ReversibleSequence:
    sequence = pgf.ReversibleSequence([pgf.FlowStep(4, 8, coupling) for _ in range(3)])
    sequence.initialize(torch.randn(8, 4, 5, 5))
    return perturbed(sequence, 0.05)


@both_ways
@pairs(
    pytest.mark.parametrize("grad", [True, False]),
    pytest.mark.parametrize("mode", MODES, ids=str),
    pytest.mark.parametrize(("coupling", "width"), [("affine", 6), ("affine", 2), ("additive", 4)]),
)
def test_a_net_of_another_width_is_refused(coupling: str, width: int, mode: Memory, grad: bool) -> None:
    """Kernels would take other channels for the transformed ones."""
    sequence, x = sequence_of(coupling=coupling), torch.randn(3, 4, 6, 6)
    mode.apply(sequence)
    sequence[1].coupling.net = CouplingNet(2, width, 8)
    given = 4 if coupling == "affine" else 2
    expected = rf"net: expected an output of shape \(3, {given}, 6, 6\), found .*\(3, {width}, 6, 6\)"
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=expected):
        sequence(x)


def outcome(sequence: pgf.ReversibleSequence, mode: Memory, x: Tensor) -> list[Tensor]:
    mode.apply(sequence)
    x = x.clone().requires_grad_()
    z, log_det = sequence(x)
    return [z.detach(), *torch.autograd.grad(z.square().sum() + log_det.sum(), [x, *sequence.parameters()])]


@both_ways
@pytest.mark.parametrize("how", ["global hook", "forward of the instance"])
@pytest.mark.parametrize("mode", MODES[1:], ids=str)
def test_what_doubles_the_output_of_a_net_is_called(mode: Memory, how: str) -> None:
    sequence, x = sequence_of(), torch.randn(3, 4, 6, 6)
    net = sequence[1].coupling.net
    forward = net.forward
    if how == "global hook":
        hook = nn.modules.module.register_module_forward_hook(
            lambda module, _, out: 2.0 * out if module is net else None
        )
    else:
        net.forward = lambda x, cond=None: 2.0 * forward(x, cond)
    found = [outcome(sequence, one, x) for one in (mode, MODES[0])]
    if how == "global hook":
        hook.remove()
    net.forward = forward
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(outcome(sequence, MODES[0], x)[0], found[0][0], rtol=1e-3)
