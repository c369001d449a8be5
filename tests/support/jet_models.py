"""Small flows of tokens with the two interfaces that Jet has in PyTorch, around nets of two layers.

``ProjectedFlow`` has jet-pytorch's (couplings called with the projections, which are the model's), ``ImageFlow`` that
of JetFormer's flow (couplings of images). ``accelerate`` goes by these alone; jet-pytorch's own flow is in tests/live.
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


def coupled(x: Tensor, dim: int, inverse: bool, net: nn.Module, *context: Tensor | None) -> tuple[Tensor, Tensor]:
    """(x_0, (x_1 + shift) scale) of the halves along ``dim``, or the inverse of it, and the log-det of the former."""
    kept, moved = x.chunk(2, dim)
    shift, raw = net(kept, *context)
    scale = 2.0 * torch.sigmoid(raw)
    moved = moved / scale - shift if inverse else (moved + shift) * scale
    return torch.cat([kept, moved], dim), scale.log().flatten(1).sum(1)


class ProjectedCoupling(nn.Module):
    def __init__(self, dnn: nn.Module) -> None:
        super().__init__()
        self.dnn = dnn

    def _run(self, x: Tensor, is_channel: bool, projection: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        halves = x @ projection if is_channel else projection.T @ x
        z, log_det = coupled(halves, 2 if is_channel else 1, inverse, self.dnn)
        return z @ projection.T if is_channel else projection @ z, log_det.unsqueeze(1)

    def forward(self, x: Tensor, is_channel: bool, channel_proj: Any, spatial_proj: Any) -> tuple[Tensor, Tensor]:
        return self._run(x, is_channel, channel_proj if is_channel else spatial_proj, False)

    def inverse(self, x: Tensor, is_channel: bool, channel_proj: Any, spatial_proj: Any) -> tuple[Tensor, Tensor]:
        z, log_det = self._run(x, is_channel, channel_proj if is_channel else spatial_proj, True)
        return z, -log_det


class ImageCoupling(nn.Module):
    """A coupling of the channels of x (N, H, W, C), which are then in the other order."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dnn = TokenNet(channels // 2)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = coupled(x.flatten(1, 2), 2, False, self.dnn, context)
        return z.flip(2).view_as(x), log_det

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = coupled(y.flatten(1, 2).flip(2), 2, True, self.dnn, context)
        return x.view_as(y), -log_det


class TokenFlow(nn.Module):
    """Couplings one after another."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def _given(self, i: int) -> tuple[Any, ...]:
        return ()

    def forward(self, x: Tensor, **named: Any) -> tuple[Tensor, Tensor]:
        total: Any = 0.0
        for i, block in enumerate(self.blocks):
            x, log_det = block(x, *self._given(i), **named)
            total = total + log_det
        return x, total

    def inverse(self, x: Tensor, **named: Any) -> tuple[Tensor, Tensor]:
        total: Any = 0.0
        for i, block in reversed(list(enumerate(self.blocks))):
            x, log_det = block.inverse(x, *self._given(i), **named)
            total = total + log_det
        return x, total


class ProjectedFlow(TokenFlow):
    """x (N, T, C) -> z, log_det (N, 1); every third coupling is by tokens."""

    def __init__(self, tokens: int, channels: int, n: int, dropout: float = 0.0) -> None:
        nets = [TokenNet(channels if i % 3 == 2 else channels // 2, dropout) for i in range(n)]
        super().__init__([ProjectedCoupling(net) for net in nets])
        for name, size in (("channel_projection", channels), ("spatial_projection", tokens)):
            self.register_buffer(name, torch.eye(size)[torch.randperm(size)])

    def _given(self, i: int) -> tuple[Any, ...]:
        return i % 3 != 2, self.channel_projection, self.spatial_projection


class ImageFlow(TokenFlow):
    """x (N, H, W, C) -> z, log_det (N,); the couplings may be given a context."""

    def __init__(self, channels: int, n: int) -> None:
        super().__init__([ImageCoupling(channels) for _ in range(n)])
