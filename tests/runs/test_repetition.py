"""A step that is run again must be the one of the forward: what makes it another one is refused, and never silent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.gradients import Memory, both_ways, objective
from torch import Tensor, nn

import pyglow_fast as pgf

RECOMPUTING = [Memory("checkpoint"), Memory("reversible"), Memory("reversible", None)]


class Scaled(nn.Module):
    """A net with a buffer, and with random numbers from wherever it is told."""

    def __init__(self, draw: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.inner = nn.Conv2d(2, 4, 3, padding=1)
        nn.init.normal_(self.inner.weight, std=0.2)
        self.register_buffer("size", torch.ones(()))
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x) * self.size
        return out if self.draw is None else out * self.draw(out)


def run_of(nets: list[nn.Module], user: bool) -> pgf.ReversibleSequence:
    """FlowSteps around the nets, or the same as a step of the user's."""
    steps: list[nn.Module] = [pgf.FlowStep(4, net=net) for net in nets]
    sequence = pgf.ReversibleSequence([*steps, pgf.InvConv(4)] if user else steps).double()
    sequence.initialize(torch.randn(4, 4, 6, 6, dtype=torch.float64))
    return sequence


X = torch.randn(3, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@both_ways
@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("mode", RECOMPUTING, ids=str)
class TestRefusals:
    @pytest.mark.parametrize("written", [True, False], ids=["written to", "lent"])
    def test_buffers_that_are_others_in_the_backward(self, mode: Memory, user: bool, written: bool) -> None:
        sequence = run_of([Scaled(), Scaled()], user)
        mode.apply(sequence)
        lent = {} if written else {name: 2.0 * b for name, b in sequence.named_buffers() if name.endswith("size")}
        value = objective(torch.func.functional_call(sequence, lent, (X,)))
        if written:
            sequence[0].coupling.net.size.mul_(2.0)
        with pytest.raises(ValueError, match=r"the buffers that its forward ran with, .*size'\] changed since"):
            value.backward()

    @pytest.mark.parametrize("source", ["own generator", "no generator of torch's"])
    def test_random_numbers_that_cannot_be_drawn_again(self, mode: Memory, user: bool, source: str) -> None:
        generator = torch.Generator().manual_seed(1)
        counter = iter(range(100))

        def draw(x: Tensor) -> Tensor:
            if source == "own generator":
                return (torch.rand(x.shape, generator=generator) < 0.8).to(x.dtype)
            return torch.full_like(x, 1.0 + 0.1 * next(counter))

        sequence = run_of([Scaled(draw)], user)
        mode.apply(sequence)
        value = objective(sequence(X))
        with pytest.raises(ValueError, match=r"expected the same output when it is run again in the backward"):
            value.backward()


class Map(nn.Module):
    """A scale map with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        log_s = self.a * raw.tanh()
        return log_s.exp(), log_s


@pytest.mark.parametrize("mode", [Memory("store"), *RECOMPUTING], ids=str)
def test_parameters_of_a_scale_map(mode: Memory) -> None:
    """They are the model's; where states are recomputed they are refused."""
    scale_map = Map()
    sequence = pgf.ReversibleSequence([pgf.FlowStep(4, 5, scale_map=scale_map) for _ in range(2)]).double()
    sequence.initialize(X)
    assert any(parameter is scale_map.a for parameter in sequence.parameters())
    for step in sequence:
        nn.init.normal_(step.coupling.net.conv3.weight, std=0.2)
    mode.apply(sequence)
    value = objective(sequence(X))
    if mode.mode == "store":
        value.backward()
        assert bool(scale_map.a.grad.abs() > 0)
    else:
        with pytest.raises(ValueError, match=r"scale_map: expected no tensors that require a gradient"):
            value.backward()
