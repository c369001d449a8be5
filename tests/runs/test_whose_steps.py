"""Steps are joined only where that changes nothing: overridden methods, hooks and foreign tensors keep their say."""

from __future__ import annotations

import pytest
import torch
from support.gradients import Memory, objective
from torch import Tensor, nn

import pyglow_fast as pgf
from bench.memory_meter import peak_tensor_bytes

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
