"""Small flows of tokens around ViTs, with the two interfaces that Jet has in PyTorch: of products, as their papers say.

``ProjectedFlow`` has jet-pytorch's (couplings called with the projections, which are the model's), ``ImageFlow`` that
of JetFormer's flow (couplings of images, with projections of their own).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def one_hot(size: int, generator: torch.Generator) -> Tensor:
    """Draw a random permutation matrix."""
    return torch.eye(size)[torch.randperm(size, generator=generator)]


def encoder(width: int, dropout: float) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


class Vit(nn.Module):
    """(N, T, C) -> shift and raw, both (N, T, C)."""

    def __init__(self, tokens: int, channels: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.init_proj = nn.Linear(channels, width)
        self.pos_emb = nn.Parameter(0.3 * torch.randn(1, tokens, width))
        self.encoder = encoder(width, dropout)
        self.final_proj = nn.Linear(width, 2 * channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = self.final_proj(self.encoder(self.init_proj(x) + self.pos_emb)).chunk(2, -1)
        return shift, raw


class ProjectedCoupling(nn.Module):
    def __init__(self, dnn: nn.Module, scale_factor: float) -> None:
        super().__init__()
        self.dnn, self.scale_factor = dnn, scale_factor

    def _parts(self, x: Tensor, is_channel: bool, channel_proj: Any, spatial_proj: Any) -> tuple[Tensor, ...]:
        if is_channel:
            u1, u2 = (x @ channel_proj).chunk(2, 2)
            shift, raw = self.dnn(u1)
        else:
            u1, u2 = (spatial_proj.T @ x).chunk(2, 1)
            n, tokens, channels = u1.shape
            shift, raw = (out.reshape(u1.shape) for out in self.dnn(u1.reshape(n, 2 * tokens, channels // 2)))
        log_det = (F.logsigmoid(raw) + math.log(self.scale_factor)).flatten(1).sum(1, keepdim=True)
        return u1, u2, shift, self.scale_factor * torch.sigmoid(raw), log_det

    @staticmethod
    def _whole(u1: Tensor, u2: Tensor, is_channel: bool, channel_proj: Any, spatial_proj: Any) -> Tensor:
        if is_channel:
            return torch.cat([u1, u2], 2) @ channel_proj.T
        whole: Tensor = spatial_proj @ torch.cat([u1, u2], 1)
        return whole

    def forward(self, x: Tensor, is_channel: bool, channel_proj: Any, spatial_proj: Any) -> tuple[Tensor, Tensor]:
        projections = is_channel, channel_proj, spatial_proj
        u1, u2, shift, scale, log_det = self._parts(x, *projections)
        return self._whole(u1, (u2 + shift) * scale, *projections), log_det

    def inverse(self, x: Tensor, is_channel: bool, channel_proj: Any, spatial_proj: Any) -> tuple[Tensor, Tensor]:
        projections = is_channel, channel_proj, spatial_proj
        u1, u2, shift, scale, log_det = self._parts(x, *projections)
        return self._whole(u1, u2 / scale - shift, *projections), -log_det


class ProjectedFlow(nn.Module):
    """x (N, T, C) -> z, log_det (N, 1); every third coupling is by tokens."""

    def __init__(
        self, tokens: int, channels: int, n: int, width: int = 8, scale_factor: float = 2.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        nets = [Vit(tokens, channels // 2, width, dropout) for _ in range(n)]
        self.blocks = nn.ModuleList([ProjectedCoupling(net, scale_factor) for net in nets])
        self.kind_flags = [i % 3 != 2 for i in range(n)]
        counts = [sum(self.kind_flags[: i + 1]) for i in range(n)]
        self.channel_indices = [count - 1 if flag else -1 for count, flag in zip(counts, self.kind_flags, strict=True)]
        self.spatial_indices = [
            -1 if flag else i - count for i, (count, flag) in enumerate(zip(counts, self.kind_flags, strict=True))
        ]
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("channel_projections", torch.stack([one_hot(channels, generator) for _ in range(n)]))
        self.register_buffer("spatial_projections", torch.stack([one_hot(tokens, generator) for _ in range(n)]))

    def _arguments(self, i: int) -> tuple[Any, ...]:
        channel, spatial = self.channel_indices[i], self.spatial_indices[i]
        of_channels = self.channel_projections[channel] if channel >= 0 else None
        return self.kind_flags[i], of_channels, self.spatial_projections[spatial] if spatial >= 0 else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(len(x), 1)
        for i in range(len(self.blocks)):
            x, own = self.blocks[i](x, *self._arguments(i))
            log_det += own
        return x, log_det

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(len(x), 1)
        for i in reversed(range(len(self.blocks))):
            x, own = self.blocks[i].inverse(x, *self._arguments(i))
            log_det += own
        return x, log_det


class ScaledVit(nn.Module):
    """(N, T, C) -> shift, scale and log-det; a context is added to the tokens."""

    def __init__(self, tokens: int, channels: int, width: int, scale_factor: float) -> None:
        super().__init__()
        self.init_proj, self.vit_encoder = nn.Linear(channels, width), encoder(width, 0.0)
        self.posemb = nn.Parameter(0.3 * torch.randn(1, tokens, width))
        self.final_proj = nn.Linear(width, 2 * channels)
        self.scale_factor = scale_factor

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.init_proj(x) + self.posemb
        hidden = hidden if context is None else hidden + context
        shift, raw = self.final_proj(self.vit_encoder(hidden)).chunk(2, -1)
        log_det = (F.logsigmoid(raw) + math.log(self.scale_factor)).flatten(1).sum(1)
        return shift, self.scale_factor * torch.sigmoid(raw), log_det


class ImageCoupling(nn.Module):
    use_actnorm = use_invertible_dense = False

    def __init__(
        self, shape: tuple[int, int, int], ps: int, by_channel: bool, mode: str, generator: torch.Generator
    ) -> None:
        super().__init__()
        height, width, channels = shape
        tokens, features = height * width // ps**2, channels * ps**2
        self.kind_is_channel, self.masking_mode, self.ps = by_channel, mode, ps
        seen = (tokens, features // 2) if by_channel else (tokens // 2, features)
        self.dnn = ScaledVit(*seen, 8, 2.0)
        self.register_buffer("P_chan", one_hot(features, generator), persistent=False)
        self.register_buffer("P_spatial", one_hot(tokens, generator), persistent=False)

    def _run(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        size = x.shape[1:3]
        tokens = F.unfold(x.permute(0, 3, 1, 2), self.ps, stride=self.ps)  # (N, C ps^2, T)
        if self.masking_mode == "pairing":
            tokens = self.P_chan.T @ tokens if self.kind_is_channel else tokens @ self.P_spatial
        u1, u2 = tokens.chunk(2, 1 if self.kind_is_channel else 2)
        shift, scale, log_det = self.dnn(u1.transpose(1, 2), context=context)
        shift, scale = shift.transpose(1, 2), scale.transpose(1, 2)
        u2 = u2 / scale - shift if inverse else (u2 + shift) * scale
        tokens = torch.cat([u1, u2], 1 if self.kind_is_channel else 2)
        if self.masking_mode == "pairing":
            tokens = self.P_chan @ tokens if self.kind_is_channel else tokens @ self.P_spatial.T
        return F.fold(tokens, size, self.ps, stride=self.ps).permute(0, 2, 3, 1), log_det

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, context, False)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(y, context, True)


class ImageFlow(nn.Module):
    """x (N, H, W, C) -> z, log_det (N,); the inverse has the same sign of it."""

    def __init__(self, shape: tuple[int, int, int], ps: int, n: int, mode: str = "pairing") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        by_channel = [i % 3 != 2 or mode == "masking" for i in range(n)]
        self.couplings = nn.ModuleList([ImageCoupling(shape, ps, flag, mode, generator) for flag in by_channel])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for coupling in self.couplings:
            x, log_det = coupling(x, context=context)
            total = total + log_det
        return x, total

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(len(z))
        for coupling in reversed(self.couplings):
            z, log_det = coupling.inverse(z, context=context)
            total = total + log_det
        return z, total
