"""Describes runs of nflows' layers as flow steps of this package, which a joined chain is built from.

``forward`` is x -> z here as in nflows. All functions take the layers of nflows and those of this package alike,
without hooks or overridden methods; of anything else they say why not, in words for a report. What they return is
differentiable in the layers' parameters, of which no copy is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from nflows import transforms
from nflows.transforms.permutations import Permutation
from torch import Tensor, nn

from pyglow_fast.coupling_nets.traits import has_hooks
from pyglow_fast.interop.nflows import convolution as conv
from pyglow_fast.interop.nflows import coupling as couplings
from pyglow_fast.interop.nflows._state import as_it_comes, is_initialized
from pyglow_fast.layers.flow_step import after
from pyglow_fast.reference import CouplingSpec
from pyglow_fast.reversible.steps import ChannelMap


class CouplingParts(NamedTuple):
    """A coupling as ``functional.coupling`` takes it: y, log_det = coupling(u, net(u[:, :kept], None), spec).

    Examples:
        >>> import torch
        >>> from nflows.nn.nets import ConvResidualNet
        >>> from pyglow_fast import functional
        >>> from pyglow_fast.interop.nflows import AffineCouplingTransform, CouplingParts, coupling_parts
        >>> mask = torch.tensor([0, 0, 1, 1])
        >>> coupling = AffineCouplingTransform(mask, lambda kept, out: ConvResidualNet(kept, out, hidden_channels=4))
        >>> parts = coupling_parts(coupling)
        >>> u = torch.randn(2, 4, 6, 6)
        >>> y, log_det = functional.coupling(u, parts.net(u[:, :2], None), parts.spec)
        >>> isinstance(parts, CouplingParts), torch.allclose(y, coupling(u)[0], atol=1e-6)
        (True, True)
    """

    net: nn.Module  # called with (kept channels, context)
    spec: CouplingSpec
    kept: int
    order: Tensor | None  # u = inputs[:, order], outputs = y[:, order.argsort()]; None: the kept channels come first


class StepParts(NamedTuple):
    """u = matrix x + offset, then the coupling of u: P log_det + log_det of the coupling, P the number of positions.

    The rows of ``matrix`` are in the order that the coupling takes, so the outputs are y[:, order.argsort()]. In a run
    of steps this can go into the columns of the next matrix: ``matrix[:, order]`` with the order of the step before, or
    of a gather ``order.argsort()[source]``.

    Examples:
        >>> import torch
        >>> from nflows.nn.nets import ConvResidualNet
        >>> from pyglow_fast.interop.nflows import AffineCouplingTransform, OneByOneConvolution, StepParts, step_parts
        >>> mask = torch.tensor([0, 0, 1, 1])
        >>> coupling = AffineCouplingTransform(mask, lambda kept, out: ConvResidualNet(kept, out, hidden_channels=4))
        >>> parts = step_parts([OneByOneConvolution(4), coupling])
        >>> isinstance(parts, StepParts), parts.matrix.shape, parts.net is coupling.transform_net
        (True, torch.Size([4, 4]), True)
    """

    matrix: Tensor  # (C, C); with a source (C,), the scales of a gather
    offset: Tensor  # (C,)
    log_det: Tensor  # (), log|det matrix|
    net: nn.Module
    spec: CouplingSpec
    kept: int
    order: Tensor | None
    source: Tensor | None = None  # (C,)


def waits_for_data(layer: nn.Module) -> bool:
    """Whether a layer's next training forward will set its parameters, so that it must run by itself before."""
    return isinstance(layer, transforms.ActNorm) and layer.training and not is_initialized(layer)


def _one_map(layer: nn.Module, dtype: torch.dtype | None) -> ChannelMap | str:
    name = type(layer).__name__
    if has_hooks(layer):
        return f"hooks on its {name}"
    if isinstance(layer, transforms.ActNorm):
        if not as_it_comes(layer, "forward", "inverse"):
            return f"{name} has a forward of its own"
        scale = layer.scale
        return ChannelMap(scale, layer.shift, layer.log_scale.sum(), torch.arange(len(scale), device=scale.device))
    if isinstance(layer, transforms.OneByOneConvolution):
        order = conv.channel_order(layer)
        if order is None or not as_it_comes(layer, "forward", "inverse", "weight", "logabsdet", *conv._MATRICES):
            return f"{name} has a permutation or a matrix of its own"
        return ChannelMap(layer.weight()[:, order], layer.bias, layer.logabsdet())
    if isinstance(layer, Permutation):
        if layer._dim != 1 or not as_it_comes(layer, "forward", "inverse", "_permute"):
            return f"{name} permutes in a way of its own"
        ones = torch.ones(len(layer._permutation), dtype=dtype, device=layer._permutation.device)
        return ChannelMap(ones, torch.zeros_like(ones), ones.new_zeros(()), layer._permutation)
    return f"a {name}, which does not mix channels"


def channel_map(layers: Sequence[nn.Module], dtype: torch.dtype | None = None) -> ChannelMap | str:
    """Compute M, c and log|det M| of M x + c = what mixing layers do in turn, or say why there are none.

    M is (C, C), c (C,) and log|det M| (), in the dtype of the parameters; Permutations alone have none, and take the
    one given (None: torch's default). Without a convolution among the layers the map is a gather. The layers must not
    wait for data.
    """
    whole: ChannelMap | None = None
    for layer in layers:
        part = _one_map(layer, dtype)
        if isinstance(part, str):
            return part
        if whole is None:
            whole = part
            continue
        dtype = torch.promote_types(whole.matrix.dtype, part.matrix.dtype)  # a permutation has none of its own
        before, now = (
            ChannelMap(half.matrix.to(dtype), half.offset.to(dtype), half.log_det.to(dtype), half.source)
            for half in (whole, part)
        )
        if len(before.matrix) != len(now.matrix):
            return f"a {type(layer).__name__} of {len(now.matrix)} channels after {len(before.matrix)}"
        whole = after(before, now)
    return "no layer" if whole is None else whole


def coupling_parts(layer: nn.Module) -> CouplingParts | str:
    """Read the net and the CouplingSpec of an affine or additive coupling, or say why it cannot be run so."""
    spec = couplings.coupling_spec(layer)
    return spec if isinstance(spec, str) else _coupling_parts(layer, spec)


def _coupling_parts(layer: Any, spec: CouplingSpec) -> CouplingParts | str:
    name = type(layer).__name__
    if has_hooks(layer) or not as_it_comes(layer, "forward", "inverse"):
        return f"hooks on its {name}, or a forward of its own"
    if layer.unconditional_transform is not None:
        return f"an unconditional transform in its {name}"
    kept, transformed = layer.num_identity_features, layer.num_transform_features
    if not kept or not transformed:
        return f"a mask that keeps {kept} channels and transforms {transformed}"
    order = couplings.channel_order(layer)
    return CouplingParts(layer.transform_net, spec, kept, None if order is None else order[0])


def step_parts(layers: Sequence[nn.Module]) -> StepParts | str:
    """Read a run such as [ActNorm, OneByOneConvolution, AffineCouplingTransform] as one step, or say why it is none."""
    if len(layers) < 2:
        return "no mixing of channels before a coupling"
    parts = coupling_parts(layers[-1])
    if isinstance(parts, str):
        return parts
    like = next(parts.net.parameters(), None)
    mixing = channel_map(layers[:-1], None if like is None else like.dtype)
    if isinstance(mixing, str):
        return mixing
    matrix, offset, log_det, source = mixing
    if len(matrix) != layers[-1].features:
        return f"a coupling of {layers[-1].features} channels after {len(matrix)}"
    if parts.order is not None:
        matrix, offset = matrix[parts.order], offset[parts.order]
        source = None if source is None else source[parts.order]
    return StepParts(matrix, offset, log_det, *parts, source)
