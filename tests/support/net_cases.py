"""Nets to cut into chunks, and the gradients that ordinary autograd gives for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast.nets import Chunk


def randomised(net: nn.Module) -> nn.Module:
    """Every parameter random, biases and last layers too: as far from the start as training may get. Float64."""
    with torch.no_grad():
        for parameter in net.double().parameters():
            parameter.normal_(0.0, 0.3)
    return net


class WideNet(nn.Module):
    """Two 5x5 convolutions with the halo of both, and nothing said about its cost."""

    halo = 4

    def __init__(self, channels: int = 2, cond_channels: int = 0) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels + cond_channels, 3, 5, padding=2)
        self.second = nn.Conv2d(3, 4, 5, padding=2)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.second(nn.functional.silu(self.first(x if cond is None else torch.cat([x, cond], 1))))


class DilatedNet(nn.Module):
    """A residual net of dilated convolutions; its padding repeats the border."""

    def __init__(self, halo: int | None = 5) -> None:
        super().__init__()
        self.halo = halo
        self.first = nn.Conv2d(2, 4, 3, padding=2, dilation=2, padding_mode="replicate")
        self.second = nn.Conv2d(4, 4, 3, padding=3, dilation=3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return hidden + self.second(hidden)


class DropoutNet(nn.Module):
    """Dropout between two convolutions, as a submodule or hidden in the forward."""

    halo = 1

    def __init__(self, hidden: bool = False) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.dropout = None if hidden else nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        found = self.conv(x)
        found = self.dropout(found) if self.dropout else nn.functional.dropout(found, 0.4, self.training)
        return self.last(found)


def coupling_net(dims: int = 2, actnorm: bool = False, cond_channels: int = 0) -> nn.Module:
    return randomised(pgf.CouplingNet(2, 4, 5, actnorm, cond_channels, dims=dims))


Consume = Callable[[Tensor, Chunk], Tensor]


def objective(weight: Tensor) -> tuple[Callable[[Tensor], Tensor], Consume]:
    """sum weight net_out^2 / 2 of all the output, and its gradient for a chunk: it depends on place and on value."""
    return lambda out: 0.5 * (weight * out.square()).sum(), lambda out, chunk: chunk.outputs(weight) * out


def plain_gradients(
    net: nn.Module, x: Tensor, cond: Tensor | None, weight: Tensor, params: Sequence[Tensor]
) -> list[Tensor | None]:
    """Compute the objective's gradients in one piece: of x, of cond (None without one) and of the parameters."""
    leaf = x.detach().requires_grad_()
    cond_leaf = None if cond is None else cond.detach().requires_grad_()
    out = net(leaf) if cond is None else net(leaf, cond_leaf)
    inputs = [leaf, *([] if cond_leaf is None else [cond_leaf]), *params]
    grads = list(torch.autograd.grad(objective(weight)[0](out), inputs))
    return grads if cond is not None else [grads[0], None, *grads[1:]]
