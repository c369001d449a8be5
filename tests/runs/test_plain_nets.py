"""Nets that are known run by their weights where states are recomputed: what a call of the module would do is kept."""

from __future__ import annotations

import pytest
import torch
from support.covering import pairs
from support.gradients import Memory, both_ways, perturbed
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast.layers import CouplingNet

MODES = ("store", "checkpoint", "reversible")


def sequence_of(n_steps: int = 3, coupling: str = "affine") -> pgf.ReversibleSequence:
    sequence = pgf.ReversibleSequence([pgf.FlowStep(4, 8, coupling) for _ in range(n_steps)])
    sequence.initialize(torch.randn(8, 4, 5, 5))
    perturbed(sequence, 0.05)
    return sequence


@both_ways
@pairs(
    pytest.mark.parametrize("grad", [True, False]),
    pytest.mark.parametrize("memory", MODES),
    pytest.mark.parametrize(("coupling", "width"), [("affine", 6), ("affine", 2), ("additive", 4)]),
)
def test_a_net_of_another_width_is_refused(coupling: str, width: int, memory: str, grad: bool) -> None:
    """Kernels would take other channels for the transformed ones."""
    sequence, x = sequence_of(coupling=coupling), torch.randn(3, 4, 6, 6)
    sequence.memory = memory
    sequence[1].coupling.net = CouplingNet(2, width, 8)
    given = 4 if coupling == "affine" else 2
    expected = rf"net: expected an output of shape \(3, {given}, 6, 6\), found .*\(3, {width}, 6, 6\)"
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=expected):
        sequence(x)


def outcome(sequence: pgf.ReversibleSequence, memory: str, x: Tensor) -> list[Tensor]:
    Memory(memory).apply(sequence)
    x = x.clone().requires_grad_()
    z, log_det = sequence(x)
    return [z.detach(), *torch.autograd.grad(z.square().sum() + log_det.sum(), [x, *sequence.parameters()])]


@both_ways
@pytest.mark.parametrize("how", ["global hook", "forward of the instance"])
@pytest.mark.parametrize("memory", MODES[1:])
def test_what_doubles_the_output_of_a_net_is_called(memory: str, how: str) -> None:
    sequence, x = sequence_of(), torch.randn(3, 4, 6, 6)
    net = sequence[1].coupling.net
    forward = net.forward
    if how == "global hook":
        hook = nn.modules.module.register_module_forward_hook(
            lambda module, _, out: 2.0 * out if module is net else None
        )
    else:
        net.forward = lambda x, cond=None: 2.0 * forward(x, cond)
    found = [outcome(sequence, one, x) for one in (memory, "store")]
    if how == "global hook":
        hook.remove()
    net.forward = forward
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(outcome(sequence, "store", x)[0], found[0][0], rtol=1e-3)
