"""A decoder of Glow-TTS's interface, for these tests: masks, groups of channels, WaveNet nets, squeezed time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from support.gradients import perturbed


def normed(conv: nn.Conv1d, norm: str) -> nn.Module:
    """The convolution with torch's older weight norm, a hook, or none; coqui-tts in tests/live has the newer one."""
    return nn.utils.weight_norm(conv) if norm == "hook" else conv


class TextWaveNet(nn.Module):
    """Gated convolutions with a mask and the embedding of a speaker."""

    def __init__(
        self, hidden: int, kernel: int, rate: int, layers: int, cond: int = 0, drop: float = 0.0, norm: str = "hook"
    ) -> None:
        super().__init__()
        self.drop = nn.Dropout(drop)
        self.in_layers, self.res_skip_layers = nn.ModuleList(), nn.ModuleList()
        if cond:
            self.cond_layer = normed(nn.Conv1d(cond, 2 * hidden * layers, 1), norm)
        for i in range(layers):
            wide = nn.Conv1d(hidden, 2 * hidden, kernel, padding=rate**i * (kernel // 2), dilation=rate**i)
            self.in_layers.append(normed(wide, norm))
            self.res_skip_layers.append(normed(nn.Conv1d(hidden, hidden * (1 + (i + 1 < layers)), 1), norm))

    def forward(self, x: Tensor, x_mask: Tensor | None = None, g: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Compute the net: x (N, H, T) -> (N, H, T)."""
        mask = 1.0 if x_mask is None else x_mask
        total, last = torch.zeros_like(x), len(self.in_layers) - 1
        given = None if g is None else self.cond_layer(g).chunk(last + 1, dim=1)
        for i, (wide, mix) in enumerate(zip(self.in_layers, self.res_skip_layers, strict=True)):
            h = self.drop(wide(x)) + (0.0 if given is None else given[i])
            a, b = h.chunk(2, dim=1)
            mixed = mix(torch.tanh(a) * torch.sigmoid(b))
            if i < last:
                x = (x + mixed[:, : x.shape[1]]) * mask
                mixed = mixed[:, x.shape[1] :]
            total = total + mixed
        return total * mask


class TextActNorm(nn.Module):
    """An actnorm of sequences, z = (bias + exp(logs) x) m."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.initialized = True
        self.logs, self.bias = (nn.Parameter(torch.zeros(1, channels, 1)) for _ in range(2))

    def forward(self, x: Tensor, x_mask: Tensor, reverse: bool = False, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Map x to z and log_det (N,)."""
        if not self.initialized:
            with torch.no_grad():
                count = x_mask.sum()
                mean = (x * x_mask).sum((0, 2)) / count
                variance = (x.square() * x_mask).sum((0, 2)) / count - mean.square()
                self.logs.data.copy_(-0.5 * variance.clamp_min(1e-6).log().view(1, -1, 1))
                self.bias.data.copy_(-mean.view(1, -1, 1) * self.logs.exp())
            self.initialized = True
        if reverse:
            return (x - self.bias) * torch.exp(-self.logs) * x_mask, None
        return (self.bias + torch.exp(self.logs) * x) * x_mask, self.logs.sum() * x_mask.sum((1, 2))

    def set_ddi(self, ddi: bool) -> None:
        """Wait for data from now on, or do not."""
        self.initialized = not ddi


class TextInvConv(nn.Module):
    """One matrix for groups of half their channels from each half."""

    def __init__(self, channels: int, n_split: int = 4) -> None:
        super().__init__()
        self.n_split, self.weight_inv = n_split, None
        rotation = torch.linalg.qr(torch.randn(n_split, n_split)).Q
        rotation[:, 0] *= torch.linalg.det(rotation)
        self.weight = nn.Parameter(rotation)

    def forward(
        self, x: Tensor, x_mask: Tensor | None = None, reverse: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Map x to z and log_det (N,)."""
        n, c, t = x.shape
        mask = x.new_ones(n, 1, t) if x_mask is None else x_mask
        weight, size = self.weight, self.n_split
        if reverse:
            weight = torch.inverse(self.weight.float()).to(x.dtype) if self.weight_inv is None else self.weight_inv
        groups = x.reshape(n, 2, c // size, size // 2, t).transpose(2, 3).reshape(n, size, -1)
        z = (weight @ groups).reshape(n, 2, size // 2, c // size, t).transpose(2, 3).reshape(n, c, t) * mask
        return z, None if reverse else torch.logdet(self.weight) * (c / size) * mask.sum((1, 2))

    def store_inverse(self) -> None:
        """Keep the inverse of the weight of now."""
        self.weight_inv = nn.Parameter(torch.inverse(self.weight.float()).to(self.weight.dtype), requires_grad=False)


class TextCoupling(nn.Module):
    """A coupling of sequences with masks, z = (x_0, (t + s x_1) m)."""

    def __init__(self, channels: int, hidden: int, norm: str = "hook", **net: Any) -> None:
        super().__init__()
        self.start = normed(nn.Conv1d(channels // 2, hidden, 1), norm)
        self.wn = TextWaveNet(hidden, norm=norm, **net)
        self.end = nn.Conv1d(hidden, channels, 1)

    def forward(
        self, x: Tensor, x_mask: Tensor | None = None, reverse: bool = False, g: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Map x to z and log_det (N,)."""
        mask = x.new_ones(len(x), 1, x.shape[2]) if x_mask is None else x_mask
        kept, moved = x.chunk(2, dim=1)
        shift, log_scale = self.end(self.wn(self.start(kept) * mask, mask, g)).chunk(2, dim=1)
        moved = (moved - shift) * torch.exp(-log_scale) if reverse else shift + torch.exp(log_scale) * moved
        return torch.cat([kept, moved * mask], dim=1), None if reverse else (log_scale * mask).sum((1, 2))


class TextDecoder(nn.Module):
    """A decoder of steps on squeezed time."""

    def __init__(self, channels: int, hidden: int, steps: int, n_split: int = 4, **options: Any) -> None:
        super().__init__()
        self.flows = nn.ModuleList()
        for _ in range(steps):
            self.flows.append(TextActNorm(2 * channels))
            self.flows.append(TextInvConv(2 * channels, n_split))
            self.flows.append(TextCoupling(2 * channels, hidden, **options))

    def forward(
        self, x: Tensor, x_mask: Tensor, g: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x (N, C, T) -> z (N, C, T without what is left over), log_det (N,)."""
        n, c, t = x.shape[0], x.shape[1], x.shape[2] // 2
        x = x[:, :, : 2 * t].reshape(n, c, t, 2).permute(0, 3, 1, 2).reshape(n, 2 * c, t)
        mask = x_mask[:, :, 1::2]
        x, total = x * mask, None if reverse else 0
        for flow in reversed(self.flows) if reverse else self.flows:
            x, log_det = flow(x, mask, g=g, reverse=reverse)
            total = None if reverse else total + log_det
        x = x.reshape(n, 2, c, t).permute(0, 2, 3, 1).reshape(n, c, 2 * t)
        return x * mask.repeat_interleave(2, dim=2), total

    def store_inverse(self) -> None:
        """Keep the inverse of every convolution."""
        for conv in self.flows[1::3]:
            conv.store_inverse()


def mask_of_lengths(lengths: Sequence[int], total: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(N, 1, T): 1 at the first positions of each sample."""
    return (torch.arange(total) < torch.tensor(lengths)[:, None]).to(dtype)[:, None]


@torch.no_grad()
def moved(model: nn.Module, by: float = 0.2) -> Any:
    """The model with every parameter moved from where it starts, determinants positive as Glow-TTS wants them."""
    for module in perturbed(model, by).modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and torch.linalg.det(weight) < 0:
            weight[:, 0] *= -1
    return model
