"""Blocks that run there and back, by the equations of HiNet, IRN and DeepMIH, small, and the models that own them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GrownNet(nn.Module):
    """Five convolutions, each of all before it."""

    def __init__(self, inputs: int, outputs: int, growth: int = 4, slope: float = 0.2) -> None:
        super().__init__()
        widths = [growth] * 4 + [outputs]
        self.stages = nn.ModuleList(nn.Conv2d(inputs + i * growth, w, 3, padding=1) for i, w in enumerate(widths))
        self.act = nn.LeakyReLU(slope, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for stage in self.stages[:-1]:
            seen.append(self.act(stage(torch.cat(seen, 1))))
        return self.stages[-1](torch.cat(seen, 1))


def plain_net(inputs: int, outputs: int) -> nn.Module:
    """A net that is no dense one."""
    return nn.Sequential(nn.Conv2d(inputs, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, outputs, 1))


class Hides(nn.Module):
    """HiNet's: three nets, the scale not kept."""

    def __init__(self, first: int, second: int, net: Any = GrownNet, strength: float = 2.0) -> None:
        super().__init__()
        self.first, self.second, self.strength = first, second, strength
        self.rho, self.eta = net(first, second), net(first, second)
        self.phi = net(second, first)

    def scale(self, raw: Tensor) -> Tensor:
        return torch.exp(self.strength * 2 * (torch.sigmoid(raw) - 0.5))

    def forward(self, x: Tensor, rev: bool = False) -> Tensor:
        a, b = x.split([self.first, self.second], 1)
        if rev:
            scale, shift = self.scale(self.rho(a)), self.eta(a)
            b = (b - shift) / scale
            return torch.cat([a - self.phi(b), b], 1)
        a = a + self.phi(b)
        scale, shift = self.scale(self.rho(a)), self.eta(a)
        return torch.cat([a, scale * b + shift], 1)


class Rescales(nn.Module):
    """IRN's: the scale is kept for ``jacobian``."""

    def __init__(self, channels: int, first: int, net: Any = GrownNet, clamp: float = 1.0) -> None:
        super().__init__()
        self.first, self.second, self.clamp = first, channels - first, clamp
        self.F, self.G, self.H = net(self.second, first), net(first, self.second), net(first, self.second)

    def forward(self, x: Tensor, rev: bool = False) -> Tensor:
        a, b = x.narrow(1, 0, self.first), x.narrow(1, self.first, self.second)
        if not rev:
            a = a + self.F(b)
        self.s = self.clamp * (2 * torch.sigmoid(self.H(a)) - 1)
        if not rev:
            return torch.cat([a, b * self.s.exp() + self.G(a)], 1)
        b = (b - self.G(a)) / self.s.exp()
        return torch.cat([a - self.F(b), b], 1)

    def jacobian(self, x: Tensor, rev: bool = False) -> Tensor:
        return (-1 if rev else 1) * self.s.sum() / x.shape[0]


class Shifts(nn.Module):
    """DeepMIH's additive one, and IRN's: two nets."""

    def __init__(self, first: int, second: int, net: Any = GrownNet) -> None:
        super().__init__()
        self.first, self.y, self.f = first, net(first, second), net(second, first)

    def forward(self, x: Tensor, rev: bool = False) -> Tensor:
        a, b = x[:, : self.first], x[:, self.first :]
        if rev:
            b = b - self.y(a)
            return torch.cat([a - self.f(b), b], 1)
        a = a + self.f(b)
        return torch.cat([a, b + self.y(a)], 1)


class ScalesBoth(nn.Module):
    """DeepMIH's affine one, and IRN's of four nets."""

    def __init__(self, first: int, second: int, net: Any = GrownNet, clamp: float = 2.0) -> None:
        super().__init__()
        self.first, self.clamp = first, clamp
        self.r, self.y = net(first, second), net(first, second)
        self.f, self.p = net(second, first), net(second, first)

    def scale(self, raw: Tensor) -> Tensor:
        return torch.exp(self.clamp * (torch.sigmoid(raw) * 2 - 1))

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        a, b = x[:, : self.first], x[:, self.first :]
        if reverse:
            b = (b - self.y(a)) / self.scale(self.r(a))
            return torch.cat([(a - self.f(b)) / self.scale(self.p(b)), b], 1)
        a = self.scale(self.p(b)) * a + self.f(b)
        return torch.cat([a, self.scale(self.r(a)) * b + self.y(a)], 1)


class InAttributes(nn.Module):
    """HiNet's model: blocks in attributes, called one by one."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        for i, block in enumerate(blocks):
            setattr(self, f"inv{i + 1}", block)

    def forward(self, x: Tensor, rev: bool = False) -> Tensor:
        blocks = list(self.children())
        for block in reversed(blocks) if rev else blocks:
            x = block(x, rev=rev)
        return x


class InList(nn.Module):
    """IRN's model: operations in a list, called by ``forward``."""

    def __init__(self, operations: Sequence[nn.Module]) -> None:
        super().__init__()
        self.operations = nn.ModuleList(operations)

    def forward(self, x: Tensor, rev: bool = False, cal_jacobian: bool = False) -> Any:
        total: Any = 0
        for op in reversed(self.operations) if rev else self.operations:
            x = op.forward(x, rev)
            if cal_jacobian:
                total += op.jacobian(x, rev)
        return (x, total) if cal_jacobian else x


class LooksBetween(InList):
    """An owner that reads the states between its blocks, if it is asked to."""

    def forward(self, x: Tensor, rev: bool = False, all_states: bool = False) -> Any:  # type: ignore[override]
        states = [x]
        for op in reversed(self.operations) if rev else self.operations:
            states.append(op(states[-1], rev))
        return tuple(states) if all_states else states[-1]


class HaarOperation(nn.Module):
    """IRN's Haar between blocks, with its own log-det."""

    def forward(self, x: Tensor, rev: bool = False) -> Tensor:
        self.last = (1 if rev else -1) * x[0].numel() / 4 * torch.tensor(16.0, dtype=x.dtype).log()
        pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=x.dtype)
        signs = torch.kron(pair, pair)  # its inverse is a quarter of it
        if rev:
            return F.pixel_shuffle(torch.einsum("ij,nichw->ncjhw", signs, x.unflatten(1, (4, -1))).flatten(1, 2), 2)
        squares = F.pixel_unshuffle(x, 2).unflatten(1, (-1, 4))
        return torch.einsum("ij,ncjhw->nichw", signs, squares).flatten(1, 2) / 4

    def jacobian(self, x: Tensor, rev: bool = False) -> Tensor:
        return self.last
