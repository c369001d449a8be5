"""What mixes the channels between couplings: the invertible 1x1 convolution and fixed permutations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._errors import check_count, check_input, expect
from pyglow_fast.layers._base import FlowLayer
from pyglow_fast.reference import lu_weight


class ChannelLinear(FlowLayer):
    """z = W x at every position; subclasses say what W (C, C) and log|det W| are. log_det = P log|det W|."""

    channels: int

    def weight_and_log_det(self) -> tuple[Tensor, Tensor]:
        """W (C, C) and log|det W| ()."""
        raise TypeError(f"{type(self).__name__} must define weight_and_log_det")

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x -> z = W x."""
        weight, log_det = self.weight_and_log_det()
        check_input("x", x, self.channels, weight)
        return functional.channel_linear(x, weight, log_det)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z -> x = W^-1 z."""
        weight, log_det = self.weight_and_log_det()
        check_input("z", z, self.channels, weight)
        return functional.channel_linear_inverse(z, weight, log_det)

    def extra_repr(self) -> str:
        """Channels, for repr."""
        return f"{self.channels}"


class InvConv(ChannelLinear):
    """Invertible 1x1 convolution: z = W x at every position; log_det = P log|det W|.

    ``lu=True``: W = P L (U + diag(sign exp(log_diag))) with the permutation P and the signs fixed, so log|det W| =
    sum log_diag; ``lu=False``: W itself is the parameter and log|det W| comes from its LU factors. Either starts as a
    random rotation.

    Args:
        channels: C.
        lu: which parameterisation.

    Shapes: x (N, C, *spatial), float32 or float64; log_det (N,), nats.

    Raises:
        ValueError: wrong shape, dtype or device; inverse of a singular W.

    Reference: Kingma & Dhariwal 2018, section 3.2.
    """

    permutation: Tensor
    sign_diag: Tensor

    def __init__(self, channels: int, lu: bool = True) -> None:
        super().__init__()
        check_count("channels", channels)
        self.channels, self.lu = channels, lu
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64)).Q
        if not lu:
            self.weight = nn.Parameter(rotation.to(torch.get_default_dtype()))
            return
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.register_buffer("permutation", permutation.argmax(dim=1))  # (P A)[i] = A[permutation[i]]
        self.register_buffer("sign_diag", diagonal.sign().to(torch.get_default_dtype()))
        self.lower = nn.Parameter(lower.tril(-1).to(torch.get_default_dtype()))
        self.upper = nn.Parameter(upper.triu(1).to(torch.get_default_dtype()))
        self.log_diag = nn.Parameter(diagonal.abs().log().to(torch.get_default_dtype()))

    def weight_and_log_det(self) -> tuple[Tensor, Tensor]:
        """W (C, C) and log|det W| ()."""
        if self.lu:
            weight = lu_weight(self.permutation, self.lower, self.upper, self.log_diag, self.sign_diag)
            return weight, self.log_diag.sum()
        return self.weight, torch.linalg.slogdet(self.weight).logabsdet

    def extra_repr(self) -> str:
        """Channels and parameterisation, for repr."""
        return f"{self.channels}, lu={self.lu}"


class Permute(ChannelLinear):
    """z[:, i] = x[:, index[i]]; log_det = 0.

    Args:
        channels: C.
        kind: "shuffle", a random order fixed at construction and saved with the weights, or "reverse".

    Shapes: x (N, C, *spatial), float32 or float64; log_det (N,), zero.

    Raises:
        ValueError: wrong kind, shape, dtype or device.

    References: Dinh et al. 2014 and 2017 (reverse), Kingma & Dhariwal 2018, section 6 (shuffle).
    """

    index: Tensor
    unit: Tensor

    def __init__(self, channels: int, kind: str = "shuffle") -> None:
        super().__init__()
        check_count("channels", channels)
        expect(kind in ("shuffle", "reverse"), "kind", "'shuffle' or 'reverse'", repr(kind))
        self.channels, self.kind = channels, kind
        index = torch.randperm(channels) if kind == "shuffle" else torch.arange(channels).flip(0)
        self.register_buffer("index", index)
        # Not saved: it only tells the dtype that W must have, and follows .to() like a parameter.
        self.register_buffer("unit", torch.ones(()), persistent=False)

    def weight_and_log_det(self) -> tuple[Tensor, Tensor]:
        """The permutation matrix (C, C) and 0."""
        eye = torch.eye(self.channels, dtype=self.unit.dtype, device=self.unit.device)
        return eye[self.index], self.unit.new_zeros(())

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x -> z, by gathering channels."""
        check_input("x", x, self.channels, self.unit)
        return x.index_select(1, self.index), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z -> x, by gathering with the inverse order."""
        check_input("z", z, self.channels, self.unit)
        return z.index_select(1, self.index.argsort()), z.new_zeros(z.shape[0])

    def extra_repr(self) -> str:
        """Channels and kind, for repr."""
        return f"{self.channels}, {self.kind!r}"
