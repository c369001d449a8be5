"""Steps and coupling nets that a user might write, some of them awkward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyglow_fast as pgf
from support.gradients import perturbed, steps

Build = Callable[[], Any]


class Scale(nn.Module):
    """z = x exp(log_scale), one number per channel."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(0.3 * torch.randn(channels))

    def _shaped(self, x: Tensor) -> Tensor:
        return self.log_scale.reshape(1, -1, *[1] * (x.dim() - 2))

    def _log_det(self, x: Tensor) -> Tensor:
        return (self.log_scale.sum() * (x[0, 0].numel() if x.shape[0] else 1)).expand(x.shape[0])

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * self._shaped(x).exp(), self._log_det(x)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z * (-self._shaped(z)).exp(), -self._log_det(z)


class Identity(nn.Module):
    """Hands its input on: the very tensor, a view of it, or a view in another shape and back."""

    def __init__(self, handed: str) -> None:
        super().__init__()
        self.handed = handed

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        value = {"same": x, "view": x.view_as(x), "transposed": x.transpose(2, 3)}[self.handed]
        return value, x.new_zeros(x.shape[0])

    inverse = forward


class Flip(nn.Module):
    """The order of the channels turned around."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flip(1), x.new_zeros(x.shape[0])

    inverse = forward


class Transposed(pgf.InvConv):
    """InvConv's parameters, and another W of them."""

    def weight_and_log_det(self) -> tuple[Tensor, Tensor]:
        weight, log_det = super().weight_and_log_det()
        return weight.T, log_det


class Conditioned(nn.Module):
    """z = x + a cond where cond has as many channels, with dropout of the shift in training."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.gain, self.dropout = nn.Parameter(torch.randn(())), nn.Dropout(p)

    def forward(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        return x + self.dropout(self.gain * torch.tanh(cond)), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        return z - self.dropout(self.gain * torch.tanh(cond)), z.new_zeros(z.shape[0])


class Checkpointed(nn.Module):
    """A net that torch checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.net = pgf.CouplingNet(2, 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False)


class Writes(nn.Module):
    """A net whose code writes to what it is given."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.in_place = nn.Conv2d(inputs, outputs, 3, padding=1), True

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """conv(relu(x)), or of the sum with cond."""
        if cond is not None:
            cond = cond.mul_(0.5) if self.in_place else 0.5 * cond
        x = x.relu_() if self.in_place else x.relu()
        return self.conv(x if cond is None else torch.cat([x, cond], dim=1))


class Nested(nn.Module):
    """A net with a reversible run inside: backwards begin and end within a step of the outer one's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = pgf.ReversibleSequence([pgf.FlowStep(2, 5) for _ in range(3)], anchor_every=None)
        self.conv = nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.inner(x)[0].tanh())


def mixed(cond: bool = False, **options: object) -> pgf.ReversibleSequence:
    """Layers of the package among steps of one's own. Float64, initialised, away from the start."""
    steps: list[nn.Module] = [
        Scale(),
        pgf.FlowStep(4, 5, cond_channels=4 if cond else 0),
        Conditioned(0.3) if cond else Flip(),
        pgf.InvConv(4),
        pgf.Coupling(pgf.CouplingNet(2, 4, 5, cond_channels=4 if cond else 0)),
        pgf.ActNorm(4),
        Scale(),
    ]
    sequence = pgf.ReversibleSequence(steps, **options).double()
    torch.manual_seed(5)
    sequence.initialize(*(torch.randn(32, 4, 6, 3, dtype=torch.float64) for _ in range(2 if cond else 1)))
    return perturbed(sequence)


# Runs that every feature has to go with: FlowSteps, and layers and modules of a user's among them.
RUNS: dict[str, Build] = {"steps": steps, "modules": mixed}
runs = pytest.mark.parametrize("build", RUNS.values(), ids=RUNS)
