"""A flow step as y0ast's Glow-PyTorch has it: chaiyujin's equations (srflow.py) under other names.

The net is ``block``, its convolutions are children ``conv`` of modules, LU factors are ``lower`` and ``upper``, and the
step calls its permutation by a function that it holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from support import srflow


class Wrapped(nn.Module):
    """A module of srflow.py, whose convolution is a child without a map, and whose map is its own."""

    def __init__(self, scaled: srflow.Conv2d | srflow.Conv2dZeros) -> None:
        super().__init__()
        size, has_bias = scaled.kernel_size[0], scaled.bias is not None
        self.conv = nn.Conv2d(scaled.in_channels, scaled.out_channels, size, padding=size // 2, bias=has_bias)
        self.conv.load_state_dict(scaled.state_dict(), strict=False)
        if isinstance(scaled, srflow.Conv2d):
            self.actnorm = scaled.actnorm
        else:
            self.logs, self.logscale_factor = scaled.logs, scaled.logscale_factor

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self.conv(input)
        return self.actnorm(out)[0] if hasattr(self, "actnorm") else out * (self.logs * self.logscale_factor).exp()


class InvertibleConv1x1(srflow.InvertibleConv1x1):
    """z = W x at each position; W = P lower (upper + diag(sign exp(log_s)))."""

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels, LU_decomposed=True)
        self.lower, self.upper = self._parameters.pop("l"), self._parameters.pop("u")
        self.LU_decomposed = vars(self).pop("LU")

    def matrix(self) -> tuple[Tensor, Tensor]:
        lower = self.lower.tril(-1) + torch.eye(len(self.p), dtype=self.p.dtype)
        upper = self.upper.triu(1) + torch.diag(self.sign_s * self.log_s.exp())
        return self.p @ lower @ upper, self.log_s.sum()


class FlowStep(srflow.FlowStep):
    """actnorm, permutation, coupling."""

    def __init__(self, in_channels: int, hidden_channels: int, **options: Any) -> None:
        super().__init__(in_channels, hidden_channels, **options)
        parts = self._modules.pop("f")
        self.block = nn.Sequential(*(part if isinstance(part, nn.ReLU) else Wrapped(part) for part in parts))
        permute: Any = getattr(self, self.flow_permutation)
        if self.flow_permutation == "invconv":
            self.invconv = InvertibleConv1x1(in_channels) if permute.LU else permute
            self.flow_permutation: Any = lambda z, logdet, rev: self.invconv(z, logdet, rev)
        else:
            permute.indices, permute.indices_inverse = map(torch.from_numpy, (permute.indices, permute.indices_inverse))
            if self.flow_permutation == "shuffle":
                self.flow_permutation = lambda z, logdet, rev: (self.shuffle(z, rev), logdet)
            else:
                self.flow_permutation = lambda z, logdet, rev: (self.reverse(z, rev), logdet)

    def predicted(self, z1: Tensor) -> Tensor:
        return self.block(z1)

    def _permuted(self, z: Tensor, logdet: Any, reverse: bool) -> tuple[Tensor, Any]:
        return self.flow_permutation(z, logdet, reverse)
