"""A flow step with the interface of chaiyujin's and SRFlow's, written from their equations: names, calls, shapes.

The projects' own code is not needed and not used: the adapter goes by attributes, the calls ``(input, logdet,
reverse)`` and the equations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def apart(h: Tensor) -> tuple[Tensor, Tensor]:
    """Even channels, odd channels."""
    return h[:, 0::2], h[:, 1::2]


class ActNorm2d(nn.Module):
    """(x + bias) exp(logs); set from the first batch in training, which an attribute remembers."""

    def __init__(self, num_features: int, scale: float = 1.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, num_features, 1, 1))
        self.logs = nn.Parameter(torch.zeros(1, num_features, 1, 1))
        self.num_features, self.scale, self.inited = num_features, scale, False

    def forward(self, input: Tensor, logdet: Any = None, reverse: bool = False) -> tuple[Tensor, Any]:
        if not self.inited and self.training:
            with torch.no_grad():
                mean = input.mean((0, 2, 3), keepdim=True)
                variance = (input - mean).square().mean((0, 2, 3), keepdim=True)
                self.bias.copy_(-mean)
                self.logs.copy_((self.scale / (variance.sqrt() + 1e-6)).log())
            self.inited = True
        gained = self.logs.sum() * input[0, 0].numel()
        if reverse:
            return input * (-self.logs).exp() - self.bias, None if logdet is None else logdet - gained
        return (input + self.bias) * self.logs.exp(), None if logdet is None else logdet + gained


class Conv2d(nn.Conv2d):
    """A convolution that keeps the size, then an actnorm."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        nn.init.normal_(self.weight, 0.0, 0.05)
        self.actnorm = ActNorm2d(out_channels)

    def forward(self, input: Tensor) -> Tensor:
        return self.actnorm(super().forward(input))[0]


class Conv2dZeros(nn.Conv2d):
    """A 3x3 convolution that starts at zero, times exp(3 logs)."""

    def __init__(self, in_channels: int, out_channels: int, logscale_factor: float = 3) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.logscale_factor = logscale_factor
        self.logs = nn.Parameter(torch.zeros(out_channels, 1, 1))
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (self.logs * self.logscale_factor).exp()


def net(in_channels: int, out_channels: int, hidden: int) -> nn.Sequential:
    layers = [Conv2d(in_channels, hidden), nn.ReLU(), Conv2d(hidden, hidden, 1), nn.ReLU()]
    return nn.Sequential(*layers, Conv2dZeros(hidden, out_channels))


class Permute2d(nn.Module):
    """Channels in another order, which is no part of the state dict."""

    def __init__(self, num_channels: int, shuffle: bool) -> None:
        super().__init__()
        self.num_channels = num_channels
        order = torch.randperm(num_channels) if shuffle else torch.arange(num_channels).flip(0)
        self.indices, self.indices_inverse = order.numpy(), order.argsort().numpy()

    def forward(self, input: Tensor, reverse: bool = False) -> Tensor:
        return input[:, self.indices_inverse if reverse else self.indices]


class InvertibleConv1x1(nn.Module):
    """z = W x at each position; W plain, or P L (U + diag(sign exp(log_s)))."""

    def __init__(self, num_channels: int, LU_decomposed: bool = False) -> None:
        super().__init__()
        weight = torch.linalg.qr(torch.randn(num_channels, num_channels))[0]
        self.w_shape, self.LU = [num_channels, num_channels], LU_decomposed
        if LU_decomposed:
            p, lower, upper = torch.linalg.lu(weight)
            self.register_buffer("p", p)
            self.register_buffer("sign_s", upper.diagonal().sign())
            self.l = nn.Parameter(lower)
            self.log_s = nn.Parameter(upper.diagonal().abs().log())
            self.u = nn.Parameter(upper.triu(1))
        else:
            self.weight = nn.Parameter(weight)

    def matrix(self) -> tuple[Tensor, Tensor]:
        if not self.LU:
            return self.weight, torch.linalg.slogdet(self.weight)[1]
        eye = torch.eye(self.w_shape[0], dtype=self.l.dtype)
        upper = self.u.triu(1) + torch.diag(self.sign_s * self.log_s.exp())
        return self.p @ (self.l.tril(-1) + eye) @ upper, self.log_s.sum()

    def forward(self, input: Tensor, logdet: Any = None, reverse: bool = False) -> tuple[Tensor, Any]:
        weight, log_abs_det = self.matrix()
        gained = log_abs_det * input[0, 0].numel()
        if reverse:
            weight, gained = torch.inverse(weight.double()).to(weight.dtype), -gained
        return F.conv2d(input, weight[:, :, None, None]), None if logdet is None else logdet + gained


class CondAffineSeparatedAndCond(nn.Module):
    """An affine map of all channels by the features alone, then one of half of them by the other half and these."""

    def __init__(self, in_channels: int, features: int, hidden: int, eps: float = 1e-4) -> None:
        super().__init__()
        self.need_features, self.in_channels, self.in_channels_rrdb = True, in_channels, features
        self.hidden_channels, self.affine_eps = hidden, eps
        self.channels_for_nn = in_channels // 2
        self.channels_for_co = in_channels - self.channels_for_nn
        self.fAffine = net(self.channels_for_nn + features, 2 * self.channels_for_co, hidden)
        self.fFeatures = net(features, 2 * in_channels, hidden)

    def _shift_scale(self, h: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = apart(h)
        return shift, torch.sigmoid(raw + 2.0) + self.affine_eps

    def forward(self, input: Tensor, logdet: Any = None, reverse: bool = False, ft: Any = None) -> tuple[Tensor, Any]:
        n, z = self.channels_for_nn, input
        shift_all, scale_all = self._shift_scale(self.fFeatures(ft))
        if not reverse:
            z = (z + shift_all) * scale_all
        shift, scale = self._shift_scale(self.fAffine(torch.cat([z[:, :n], ft], dim=1)))
        gained = scale.log().sum((1, 2, 3)) + scale_all.log().sum((1, 2, 3))
        if reverse:
            z = torch.cat([z[:, :n], z[:, n:] / scale - shift], dim=1)
            return z / scale_all - shift_all, logdet - gained
        return torch.cat([z[:, :n], (z[:, n:] + shift) * scale], dim=1), logdet + gained


class FlowStep(nn.Module):
    """actnorm, permutation, coupling: "additive" and "affine" as chaiyujin's, the others as SRFlow's."""

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        flow_permutation: str = "invconv",
        flow_coupling: str = "affine",
        LU_decomposed: bool = False,
        features: int = 0,
        position: str | None = None,
    ) -> None:
        super().__init__()
        self.flow_permutation, self.flow_coupling, self.position = flow_permutation, flow_coupling, position
        self.actnorm = ActNorm2d(in_channels)
        if flow_permutation == "invconv":
            self.invconv = InvertibleConv1x1(in_channels, LU_decomposed)
        else:
            setattr(self, flow_permutation, Permute2d(in_channels, flow_permutation == "shuffle"))
        if flow_coupling == "CondAffineSeparatedAndCond":
            self.affine = CondAffineSeparatedAndCond(in_channels, features, hidden_channels)
        elif flow_coupling != "noCoupling":
            width = in_channels if flow_coupling == "affine" else in_channels // 2
            self.f = net(in_channels // 2, width, hidden_channels)

    def predicted(self, z1: Tensor) -> Tensor:
        """What the net of the coupling says."""
        return self.f(z1)

    def _permuted(self, z: Tensor, logdet: Any, reverse: bool) -> tuple[Tensor, Any]:
        if self.flow_permutation == "invconv":
            return self.invconv(z, logdet, reverse)
        return getattr(self, self.flow_permutation)(z, reverse), logdet

    def _coupled(self, z: Tensor, logdet: Any, reverse: bool, rrdbResults: Any) -> tuple[Tensor, Any]:
        if self.flow_coupling == "noCoupling":
            return z, logdet
        if self.flow_coupling == "CondAffineSeparatedAndCond":
            ft = rrdbResults[self.position] if isinstance(rrdbResults, Mapping) else rrdbResults
            return self.affine(input=z, logdet=logdet, reverse=reverse, ft=ft)
        z1, z2 = z.chunk(2, dim=1)
        h = self.predicted(z1)
        if self.flow_coupling == "additive":
            return torch.cat([z1, z2 - h if reverse else z2 + h], dim=1), logdet
        shift, raw = apart(h)
        scale = torch.sigmoid(raw + 2.0)
        gained = scale.log().sum((1, 2, 3))
        if reverse:
            return torch.cat([z1, z2 / scale - shift], dim=1), logdet - gained
        return torch.cat([z1, (z2 + shift) * scale], dim=1), logdet + gained

    def forward(
        self, input: Tensor, logdet: Any = None, reverse: bool = False, rrdbResults: Any = None
    ) -> tuple[Tensor, Any]:
        if reverse:
            z, logdet = self._coupled(input, logdet, True, rrdbResults)
            z, logdet = self._permuted(z, logdet, True)
            return self.actnorm(z, logdet, True)
        z, logdet = self.actnorm(input, logdet, False)
        z, logdet = self._permuted(z, logdet, False)
        return self._coupled(z, logdet, False, rrdbResults)
