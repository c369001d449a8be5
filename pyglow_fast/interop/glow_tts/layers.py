"""Serves the layers of Glow-TTS, whatever class they are of: they are made subclasses of that class, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._errors import can_read
from pyglow_fast._tracing import is_watched
from pyglow_fast.coupling_nets.masks import (
    MaskedNet,
    is_mask,
    log_scale_of_padding,
    masked_condition,
    positions_of,
    without_padding,
)
from pyglow_fast.interop.glow_tts.structure import (
    coupling_fault,
    dropout_probability,
    wavenet_fault,
    wavenet_parts,
)
from pyglow_fast.interop.stand_in import StandIn
from pyglow_fast.layers.grouped_conv import spread_over_groups
from pyglow_fast.layers.wavenet import run_wavenet, wavenet_bytes, wavenet_halo
from pyglow_fast.reference import CouplingSpec

_SIGMOID_EPS = 1e-6  # what Glow-TTS adds to a scale


class AdoptedLayer(StandIn):
    """A base of the classes that replace layers of Glow-TTS.

    The layer's own forward runs wherever this package's arithmetic does not apply (hooks, other dtypes, torch.func) or
    does not pay (a few hundred positions, as when one sentence is spoken).
    """

    least_positions = 1000  # samples times time steps from which on ours runs

    def is_small(self, x: Any) -> bool:
        """Whether a batch has so few positions that the layer's own code is as fast or faster."""
        return isinstance(x, Tensor) and x.dim() == 3 and x.shape[0] * x.shape[2] < self.least_positions

    def _alone(self, *args: Any, **kwargs: Any) -> Any:
        return self._theirs.forward(self, *args, **kwargs)


def runs_on(module: nn.Module, x: Any, mask: Any, g: Any = None) -> bool:
    """Whether this package's arithmetic applies to the inputs of a module.

    It applies to sequences of the parameters' dtype, with a mask of zeros and ones or none, and with a condition that
    is the same at all positions or none, as long as nothing watches every module's call.
    """
    like = next(module.parameters())
    if not isinstance(x, Tensor) or x.dim() != 3 or x.dtype != like.dtype or x.device != like.device:
        return False
    if x.dtype not in (torch.float32, torch.float64) or torch.nn.modules.module._has_any_global_hook():
        return False
    if (g is not None and (g.dim() != 3 or g.shape[2] != 1)) or is_watched():
        return False
    return mask is None or (not mask.requires_grad and is_mask(mask, x))


class WN(AdoptedLayer):
    """A WaveNet of gated convolutions, m sum_l skip_l: see :func:`pyglow_fast.layers.wavenet.run_wavenet`.

    Examples:
        >>> from torch.nn import Conv1d, Dropout, ModuleDict, ModuleList
        >>> from pyglow_fast.interop.glow_tts import WN, adopt
        >>> class Gated(ModuleDict):  # a net of one layer, as a code base of text to speech has it
        ...     def forward(self, x, mask, g=None):
        ...         a, b = self.drop(self.in_layers[0](x)).chunk(2, dim=1)
        ...         return self.res_skip_layers[0](a.tanh() * b.sigmoid()) * mask
        >>> dilated, mixing = ModuleList([Conv1d(4, 8, 3, padding=1)]), ModuleList([Conv1d(4, 4, 1)])
        >>> net = Gated({"in_layers": dilated, "res_skip_layers": mixing, "drop": Dropout(0.1)})
        >>> adopt(net), isinstance(net, WN), isinstance(net, Gated)  # the name of the model itself is ""
        ([''], True, True)
    """

    def forward(self, x: Tensor, x_mask: Tensor | None = None, g: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Compute the net: x (N, H, T), x_mask (N, 1, T), g (N, C_c, 1) -> (N, H, T)."""
        fits = not self.is_small(x) and runs_on(self, x, x_mask, g) and not wavenet_fault(self)
        mask = x_mask.to(x.dtype) if fits and x_mask is not None else None
        # Values of x behind the end of a sample are cut off here, while their first layer would see them.
        if not fits or (mask is not None and can_read(x) and bool(((x != 0) & (mask == 0)).any())):
            out: Tensor = self._alone(x, x_mask, g, **kwargs)
            return out
        return run_wavenet(wavenet_parts(self), x, g, mask, dropout_probability(self))


class InvConvNear(AdoptedLayer):
    """A 1x1 convolution in groups of channels, z_g = W x_g m: one product with all groups' matrix.

    log_det = log|det W| (C / n_split) times the sample's length. Where det W is negative, Glow-TTS's own is NaN.

    Examples:
        >>> import torch
        >>> from pyglow_fast.interop.glow_tts import InvConvNear, adopt
        >>> class Mixing(torch.nn.Module):  # two channels a group, as a code base of text to speech has it
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight, self.weight_inv = torch.nn.Parameter(torch.eye(2)), None
        ...     def forward(self, x, mask=None, reverse=False):
        ...         mask = torch.ones_like(x[:, :1]) if mask is None else mask
        ...         weight = self.weight.inverse() if reverse else self.weight
        ...         z = torch.einsum("ij,njct->nict", weight, x.unflatten(1, (2, -1))).flatten(1, 2) * mask
        ...         return z, None if reverse else weight.logdet() * x.shape[1] / 2 * mask.sum((1, 2))
        >>> mixing = Mixing()
        >>> adopt(mixing), isinstance(mixing, InvConvNear)
        ([''], True)
    """

    def forward(
        self, x: Tensor, x_mask: Tensor | None = None, reverse: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Map x (N, C, T) to z and log_det (N,), which is None if reverse."""
        own: Any = self
        if self.is_small(x) or not runs_on(self, x, x_mask) or getattr(own, "no_jacobian", False):
            return self._alone(x, x_mask, reverse=reverse, **kwargs)
        mask = None if x_mask is None else x_mask.to(x.dtype)
        weight = own.weight
        if reverse:
            weight = functional.invert_matrix(weight) if own.weight_inv is None else own.weight_inv
        z = functional.channel_mix(x, spread_over_groups(weight, x.shape[1]), x.new_zeros(x.shape[1]))
        z = z if mask is None else z * mask
        if reverse:
            return z, None
        log_det = functional.log_abs_det(weight) * (x.shape[1] // weight.shape[0])
        return z, functional.per_sample(z, log_det) if mask is None else log_det * positions_of(mask)


class BlockNet(nn.Module):
    """A coupling's net end(wn(m start(x1))) as a net for masked sequences.

    Args:
        block: the coupling.
    """

    takes_mask = True
    writes_to_input = False

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        own: Any = block
        self.start, self.wn, self.end = own.start, own.wn, own.end

    @property
    def halo(self) -> int:
        """How many positions to each side an output depends on."""
        layers: Any = self.wn.in_layers
        return wavenet_halo(layers[0].kernel_size[0], [conv.dilation[0] for conv in layers])

    @property
    def deterministic(self) -> bool:
        """Whether no dropout is active."""
        return not dropout_probability(self.wn)

    def bytes_per_position(self, element_size: int) -> int:
        """The most bytes of activations alive in forward and backward, per sample and position."""
        layers: Any = self.wn.in_layers
        edges = self.start.in_channels + self.end.out_channels
        return wavenet_bytes(layers[0].in_channels, len(layers), edges, not self.deterministic, element_size)

    def forward(self, x1: Tensor, cond: Tensor | None, mask: Tensor) -> Tensor:
        """Map x1 (N, C / 2, T), cond (N, C_c, 1) or None, mask (N, 1, T) to (N, C, T)."""
        parts = wavenet_parts(self.wn, self.start, self.end)
        return run_wavenet(parts, x1, cond, mask, dropout_probability(self.wn))


def spec_of(block: nn.Module) -> CouplingSpec:
    """Describe the coupling z_1 = t + s x_1 with s = exp(raw), or sigmoid(raw + 2) + 1e-6."""
    if getattr(block, "sigmoid_scale", False):
        return CouplingSpec("affine", "sigmoid", bias=2.0, eps=_SIGMOID_EPS, order="scale_shift")
    return CouplingSpec("affine", "exp", order="scale_shift")


class CouplingBlock(AdoptedLayer):
    """z = (x_0, (t + s x_1) m), (t, log s) = end(wn(m start(x_0))); log_det = sum over the sample of m log s.

    Examples:
        >>> import torch
        >>> from torch.nn import Conv1d, Dropout, ModuleDict, ModuleList
        >>> from pyglow_fast.interop.glow_tts import CouplingBlock, adopt
        >>> class Gated(ModuleDict):
        ...     def forward(self, x, mask, g=None):
        ...         a, b = self.drop(self.in_layers[0](x)).chunk(2, dim=1)
        ...         return self.res_skip_layers[0](a.tanh() * b.sigmoid()) * mask
        >>> class Affine(ModuleDict):
        ...     def forward(self, x, mask, reverse=False, g=None):
        ...         x0, x1 = x.chunk(2, dim=1)
        ...         t, log_s = self.end(self.wn(self.start(x0) * mask, mask)).chunk(2, dim=1)
        ...         x1 = ((x1 - t) * (-log_s).exp() if reverse else t + log_s.exp() * x1) * mask
        ...         return torch.cat([x0, x1], dim=1), None if reverse else (log_s * mask).sum((1, 2))
        >>> dilated, mixing = ModuleList([Conv1d(4, 8, 3, padding=1)]), ModuleList([Conv1d(4, 4, 1)])
        >>> net = Gated({"in_layers": dilated, "res_skip_layers": mixing, "drop": Dropout(0.1)})
        >>> block = Affine({"start": Conv1d(2, 4, 1), "wn": net, "end": Conv1d(4, 4, 1)})
        >>> adopt(block), isinstance(block, CouplingBlock)  # the coupling itself, and the net in it
        (['', 'wn'], True)
    """

    def forward(
        self,
        x: Tensor,
        x_mask: Tensor | None = None,
        reverse: bool = False,
        g: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Map x (N, C, T), x_mask (N, 1, T), g (N, C_c, 1) to z and log_det (N,), which is None if reverse."""
        if self.is_small(x) or not runs_on(self, x, x_mask, g) or coupling_fault(self):
            return self._alone(x, x_mask, reverse=reverse, g=g, **kwargs)
        mask = x.new_ones(x.shape[0], 1, x.shape[2]) if x_mask is None else x_mask.to(x.dtype)
        net, spec, half = MaskedNet(BlockNet(self)), spec_of(self), x.shape[1] // 2
        # Theirs leaves the first half as it is; the second it masks.
        net_out = net(x[:, :half], masked_condition(mask, g))
        z, log_det = (functional.coupling_inverse if reverse else functional.coupling)(x, net_out, spec)
        if x_mask is not None:
            z = torch.cat([z[:, :half], without_padding(z[:, half:], mask)], dim=1)
        return z, None if reverse else log_det - log_scale_of_padding([spec], mask, half)
