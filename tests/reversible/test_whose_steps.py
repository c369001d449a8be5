"""Steps are joined only where that changes nothing: overridden methods, hooks and foreign tensors keep their say."""

from __future__ import annotations

import pytest
import torch
from support.chain_cases import EVERY_STEP, Mode, cut_parts, objective
from torch import Tensor, nn

import pyglow_fast as pgf
from bench.memory_meter import peak_tensor_bytes
from pyglow_fast.layers.flow_step import runs_fused

MODES = [Mode("store"), Mode("checkpoint"), Mode("reversible")]


def initialised(*steps: nn.Module) -> pgf.ReversibleSequence:
    sequence = pgf.ReversibleSequence(list(steps)).double()
    sequence.initialize(torch.randn(4, 4, 6, 6, dtype=torch.float64))
    return sequence


class Doubled(pgf.FlowStep):
    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = super().forward(x, cond)
        return 2.0 * z, log_det + z[0].numel() * torch.tensor(2.0).log()

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = super().inverse(0.5 * z, cond)
        return x, log_det - z[0].numel() * torch.tensor(2.0).log()


class Louder(pgf.Coupling):
    def run_net(self, kept: Tensor, cond: Tensor | None) -> Tensor:
        return 1.5 * super().run_net(kept, cond)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("part", ["step", "coupling"])
def test_overridden_methods(part: str, mode: Mode) -> None:
    step: pgf.FlowStep = Doubled(4, 5) if part == "step" else pgf.FlowStep(4, 5)
    if part == "coupling":
        step.coupling = Louder(step.coupling.net)
    nn.init.normal_(step.coupling.net.conv3.weight, std=0.2)
    sequence = initialised(step, pgf.FlowStep(4, 5))
    mode.apply(sequence)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
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


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("where", ["step", "coupling", "actnorm"])
@pytest.mark.parametrize("hook", ["forward_hook", "forward_pre_hook"])
def test_hooks_are_called(hook: str, where: str, mode: Mode) -> None:
    sequence = initialised(pgf.FlowStep(4, 5), pgf.FlowStep(4, 5))
    mode.apply(sequence)
    seen: list[str] = []
    part = sequence[1] if where == "step" else getattr(sequence[1], where)
    handle = getattr(part, f"register_{hook}")(lambda *_: seen.append(where))
    sequence(torch.randn(2, 4, 6, 6, dtype=torch.float64))
    # A FlowStep computes its parts' work itself: only hooks on it and on its net are called.
    assert seen == (["step"] if where == "step" else seen)
    handle.remove()
    assert all(runs_fused(step) for step in sequence)


def test_parametrized_steps_are_still_joined() -> None:
    step = pgf.FlowStep(4, 5)
    nn.utils.parametrizations.weight_norm(step.coupling.net.conv1)
    nn.utils.parametrize.register_parametrization(step.actnorm, "bias", nn.Identity())
    assert runs_fused(step)


class Adapted(nn.Module):
    """A net that uses a tensor which is not its own."""

    def __init__(self, foreign: list[Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 1)
        self.foreign = foreign

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.foreign[0]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_foreign_tensor_in_a_frozen_run_keeps_its_gradient(mode: Mode) -> None:
    foreign = torch.ones((), dtype=torch.float64, requires_grad=True)
    sequence = initialised(pgf.FlowStep(4, net=Adapted([foreign])))
    sequence.requires_grad_(False)
    mode.apply(sequence)
    z, log_det = sequence(torch.randn(2, 4, 6, 6, dtype=torch.float64))
    (z.square().sum() - log_det.sum()).backward()
    assert foreign.grad is not None
    assert bool(foreign.grad != 0)


@pytest.mark.parametrize(("kernel", "last"), [(7, nn.Identity()), (3, nn.GroupNorm(2, 4))], ids=str)
def test_the_plan_of_another_net_is_not_used(kernel: int, last: nn.Module) -> None:
    """Not where it reaches further, nor where all that it states is the same but no strip is right any more."""

    class Net(nn.Module):
        def __init__(self, kernel: int, last: nn.Module) -> None:
            super().__init__()
            self.halo = kernel // 2
            self.conv, self.last = nn.Conv2d(2, 4, kernel, padding=kernel // 2), last

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.conv(x))

    x = torch.randn(1, 4, 32, 8, dtype=torch.float64)
    sequence = initialised(pgf.FlowStep(4, net=Net(3, nn.Identity())))
    sequence.memory_budget = 1
    with torch.no_grad():
        sequence(x)
        sequence[0].coupling.net = Net(kernel, last).double()
        chunked = sequence(x)[0]
        sequence.memory_budget = 2**40
        assert torch.allclose(chunked, sequence(x)[0], rtol=1e-10, atol=1e-10)


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


def test_a_backward_that_wants_late_gradients_alone_leaves_nothing_behind() -> None:
    with pytest.MonkeyPatch.context() as patch:
        cut_parts(patch, EVERY_STEP)
        sequence = initialised(*(pgf.FlowStep(4, 5) for _ in range(4)))
        Mode("reversible", 2).apply(sequence)
        sequence.control.tolerance = 1e-30
        value = objective(sequence(torch.randn(2, 4, 6, 6, dtype=torch.float64)))
        torch.autograd.grad(value, sequence[3].coupling.net.conv1.weight, retain_graph=True)
        assert sequence.memory_report()["passes"] == 0
        value.backward()
        report = sequence.memory_report()
        # Of steps 3 and 1 the step before is run again, where the anchor is.
        assert (report["passes"], report["redone_steps"]) == (1, 6)
