"""Computes normflows' GlowBlock, and says what it is in the terms of this package."""

from __future__ import annotations

from typing import Any, NamedTuple

import normflows.flows
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._errors import expect
from pyglow_fast.interop import nets
from pyglow_fast.interop.normflows.adoption import adopt, is_untouched, stands_in
from pyglow_fast.interop.normflows.coupling import TO_Z, AffineCouplingBlock, ShiftThenRaw, reciprocal_sigmoid
from pyglow_fast.interop.normflows.layers import ActNorm, Invertible1x1Conv, check_images, in_full
from pyglow_fast.layers.actnorm import refused_alike
from pyglow_fast.reference import CouplingSpec
from pyglow_fast.reversible.steps import ChannelMap


@stands_in
class GlowBlock(normflows.flows.GlowBlock):
    """u = W ((x - t) exp(-s)), z = the affine coupling of u; log_det = sum log scale + P (log|det W| - sum s).

    These are the equations of ``inverse``, x -> z; ``forward`` is z -> x. Where the layers are as the constructor made
    them, actnorm and 1x1 convolution are one product. The first pass in either direction initialises the actnorms; see
    :class:`ActNorm`.

    Args:
        channels: C.
        hidden_channels: width of both hidden layers of the coupling's net.
        scale: whether the coupling has a scale.
        scale_map: "exp", "sigmoid" or "sigmoid_inv"; see AffineCoupling.
        split_mode: "channel", "channel_inv", "checkerboard" or "checkerboard_inv"; see AffineCouplingBlock.
        leaky: slope of the net's LeakyReLUs.
        init_zeros: whether the net's last convolution starts at zero.
        use_lu: whether the 1x1 convolution is parametrised by its LU factors.
        net_actnorm: an actnorm in the place of a bias after each hidden convolution of the net.

    Shapes: z (N, C, H, W), float32 or float64; log_det (N,), nats.

    Raises:
        NotImplementedError: an unknown split mode or, when it is called, scale map.
        ValueError: see ActNorm, AffineCoupling and Invertible1x1Conv.

    Reference: Kingma & Dhariwal 2018, table 1.

    Examples:
        >>> import normflows, torch
        >>> from pyglow_fast.interop.normflows import GlowBlock
        >>> ours, theirs = GlowBlock(4, 8), normflows.flows.GlowBlock(4, 8)
        >>> x = torch.randn(2, 4, 6, 6)
        >>> _ = ours.inverse(x)  # the first pass initialises the actnorm
        >>> _ = theirs.load_state_dict(ours.state_dict())
        >>> torch.allclose(ours.inverse(x)[0], theirs.inverse(x)[0], atol=1e-5)
        True
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int,
        scale: bool = True,
        scale_map: str = "sigmoid",
        split_mode: str = "channel",
        leaky: float = 0.0,
        init_zeros: bool = True,
        use_lu: bool = True,
        net_actnorm: bool = False,
    ) -> None:
        super().__init__(
            channels, hidden_channels, scale, scale_map, split_mode, leaky, init_zeros, use_lu, net_actnorm
        )
        adopt(self)

    @property
    def is_initialized(self) -> bool:
        """Whether every actnorm, also in the net, has seen data."""
        return all(module.is_initialized for module in self.modules() if isinstance(module, ActNorm))

    def channel_layers(self) -> tuple[Invertible1x1Conv, ActNorm] | None:
        """Find the layers that fold into one product; None if these are not what the constructor made."""
        if len(self.flows) != 3:
            return None
        _, conv, actnorm = self.flows
        plain = is_untouched(conv, Invertible1x1Conv) and is_untouched(actnorm, ActNorm)
        return (conv, actnorm) if plain and actnorm.s.shape == (1, conv.num_channels, 1, 1) else None

    def _folded(self, z: Tensor) -> tuple[ChannelMap, Tensor] | None:
        """The map u = M x + c and t, differentiable; None where the layers are to be called one by one."""
        layers = self.channel_layers()
        if layers is None or not layers[1].is_initialized or not is_untouched(self.flows[0], AffineCouplingBlock):
            return None
        check_images(z, layers[0].num_channels)
        return fold(*layers), layers[1].t.flatten()

    def _check_first(self, z: Tensor) -> None:
        """Refuse on all ranks, before an initialisation, what one of the actnorms, maybe not the first, would."""
        if self.is_initialized:
            return
        layers = self.channel_layers()
        with refused_alike(next(self.parameters()).device):
            check_images(z, None if layers is None else layers[0].num_channels)
            expect(z.numel() > 0, "z", "a batch that is not empty to initialise from", tuple(z.shape))
            expect(bool(z.isfinite().all()), "z", "finite values to initialise actnorm from", "NaN or inf")

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map latents z to data x."""
        folded = self._folded(z)
        if folded is None:
            self._check_first(z)
            out: tuple[Tensor, Tensor] = super().forward(z)
            return out
        channel_map, t = folded
        u, log_det = self.flows[0](in_full(z, t))
        # x = M^-1 u + t: no difference of large numbers, as M^-1 (u - c) would be where t is large.
        x = functional.channel_mix(u, functional.invert_matrix(channel_map.matrix), t)
        return x, log_det - channel_map.log_det * functional.n_positions(z)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map data x to latents z."""
        folded = self._folded(z)
        if folded is None:
            self._check_first(z)
            out: tuple[Tensor, Tensor] = super().inverse(z)
            return out
        channel_map, t = folded
        u = functional.channel_unmix(in_full(z, t), channel_map.matrix, t)  # M (x - t), precise for the same reason
        z, log_det = self.flows[0].inverse(u)
        return z, log_det + channel_map.log_det * functional.n_positions(u)


def fold(conv: Invertible1x1Conv, actnorm: ActNorm) -> ChannelMap:
    """Fold actnorm and convolution, x to z: u = M x + c, M = W diag(exp(-s)), c = -M t; gives M, c, log|det M|."""
    weight, weight_log_det = conv.weight_and_log_det()
    log_scale = -actnorm.s.flatten()
    matrix, offset = functional.fold_actnorm(weight, log_scale, -actnorm.t.flatten())
    return ChannelMap(matrix, offset, weight_log_det + log_scale.sum())


class FlowParts(NamedTuple):
    """A GlowBlock from x to z: u = M x + c, then functional.coupling(u, net_out, spec), net_out = run_net(u[:, :kept]).

    ``channel_map`` is computed from the parameters of now, and differentiable; ``net`` is the block's own module, whose
    output ``order`` brings into the order and signs of ``spec``; the log-det is P channel_map.log_det plus the
    coupling's.

    Examples:
        >>> import torch
        >>> from pyglow_fast import functional
        >>> from pyglow_fast.interop.normflows import FlowParts, GlowBlock, flow_parts
        >>> block, x = GlowBlock(4, 8), torch.randn(2, 4, 6, 6)
        >>> z, _ = block.inverse(x)
        >>> parts = flow_parts(block)
        >>> u = functional.channel_mix(x, parts.channel_map.matrix, parts.channel_map.offset)
        >>> rebuilt, _ = functional.coupling(u, parts.run_net(u[:, : parts.kept]), parts.spec)
        >>> isinstance(parts, FlowParts), torch.allclose(rebuilt, z, atol=1e-5)
        (True, True)
    """

    channel_map: ChannelMap
    kept: int
    net: nn.Module
    order: ShiftThenRaw
    spec: CouplingSpec

    def run_net(self, u1: Tensor) -> Tensor:
        """Run the net on (N, kept, H, W): shift and raw scale (N, 2 (C - kept), H, W), or shift (N, C - kept, H, W)."""
        return nets.run(self.net, u1, self.order)


def flow_parts(block: Any) -> FlowParts | str:
    """Describe what an adopted GlowBlock computes from x to z by this package's functions, or say why it cannot be.

    The block must be initialised: one that is not (``block.is_initialized``) must see data first.
    """
    if not is_untouched(block, GlowBlock):
        return f"a {type(block).__name__} with hooks or overridden methods, or no GlowBlock of ours"
    layers = block.channel_layers()
    if layers is None:
        return "not an actnorm and a 1x1 convolution as a GlowBlock has them"
    coupling = block.flows[0]
    if not is_untouched(coupling, AffineCouplingBlock) or not coupling.splits_channels:
        return "a coupling that does not split by channels, or that is not as a GlowBlock has it"
    affine = coupling.flows[1]
    if affine.scale and affine.scale_map not in TO_Z:
        return f"an unknown scale map {affine.scale_map!r}"
    form = affine.form(TO_Z)
    spec, order = form.spec, form.order
    if form.inverse:  # the kernels know the inverse only
        spec, order = CouplingSpec(scale_map=reciprocal_sigmoid), ShiftThenRaw(-1, 1)
    return FlowParts(fold(*layers), (layers[0].num_channels + 1) // 2, affine.param_map, order, spec)
