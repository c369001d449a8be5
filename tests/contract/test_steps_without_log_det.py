"""Steps that give z alone, as blocks that hide images do, in a ReversibleSequence."""

from __future__ import annotations

import pytest
import torch
from support.gradients import CONDITION, batch
from support.helpers import assert_close
from torch import Tensor, nn

import pyglow_fast as pgf


class ShiftsBoth(nn.Module):
    """Additive both ways: its log_det would be 0, and it gives none."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        a, b = x.chunk(2, 1)
        a = a + torch.tanh(self.f(b))
        return torch.cat([a, b + torch.tanh(self.g(a))], 1)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        a, b = z.chunk(2, 1)
        b = b - torch.tanh(self.g(a))
        return torch.cat([a - torch.tanh(self.f(b)), b], 1)


@pytest.mark.parametrize("memory", ["store", "checkpoint", "reversible"])
def test_a_sequence_of_them_gives_z_alone(memory: str) -> None:
    """With the gradients of the steps in turn, there and back."""
    steps, x = [ShiftsBoth().double() for _ in range(4)], batch()
    sequence = pgf.ReversibleSequence(steps, memory)
    for direction in ("forward", "inverse"):
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, expected = getattr(sequence, direction)(leaf), other
        for step in steps if direction == "forward" else steps[::-1]:
            expected = getattr(step, direction)(expected)
        assert isinstance(found, Tensor)
        assert_close(found, expected, CONDITION)
        given = [*sequence.parameters()]
        for own, exact in zip(
            torch.autograd.grad(found.sin().sum(), [leaf, *given]),
            torch.autograd.grad(expected.sin().sum(), [other, *given]),
            strict=True,
        ):
            assert_close(own, exact, CONDITION)


@pytest.mark.parametrize("memory", ["store", "checkpoint", "reversible"])
def test_beside_steps_that_give_a_log_det_they_are_refused(memory: str) -> None:
    """The sum of log-dets would be one without theirs."""
    sequence = pgf.ReversibleSequence([pgf.ActNorm(4), ShiftsBoth()], memory).double().eval()
    with pytest.raises(ValueError, match="steps: expected a log_det from all of them, or from none"):
        sequence(batch())
