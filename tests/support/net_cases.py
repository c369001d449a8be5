"""Nets to cut into chunks, the gradients that autograd gives for them, and a test of the halo that one states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast.nets.plan import Chunk, plan_chunks
from pyglow_fast.nets.run import NetCall, inputs_for, run_net
from pyglow_fast.nets.traits import halo_of


def plain_call(net: nn.Module) -> NetCall:
    """The net as it is: with x1 alone where there is no condition, with copies of what it may write to."""
    return lambda x1, cond: net(*inputs_for(net, x1, cond))


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


SAFETY = 1e4  # roundings of sums in another order are a few eps; a position that is missed shows as 1e-3 or more


def halo_is_enough(net: nn.Module, shape: Sequence[int], cond_channels: int = 0) -> bool:
    """Run a copy of the net on random input whole and in strips of one row with the stated halo, and compare.

    The copy is in float64 and evaluation mode, with random parameters in the place of the net's: a net whose last layer
    starts at zero would agree with anything. A halo that is too large passes; it only costs time. Not seen is what
    needs other input than N(0, 1) to show.
    """
    halo = halo_of(net)
    assert halo is not None
    assert shape[2] >= 2 * halo + 2, "strips are cut on both sides"
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    twin = copy.deepcopy(net).to("cpu", torch.float64).eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 1
            parameter.copy_(normal(*parameter.shape) / fan_in**0.5)
    x1 = normal(*shape)
    cond = normal(shape[0], cond_channels, *shape[2:]) if cond_channels else None
    call = plain_call(twin)
    whole = run_net(call, x1, cond, plan_chunks(twin, shape, 8, 2**62))
    strips = run_net(call, x1, cond, plan_chunks(twin, shape, 8, 1))
    scale = float(whole.abs().max())
    assert 0 < scale < float("inf")
    error = float((whole - strips).abs().max()) / scale
    return error <= SAFETY * torch.finfo(whole.dtype).eps
