"""One step of Glow, with actnorm and the channel permutation folded into one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._errors import expect
from pyglow_fast.layers._base import FlowLayer, check_input
from pyglow_fast.layers.actnorm import ActNorm
from pyglow_fast.layers.coupling import Coupling
from pyglow_fast.layers.coupling_net import CouplingNet
from pyglow_fast.layers.permutation import ChannelLinear, InvConv, Permute
from pyglow_fast.reference import fold_actnorm, lu_weight

PERMUTATIONS = ("invconv", "invconv_plain", "shuffle", "reverse")


class ChannelMap(NamedTuple):
    """The folded actnorm and permutation of one step: u = matrix x + offset."""

    matrix: Tensor  # (C, C)
    offset: Tensor  # (C,)
    log_det: Tensor  # (), log|det matrix|


def _stacked_weights(layers: Sequence[ChannelLinear]) -> tuple[Tensor, Tensor]:
    """W (K, C, C) and log|det W| (K,), in a few batched ops when all layers are of one parameterisation."""
    convs = [layer for layer in layers if isinstance(layer, InvConv)]
    if len(convs) == len(layers) and all(conv.lu for conv in convs):
        names = ("permutation", "lower", "upper", "log_diag", "sign_diag")
        factors = [torch.stack([getattr(conv, name) for conv in convs]) for name in names]
        return lu_weight(*factors), factors[3].sum(-1)
    if len(convs) == len(layers) and not any(conv.lu for conv in convs):
        weight = torch.stack([conv.weight for conv in convs])
        return weight, torch.linalg.slogdet(weight).logabsdet
    pairs = [layer.weight_and_log_det() for layer in layers]
    return torch.stack([weight for weight, _ in pairs]), torch.stack([log_det for _, log_det in pairs])


def fold_steps(steps: Sequence[FlowStep]) -> list[ChannelMap]:
    """The channel maps of K steps of one width, computed in one batch: parameter-sized work, no per-step kernels."""
    weight, weight_log_det = _stacked_weights([step.permutation for step in steps])
    log_scale = torch.stack([step.actnorm.log_scale for step in steps])
    bias = torch.stack([step.actnorm.bias for step in steps])
    matrix, offset = fold_actnorm(weight, log_scale, bias)
    log_det = weight_log_det + log_scale.sum(-1)
    return [ChannelMap(*parts) for parts in zip(matrix.unbind(), offset.unbind(), log_det.unbind(), strict=True)]


def invert_maps(maps: Sequence[ChannelMap]) -> list[Tensor]:
    """M^-1 of each map, in one batch."""
    return list(functional.invert_matrix(torch.stack([channel_map.matrix for channel_map in maps])).unbind())


class FlowStep(FlowLayer):
    """u = M x + c (actnorm and invertible 1x1 convolution, folded), then the coupling of u.

    log_det = P (sum log_scale + log|det W|) + sum log s.

    Args:
        channels: C, even.
        hidden: width of the coupling net.
        coupling: "affine" or "additive".
        permutation: "invconv" (LU), "invconv_plain", "shuffle" or "reverse".
        net: a coupling net of your own instead of CouplingNet (then hidden, net_actnorm, cond_channels are not used).
        net_actnorm: ActNorm inside the coupling net.
        cond_channels: channels of the conditioning input.
        dims: number of spatial dimensions, 1 to 3.
        scale_map, scale_bias, scale_eps, scale_clamp, order: see Coupling.

    Shapes: x (N, C, *spatial), float32 or float64; log_det (N,), nats.

    Raises:
        ValueError: odd channels, wrong option, shape, dtype or device.

    Reference: Kingma & Dhariwal 2018, table 1.
    """

    def __init__(
        self,
        channels: int,
        hidden: int = 512,
        coupling: str = "affine",
        permutation: str = "invconv",
        net: nn.Module | None = None,
        net_actnorm: bool = False,
        cond_channels: int = 0,
        dims: int = 2,
        scale_map: str | Callable[[Tensor], tuple[Tensor, Tensor]] = "sigmoid",
        scale_bias: float = 2.0,
        scale_eps: float = 0.0,
        scale_clamp: float = 2.0,
        order: str = "shift_scale",
    ) -> None:
        super().__init__()
        expect(channels >= 2 and channels % 2 == 0, "channels", "an even number to halve", channels)
        expect(permutation in PERMUTATIONS, "permutation", f"one of {PERMUTATIONS}", repr(permutation))
        if net is None:
            width = channels if coupling == "affine" else channels // 2
            net = CouplingNet(channels // 2, width, hidden, net_actnorm, cond_channels, dims)
        self.channels = channels
        self.actnorm = ActNorm(channels)
        self.permutation: ChannelLinear = (
            InvConv(channels, lu=permutation == "invconv")
            if permutation.startswith("invconv")
            else Permute(channels, permutation)
        )
        self.coupling = Coupling(net, coupling, scale_map, scale_bias, scale_eps, scale_clamp, order)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x -> z; a fresh step in training initialises its actnorm from x first."""
        check_input("x", x, self.channels, self.actnorm.bias)
        if self.training and not self.actnorm.is_initialized:
            self.actnorm.initialize_from(x)
        return self.apply_map(x, fold_steps([self])[0], cond)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z -> x."""
        check_input("z", z, self.channels, self.actnorm.bias)
        channel_map = fold_steps([self])[0]
        return self.apply_inverse_map(z, channel_map, invert_maps([channel_map])[0], cond)

    def initialize(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Initialise every actnorm of the step (also those of the net) from x, and return z."""
        with torch.no_grad():
            check_input("x", x, self.channels, self.actnorm.bias)
            if not self.actnorm.is_initialized:
                self.actnorm.initialize_from(x)
            channel_map = fold_steps([self])[0]
            return self.coupling.initialize(functional.channel_mix(x, channel_map.matrix, channel_map.offset), cond)

    def apply_map(self, x: Tensor, channel_map: ChannelMap, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The step with its channel map already folded: what a level calls after folding all of its steps at once."""
        u = functional.channel_mix(x, channel_map.matrix, channel_map.offset)
        z, log_det = self.coupling(u, cond)
        return z, log_det + channel_map.log_det * functional.n_positions(x)

    def apply_inverse_map(
        self, z: Tensor, channel_map: ChannelMap, inverse_matrix: Tensor, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The inverse step with its channel map and inverse matrix given."""
        u, log_det = self.coupling.inverse(z, cond)
        x = functional.channel_unmix(u, inverse_matrix, channel_map.offset)
        return x, log_det - channel_map.log_det * functional.n_positions(z)
