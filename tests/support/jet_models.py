"""A small flow of images with the interface of JetFormer's, around nets of two layers.

``accelerate`` goes by it alone. The other interface of Jet is that of jet-pytorch, whose own flow is in tests/live.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TokenNet(nn.Module):
    """(N, T, C) -> shift and raw scale, both (N, T, C); a context is added to the hidden layer."""

    def __init__(self, channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.hidden = nn.Linear(channels, 8 * channels), nn.Sequential(nn.GELU(), nn.Dropout(dropout))
        self.last = nn.Linear(8 * channels, 2 * channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden = self.first(x) if context is None else self.first(x) + context
        shift, raw = self.last(self.hidden(hidden)).chunk(2, -1)
        return shift, raw


def coupled(x: Tensor, inverse: bool, net: nn.Module, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """(x_0, (x_1 + shift) scale) of the halves of the channels, or its inverse, and the log-det of the former."""
    kept, moved = x.chunk(2, 2)
    shift, raw = net(kept, context)
    scale = 2.0 * torch.sigmoid(raw)
    moved = moved / scale - shift if inverse else (moved + shift) * scale
    return torch.cat([kept, moved], 2), scale.log().flatten(1).sum(1)


class ImageCoupling(nn.Module):
    """A coupling of the channels of x (N, H, W, C), which are then in the other order."""

    def __init__(self, channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dnn = TokenNet(channels // 2, dropout)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = coupled(x.flatten(1, 2), False, self.dnn, context)
        return z.flip(2).view_as(x), log_det

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = coupled(y.flatten(1, 2).flip(2), True, self.dnn, context)
        return x.view_as(y), -log_det


class ImageFlow(nn.Module):
    """x (N, H, W, C) -> z, log_det (N,); the couplings, one after another, may be given a context."""

    def __init__(self, channels: int, n: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ImageCoupling(channels, dropout) for _ in range(n)])

    def forward(self, x: Tensor, **named: Any) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for block in self.blocks:
            x, log_det = block(x, **named)
            total = total + log_det
        return x, total

    def inverse(self, x: Tensor, **named: Any) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for block in reversed(self.blocks):
            x, log_det = block.inverse(x, **named)
            total = total + log_det
        return x, total
